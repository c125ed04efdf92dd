// The int8 matrix product with its epilogue, on the vnni layout.
//
// A microkernel multiplies MR rows of q by NB groups of 16 channels over the whole depth, in registers, and leaves
// int32 sums in a small tile that the epilogue turns into y. Weights are unsigned (w + 128), so each sum is too large
// by 128 * sum(q), which is subtracted there (kOffset); sums wrap modulo 2^32 and the true one fits.
//
// A panel of 64 channels is read from memory once and from L2 by every further pass over it. Each pass also prefetches
// its share of the next panel, so that memory works while the multipliers do: with one pass it is a plain stream.
#include "cpu/simd/element.h"
#include "cpu/simd/level.h"
#include "math/pack.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kGroups = kPanel / kGroup;  // groups of 16 channels in a full panel

// What a pass may prefetch: `lines` cache lines from `next` on, spread over its depth.
struct Prefetch {
  const uint8_t* next;
  int64_t lines;
};

#if defined(__AVX512F__)

constexpr int kMaxRows = 6;  // 6 x 4 sums, 4 weights and a broadcast fit the 32 registers
constexpr bool kOffset = true;

template <int MR, int NB>
void multiply(const int8_t* q, int64_t q_stride, const uint8_t* weight, int64_t depth, int32_t* sums,
              Prefetch prefetch) {
  __m512i sum[MR][NB];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int n = 0; n < NB; ++n) sum[m][n] = _mm512_setzero_si512();
  }
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    const uint8_t* w = weight + k * (NB * 64);
    __m512i weights[NB];
    BURNISH_UNROLL for (int n = 0; n < NB; ++n) weights[n] = _mm512_loadu_si512(w + n * 64);
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      int32_t four;
      memcpy(&four, q + m * q_stride + k * 4, 4);
      const __m512i broadcast = _mm512_set1_epi32(four);
      BURNISH_UNROLL for (int n = 0; n < NB; ++n) add_byte_products(sum[m][n], weights[n], broadcast);
    }
  };
  // one prefetch every `every` steps, in a loop of its own, so that the steps between stay free of branches
  int64_t k = 0;
  if (prefetch.lines > 0) {
    const int64_t per_step = prefetch.lines / depth;
    if (per_step > 0) {
      for (; k < depth; ++k) {
        for (int64_t i = 0; i < per_step; ++i) _mm_prefetch(prefetch.next + i * 64, _MM_HINT_T1);
        prefetch.next += per_step * 64;
        step(k);
      }
    } else {
      const int64_t every = depth / prefetch.lines;
      for (; k + every <= depth; prefetch.next += 64) {
        _mm_prefetch(prefetch.next, _MM_HINT_T1);
        for (const int64_t end = k + every; k < end; ++k) step(k);
      }
    }
  }
  for (; k < depth; ++k) step(k);
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int n = 0; n < NB; ++n) _mm512_storeu_si512(sums + m * kPanel + n * kGroup, sum[m][n]);
  }
}

#elif defined(__AVX2__)

constexpr int kMaxRows = 4;     // 4 x 2 sums, a vector of weights and its magnitudes fit the 16 registers
constexpr int64_t kPiece = 64;  // steps of the depth: 16 KiB of weights, which stay in L1
constexpr bool kOffset = false;

// Assembly, in order: GCC mixes the halves of a step, whose values are more than the registers, and a sum that went to
// memory doubled the time.
BURNISH_INLINE void add(__m256i& sum, __m256i products) {
  asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
}

// sums += the product with NB groups of 16 channels. vpmaddubsw saturates sums of two products: those of |w| <= 128 and
// q with w's sign, at most 127, stay below. Brings the lines of `next` closer meanwhile.
template <int MR, int NB>
BURNISH_INLINE void multiply_groups(const int8_t* q, int64_t q_stride, const uint8_t* weight, int64_t step_bytes,
                                    int64_t depth, const uint8_t* next, int32_t* sums) {
  constexpr int kHalves = 2 * NB;
  const __m256i offset = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  __m256i sum[MR][kHalves];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int h = 0; h < kHalves; ++h) {
      sum[m][h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + m * kPanel + h * 8));
    }
  }
  for (int64_t k = 0; k < depth; ++k, next += NB * 64) {
    BURNISH_UNROLL for (int n = 0; n < NB; ++n) _mm_prefetch(next + n * 64, _MM_HINT_T1);
    BURNISH_UNROLL for (int h = 0; h < kHalves; ++h) {
      const auto* at = reinterpret_cast<const __m256i*>(weight + k * step_bytes + h * 32);
      const __m256i w = _mm256_xor_si256(_mm256_loadu_si256(at), offset), magnitude = _mm256_abs_epi8(w);
      BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
        int32_t four;
        memcpy(&four, q + m * q_stride + k * 4, 4);
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(_mm256_set1_epi32(four), w));
        add(sum[m][h], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int h = 0; h < kHalves; ++h) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + m * kPanel + h * 8), sum[m][h]);
    }
  }
}

// As many groups at a time as have registers for their sums, a piece of the depth after the other, so that memory is
// read in order.
template <int MR, int NB>
void multiply(const int8_t* q, int64_t q_stride, const uint8_t* weight, int64_t depth, int32_t* sums, Prefetch) {
  constexpr int kMost = MR > 2 ? 1 : 4 / MR, kTogether = NB < kMost ? NB : kMost, kRest = NB % kTogether;
  memset(sums, 0, MR * kPanel * sizeof *sums);
  for (int64_t k = 0; k < depth; k += kPiece) {
    const int64_t steps = depth - k < kPiece ? depth - k : kPiece;
    const uint8_t *w = weight + k * NB * 64, *next = w + kPiece * NB * 64;
    int n = 0;
    for (; n + kTogether <= NB; n += kTogether) {
      multiply_groups<MR, kTogether>(q + k * 4, q_stride, w + n * 64, NB * 64, steps, next + n * steps * 64,
                                     sums + n * kGroup);
    }
    if constexpr (kRest > 0) {
      multiply_groups<MR, kRest>(q + k * 4, q_stride, w + n * 64, NB * 64, steps, next + n * steps * 64,
                                 sums + n * kGroup);
    }
  }
}

#else

constexpr int kMaxRows = 1;
constexpr bool kOffset = true;

template <int MR, int NB>
void multiply(const int8_t* q, int64_t, const uint8_t* weight, int64_t depth, int32_t* sums, Prefetch) {
  uint32_t sum[NB * kGroup] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const uint8_t* w = weight + k * (NB * 64);
    for (int n = 0; n < NB * kGroup; ++n) {
      int32_t product = 0;
      for (int i = 0; i < 4; ++i) product += w[n * 4 + i] * q[k * 4 + i];
      sum[n] += static_cast<uint32_t>(product);
    }
  }
  memcpy(sums, sum, sizeof sum);
}

#endif

using Multiply = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, int32_t*, Prefetch);

template <int MR>
Multiply multiply_rows(int64_t groups) {
  static constexpr Multiply kTable[] = {multiply<MR, 1>, multiply<MR, 2>, multiply<MR, 3>, multiply<MR, 4>};
  return kTable[groups - 1];
}

// The microkernel for `rows` rows and `groups` groups of channels.
Multiply choose(int64_t rows, int64_t groups) {
#if defined(__AVX512F__)
  if (rows == 6) return multiply_rows<6>(groups);
  if (rows == 5) return multiply_rows<5>(groups);
#endif
#if defined(__AVX2__)
  if (rows == 4) return multiply_rows<4>(groups);
  if (rows == 3) return multiply_rows<3>(groups);
  if (rows == 2) return multiply_rows<2>(groups);
#endif
  (void)rows;
  return multiply_rows<1>(groups);
}

// y of `rows` rows from `row` on and up to 64 channels, from their sums.
template <class T, Activation kActivation>
void finish_block(const Int8Product& args, int64_t row, int64_t rows, int64_t channel, int64_t count,
                  const int32_t* sums, const float* addend) {
  for (int64_t n = 0; n < count; n += Vec::kLanes) {
    const Vec scale = load(args.channel_scale + channel + n, count - n);
    const Vec bias = args.bias == nullptr ? Vec(0.0f) : load(args.bias + channel + n, count - n);
    for (int64_t m = 0; m < rows; ++m) {
      const int32_t offset = kOffset ? args.row_offset[row + m] : 0;
      Vec z = from_int32(sums + m * kPanel + n, offset) * (Vec(args.row_scale[row + m]) * scale);
      if (args.bias != nullptr) z = z + bias;
      if (addend != nullptr) z = z + load(addend + (row + m) * args.addend_stride + n, count - n);
      T* y = static_cast<T*>(args.y) + (row + m) * args.channels + channel + n;
      store(y, activate(z, kActivation), count - n);
    }
  }
}

using Finish = void (*)(const Int8Product&, int64_t, int64_t, int64_t, int64_t, const int32_t*, const float*);

template <class T>
Finish choose_finish(int activation) {
  static constexpr Finish kTable[kActivations] = {
      finish_block<T, Activation::kNone>, finish_block<T, Activation::kRelu>, finish_block<T, Activation::kGelu>,
      finish_block<T, Activation::kGeluTanh>, finish_block<T, Activation::kSilu>};
  return kTable[activation];
}

}  // namespace

void int8_product(const Int8Product& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  const Finish finish = with_type(
      args.y_format, [&](auto* type) { return choose_finish<std::remove_pointer_t<decltype(type)>>(args.activation); });
  const int64_t rows = row_end - row_begin;
  const int64_t passes = (rows + kMaxRows - 1) / kMaxRows;
  alignas(64) int32_t sums[kMaxRows * kPanel];
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t width = panel_width(args.channels, p);
    const uint8_t* weight = args.weight + p * kPanel * args.depth * kDepth;
    const int64_t next_lines =
        p + 1 < panel_end && passes > 1 ? panel_width(args.channels, p + 1) * args.depth / 16 : 0;
    const int64_t channel = p * kPanel;
    const int64_t count = args.channels - channel < width ? args.channels - channel : width;
    const float* addend = args.addend == nullptr ? nullptr : args.addend + (p - panel_begin) * kPanel;
    const uint8_t* next = weight + width * args.depth * kDepth;
    for (int64_t pass = 0; pass < passes; ++pass) {
      // equal passes: 16 rows as 6 + 5 + 5, not 6 + 6 + 4
      const int64_t first = row_begin + rows * pass / passes;
      const int64_t last = row_begin + rows * (pass + 1) / passes;
      const int64_t line = next_lines * pass / passes;
      const Prefetch prefetch{next + line * 64, next_lines * (pass + 1) / passes - line};
      choose(last - first, width / kGroup)(args.q + first * args.q_stride, args.q_stride, weight, args.depth, sums,
                                           prefetch);
      finish(args, first, last - first, channel, count, sums, addend);
    }
  }
}

}  // namespace burnish::BURNISH_ISA
