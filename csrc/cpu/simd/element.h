// How a level multiplies: Floats one element of k at a time, Pairs two of bf16 where the processor has the instruction.
// A packed panel holds, for each step of k, `vectors` vectors of Vec::kLanes columns.
#pragma once

#include "cpu/simd/vec.h"

namespace burnish::BURNISH_ISA {

constexpr int64_t kShortSum = 16;  // steps that a level of one lane sums in one go, as vectors have it by their lanes

struct Floats {
  using Stored = float;
  static constexpr int kDepth = 1;  // elements of k a step
  using Weight = Vec;
  static BURNISH_INLINE Vec load_weight(const void* panel) {
    return load(static_cast<const float*>(panel), Vec::kLanes);
  }
  static BURNISH_INLINE Vec spread(const char* x) { return Vec(*reinterpret_cast<const float*>(x)); }
  static BURNISH_INLINE Vec spread_last(const char* x) { return spread(x); }
  static BURNISH_INLINE void multiply_add(Vec& sum, Vec weight, Vec x) { sum = fma(weight, x, sum); }
};

#if defined(__AVX512F__)

// sum += the products of unsigned bytes and bytes, four by four. Assembly, because GCC copies each accumulator when it
// goes through the intrinsic.
BURNISH_INLINE void add_byte_products(__m512i& sum, __m512i unsigned_bytes, __m512i bytes) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(bytes));
}

#endif

#if defined(__AVX512BF16__)

struct Pairs {
  using Stored = bf16;
  static constexpr int kDepth = 2;
  using Weight = __m512i;
  static BURNISH_INLINE __m512i load_weight(const void* panel) { return _mm512_loadu_si512(panel); }
  static BURNISH_INLINE __m512i spread(const char* x) {
    int32_t two;
    memcpy(&two, x, 4);
    return _mm512_set1_epi32(two);
  }
  // the last element of an odd depth, beside a zero
  static BURNISH_INLINE __m512i spread_last(const char* x) {
    uint16_t one;
    memcpy(&one, x, 2);
    return _mm512_set1_epi32(one);
  }
  // Assembly, because GCC copies each accumulator when it goes through the intrinsic.
  static BURNISH_INLINE void multiply_add(Vec& sum, __m512i weight, __m512i x) {
    asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(weight), "v"(x));
  }
};

template <class F>
BURNISH_INLINE auto with_element(Format format, F f) {
  return format == Format::kBf16 ? f(Pairs()) : f(Floats());
}

#else

template <class F>
BURNISH_INLINE auto with_element(Format, F f) {
  return f(Floats());
}

#endif

}  // namespace burnish::BURNISH_ISA
