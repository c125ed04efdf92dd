// Ceilings of one thread: arithmetic on registers alone, and a streaming read. The bench measures against them.
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kChains = 16;  // independent chains: more than latency times throughput of any multiply-add

}  // namespace

#if defined(__AVX512F__)

double peak_int8(int64_t steps) {
  __m512i sum[kChains];
  BURNISH_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_si512();
  const __m512i a = _mm512_set1_epi32(0x5a3c71e2), b = _mm512_set1_epi32(0x17b2c35d);
  for (int64_t s = 0; s < steps; ++s) {
    BURNISH_UNROLL for (int i = 0; i < kChains;
                        ++i) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
  }
  return 2.0 * 64 * kChains * static_cast<double>(steps);
}

double peak_fp32(int64_t steps) {
  __m512 sum[kChains];
  BURNISH_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_ps();
  const __m512 a = _mm512_set1_ps(0.7f), b = _mm512_set1_ps(1.1f);
  for (int64_t s = 0; s < steps; ++s) {
    BURNISH_UNROLL for (int i = 0; i < kChains; ++i) {
      asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
    }
  }
  return 2.0 * 16 * kChains * static_cast<double>(steps);
}

double peak_bf16(int64_t steps) {
  __m512 sum[kChains];
  BURNISH_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = _mm512_setzero_ps();
  const __m512i a = _mm512_set1_epi32(0x3f803f80), b = _mm512_set1_epi32(0x3f003f00);
  for (int64_t s = 0; s < steps; ++s) {
    BURNISH_UNROLL for (int i = 0; i < kChains; ++i) {
      asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
    }
  }
  return 2.0 * 32 * kChains * static_cast<double>(steps);
}

#elif defined(__AVX2__)

double peak_int8(int64_t steps) {
  __m256i sum[8];
  BURNISH_UNROLL for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_si256();
  const __m256i a = _mm256_set1_epi16(77), b = _mm256_set1_epi16(-31);
  for (int64_t s = 0; s < steps; ++s) {
    BURNISH_UNROLL for (int i = 0; i < 8; ++i) {
      __m256i product;
      asm volatile("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(a), "x"(b));
      asm volatile("vpaddd %1, %0, %0" : "+x"(sum[i]) : "x"(product));
    }
  }
  return 2.0 * 16 * 8 * static_cast<double>(steps);
}

double peak_fp32(int64_t steps) {
  __m256 sum[12];
  BURNISH_UNROLL for (int i = 0; i < 12; ++i) sum[i] = _mm256_setzero_ps();
  const __m256 a = _mm256_set1_ps(0.7f), b = _mm256_set1_ps(1.1f);
  for (int64_t s = 0; s < steps; ++s) {
    BURNISH_UNROLL for (int i = 0; i < 12; ++i) asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum[i]) : "x"(a), "x"(b));
  }
  return 2.0 * 8 * 12 * static_cast<double>(steps);
}

double peak_bf16(int64_t steps) { return peak_fp32(steps); }  // no bf16 arithmetic at this level

#else

// SSE2, which every x86-64 has and which plain C++ compiles to: four lanes, multiply and add apart.
template <class T>
double peak_plain(int64_t steps) {
  T sum[kChains * 4] = {};
  volatile T seed = 3;
  const T a = seed;
  for (int64_t s = 0; s < steps; ++s) {
    for (auto& value : sum) value = static_cast<T>(value * a + a);
  }
  volatile T sink = 0;
  for (const T value : sum) sink = sink + value;
  return 2.0 * 4 * kChains * static_cast<double>(steps);
}

double peak_int8(int64_t steps) { return peak_plain<uint32_t>(steps); }
double peak_fp32(int64_t steps) { return peak_plain<float>(steps); }
double peak_bf16(int64_t steps) { return peak_plain<float>(steps); }

#endif

uint64_t read(const void* data, int64_t bytes) {
  const auto* p = static_cast<const uint64_t*>(data);
  uint64_t sum[32] = {};
  for (int64_t i = 0; i + 32 <= bytes / 8; i += 32) {
    BURNISH_UNROLL for (int j = 0; j < 32; ++j) sum[j] += p[i + j];
  }
  uint64_t total = 0;
  for (const uint64_t value : sum) total += value;
  return total;
}

}  // namespace burnish::BURNISH_ISA
