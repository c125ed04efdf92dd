// Rows of x taken into a product's format, and dropout: math/philox.h decides, 16 calls of the generator at a time.
#include "cpu/simd/level.h"
#include "cpu/simd/philox.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int64_t kGroups = 16;  // calls of the generator together
constexpr int64_t kSpan = kGroups * kDropoutGroup;

#if defined(__AVX512F__)

// Bytes of kept_bits for groups [group, group + 16) of a row.
void keep_groups(const Dropout& dropout, int64_t row, int64_t group, uint8_t* bits) {
  const uint64_t r = static_cast<uint64_t>(row);
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i words[1][4] = {{_mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(group)), count),
                          _mm512_set1_epi32(static_cast<int32_t>(r)), _mm512_set1_epi32(static_cast<int32_t>(r >> 32)),
                          _mm512_setzero_si512()}};
  philox_lanes<kDropoutRounds>(words, dropout.seed);
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  __m512i kept = _mm512_setzero_si512();
  BURNISH_UNROLL for (int i = 0; i < 4; ++i) {
    const __mmask32 above = _mm512_cmpge_epu16_mask(words[0][i], limit);
    kept = _mm512_or_si512(kept, _mm512_maskz_mov_epi16(above, _mm512_set1_epi32(0x20001 << 2 * i)));
  }
  kept = _mm512_or_si512(kept, _mm512_srli_epi32(kept, 16));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bits), _mm512_cvtepi32_epi8(kept));
}

#else

void keep_groups(const Dropout& dropout, int64_t row, int64_t group, uint8_t* bits) {
  for (int64_t i = 0; i < kGroups; ++i) {
    bits[i] = static_cast<uint8_t>(kept_bits(dropout_words(dropout.seed, row, group + i), dropout.threshold));
  }
}

#endif

// Bit i of byte i / 8: whether element column + i of a row is kept, for kSpan elements.
void keep_span(const Dropout& dropout, int64_t row, int64_t column, uint8_t* bits) {
  if (dropout.threshold == kDropoutRange) {
    memset(bits, 0, kGroups);
  } else {
    keep_groups(dropout, row, column / kDropoutGroup, bits);
  }
}

// value where its bit is set, else zero; `from` is a multiple of the lanes or of 8.
BURNISH_INLINE Vec drop(Vec value, const uint8_t* bits, int64_t from) {
#if defined(__AVX512F__)
  uint16_t mask;
  memcpy(&mask, bits + from / 8, 2);
  return Vec(_mm512_maskz_mov_ps(mask, value.v));
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits[from / 8]), lanes);
  return Vec(_mm256_and_ps(value.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes))));
#else
  return (bits[from / 8] >> from % 8 & 1) != 0 ? value : Vec(0.0f);
#endif
}

// A span of a row: at most kSpan elements.
template <class From, class To>
void take_span(const From* x, int64_t width, const uint8_t* bits, To* out) {
  for (int64_t i = 0; i < width; i += Vec::kLanes) {
    const Vec value = load(x + i, width - i);
    store(out + i, bits == nullptr ? value : drop(value, bits, i), width - i);
  }
}

#if defined(__AVX512F__)
// bf16 stays as it is, bit for bit.
void take_span(const bf16* x, int64_t width, const uint8_t* bits, bf16* out) {
  for (int64_t i = 0; i < width; i += 32) {
    uint32_t kept = ~uint32_t{0};
    if (bits != nullptr) memcpy(&kept, bits + i / 8, 4);
    const __mmask32 there = width - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (width - i)) - 1;
    const __m512i value = _mm512_maskz_loadu_epi16(kept & there, x + i);
    if (width - i >= 32) {
      _mm512_storeu_si512(out + i, value);
    } else {
      _mm512_mask_storeu_epi16(out + i, there, value);
    }
  }
}
#endif

}  // namespace

void take_rows(const Matrix& x, int64_t row, int64_t rows, int64_t column, int64_t width, const Dropout* dropout,
               const Matrix& out) {
  uint8_t bits[kGroups];
  const auto take = [&](auto* from_type, auto* to_type) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto* from = static_cast<const std::remove_pointer_t<decltype(from_type)>*>(x.at(row + r, column).data);
      auto* to = static_cast<decltype(to_type)>(const_cast<void*>(out.at(r, 0).data));
      for (int64_t k = 0; k < width; k += kSpan) {
        if (dropout != nullptr) keep_span(*dropout, row + r, column + k, bits);
        take_span(from + k, width - k < kSpan ? width - k : kSpan, dropout != nullptr ? bits : nullptr, to + k);
      }
    }
  };
  if (out.format == Format::kBf16) {
    take(static_cast<bf16*>(nullptr), static_cast<bf16*>(nullptr));
  } else {
    with_type(x.format, [&](auto* type) { take(type, static_cast<float*>(nullptr)); });
  }
}

void drop_sums(float* sums, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t width,
               const Dropout& dropout) {
  uint8_t bits[kGroups];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < width; k += kSpan) {
      keep_span(dropout, row + r, column + k, bits);
      float* to = sums + r * stride + k;
      take_span(to, width - k < kSpan ? width - k : kSpan, bits, to);
    }
  }
}

}  // namespace burnish::BURNISH_ISA
