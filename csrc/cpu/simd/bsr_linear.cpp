// The product of the kept blocks of a row of blocks with panels of the dense operand: weights are broadcast from where
// they lie, so a weight is never packed, and the panels, which the whole weight shares, are packed once a call.
//
// A microkernel multiplies MR rows of weights by NV vectors over all blocks, with the sums in registers. A block's
// panel piece lies anywhere, which the processor cannot foresee: the next block's is prefetched step by step.
#include <utility>

#include "cpu/simd/element.h"
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kVectors = kPanelColumns / Vec::kLanes;  // of a microkernel, at most
constexpr int64_t kWeightsAhead = 4;                   // blocks: those of a row follow one another in memory
constexpr int64_t kFewAhead = 16;  // beside one vector, which waits for weights: into L2, where more can be under way

// Int8 weights by bytes of x + 128, four of k a step; the sums are int32 in float registers' places.
struct Quads {
  static constexpr int kDepth = 4;
#if defined(__AVX512F__)
  using Sum = __m512i;
  using Weight = __m512i;
  static BURNISH_INLINE Sum zero() { return _mm512_setzero_si512(); }
  static BURNISH_INLINE Weight load_panel(const char* panel) { return _mm512_loadu_si512(panel); }
  static BURNISH_INLINE __m512i spread(const char* w) {
    int32_t four;
    memcpy(&four, w, 4);
    return _mm512_set1_epi32(four);
  }
  static BURNISH_INLINE void multiply_add(Sum& sum, Weight panel, __m512i w) { add_byte_products(sum, panel, w); }
  static BURNISH_INLINE void keep(int32_t* to, Sum sum) { _mm512_storeu_si512(to, sum); }
#elif defined(__AVX2__)
  // vpmaddubsw saturates its pair sums, so bytes go to 16 bits first: even and odd ones apart, products exact
  struct Weight {
    __m256i even, odd;
  };
  using Sum = __m256i;
  static BURNISH_INLINE Sum zero() { return _mm256_setzero_si256(); }
  static BURNISH_INLINE Weight load_panel(const char* panel) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
    return {_mm256_and_si256(bytes, _mm256_set1_epi16(0x00ff)), _mm256_srli_epi16(bytes, 8)};
  }
  static BURNISH_INLINE Weight spread(const char* w) {
    int32_t four;
    memcpy(&four, w, 4);
    const __m256i bytes = _mm256_set1_epi32(four);
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }
  static BURNISH_INLINE void multiply_add(Sum& sum, const Weight& panel, const Weight& w) {
    const __m256i pair = _mm256_add_epi32(_mm256_madd_epi16(panel.even, w.even), _mm256_madd_epi16(panel.odd, w.odd));
    sum = _mm256_add_epi32(sum, pair);
  }
  static BURNISH_INLINE void keep(int32_t* to, Sum sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sum); }
#else
  using Sum = uint32_t;  // wraps; the true sum fits once the offset of x is taken off
  using Weight = const char*;
  static Sum zero() { return 0; }
  static Weight load_panel(const char* panel) { return panel; }
  static const char* spread(const char* w) { return w; }
  static void multiply_add(Sum& sum, Weight panel, const char* w) {
    for (int i = 0; i < 4; ++i) {
      sum += static_cast<uint32_t>(static_cast<uint8_t>(panel[i]) * static_cast<int8_t>(w[i]));
    }
  }
  static void keep(int32_t* to, Sum sum) { *to = static_cast<int32_t>(sum); }
#endif
  static constexpr bool kExact = true;
};

// Floats, or pairs of bf16, as dense products multiply them.
template <class Element>
struct Dense {
  static constexpr int kDepth = Element::kDepth;
  static constexpr bool kExact = false;
  using Sum = Vec;
  static BURNISH_INLINE Sum zero() { return Vec(0.0f); }
  static BURNISH_INLINE auto load_panel(const char* panel) { return Element::load_weight(panel); }
  static BURNISH_INLINE auto spread(const char* w) { return Element::spread(w); }
  template <class Weight, class Spread>
  static BURNISH_INLINE void multiply_add(Sum& sum, Weight panel, Spread w) {
    Element::multiply_add(sum, panel, w);
  }
  static BURNISH_INLINE void keep(float* to, Sum sum) { store(to, sum, Vec::kLanes); }
};

// Rows of a microkernel: as many as leave registers for the panel's vectors and a broadcast.
template <class Element, int NV>
constexpr int kRowsOf = Vec::kLanes == 16  ? (NV <= 2   ? 12
                                              : NV == 3 ? 8
                                                        : 6)
                        : Vec::kLanes == 8 ? (Element::kExact ? 2 : 6)
                                           : 2;

template <class Element, int MR, int NV, class Out>
void tile(const BlockProduct& args, const char* weights, const char* panels, Out* sums, int64_t stride) {
  typename Element::Sum sum[MR][NV];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = Element::zero();
  }
  [[maybe_unused]] typename Element::Sum total[MR][NV];
  // The lanes are columns, so nothing else keeps sums of fp32 short; pairs are of bf16, which rounds away what is lost.
  constexpr bool kTwoLevels = !Element::kExact && Element::kDepth == 1;
  if constexpr (kTwoLevels) {
    for (auto& row : total) {
      for (auto& each : row) each = Element::zero();
    }
  }
  const int64_t steps = args.steps, step_bytes = args.step_bytes;
  for (int64_t s = 0; s < args.segments; ++s) {
    const auto piece = [&](int64_t i) {
      return panels + (args.pieces == nullptr ? i : args.pieces[i]) * args.piece_bytes;
    };
    const char* w = weights + s * args.weight_bytes;
    const char* panel = piece(s);
    const char* next = piece(s + 1 < args.segments ? s + 1 : s);
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      __builtin_prefetch(w + (NV == 1 ? 1 : kWeightsAhead) * args.weight_bytes + m * args.row_bytes);
      if (NV == 1) __builtin_prefetch(w + kFewAhead * args.weight_bytes + m * args.row_bytes, 0, 2);
    }
    for (int64_t k = 0; k < steps; ++k) {
      BURNISH_UNROLL for (int v = 0; v < NV; ++v) __builtin_prefetch(next + k * step_bytes + v * kVectorBytes);
      decltype(Element::load_panel(panel)) right[NV];
      BURNISH_UNROLL for (int v = 0; v < NV; ++v) right[v] =
          Element::load_panel(panel + k * step_bytes + v * kVectorBytes);
      BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
        const auto left = Element::spread(w + m * args.row_bytes + k * 4);
        BURNISH_UNROLL for (int v = 0; v < NV; ++v) Element::multiply_add(sum[m][v], right[v], left);
      }
      if constexpr (kTwoLevels) {
        if (k + 1 < steps && (Vec::kLanes > 1 || k % kShortSum != kShortSum - 1)) continue;
        for (int m = 0; m < MR; ++m) {
          for (int v = 0; v < NV; ++v) {
            total[m][v] = total[m][v] + sum[m][v];
            sum[m][v] = Element::zero();
          }
        }
      }
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int v = 0; v < NV; ++v) {
      if constexpr (kTwoLevels) sum[m][v] = total[m][v];
      Element::keep(sums + m * stride + v * Vec::kLanes, sum[m][v]);
    }
  }
}

template <class Element, int NV, class Out, int... M>
void rows_of(const BlockProduct& args, int64_t rows, const char* panels, Out* sums, int64_t stride,
             std::integer_sequence<int, M...>) {
  using Tile = void (*)(const BlockProduct&, const char*, const char*, Out*, int64_t);
  static constexpr Tile kTable[] = {tile<Element, M + 1, NV, Out>...};
  const int64_t passes = (rows + static_cast<int64_t>(sizeof...(M)) - 1) / static_cast<int64_t>(sizeof...(M));
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
    kTable[last - first - 1](args, args.weights + first * args.row_bytes, panels, sums + first * stride, stride);
  }
}

template <class Element, class Out, int... NV>
void columns_of(const BlockProduct& args, int64_t rows, int64_t columns, Out* sums, int64_t stride,
                std::integer_sequence<int, NV...>) {
  const int64_t vectors = padded_columns(columns) / Vec::kLanes;
  for (int64_t v = 0; v < vectors; v += kVectors) {
    const int64_t here = vectors - v < kVectors ? vectors - v : kVectors;
    const auto run = [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      rows_of<Element, kCount>(args, rows, args.panels + v * kVectorBytes, sums + v * Vec::kLanes, stride,
                               std::make_integer_sequence<int, kRowsOf<Element, kCount>>());
    };
    (void)((here == NV + 1 ? (run(std::integral_constant<int, NV + 1>()), true) : false) || ...);
  }
}

// sums[n] = 128 * the sum of row n over all segments, by which products with x + 128 are too large.
void sum_weights(const BlockProduct& args, int64_t rows, int32_t* offsets) {
  const int64_t width = args.steps * 4;
  for (int64_t n = 0; n < rows; ++n) {
    int32_t sum = 0;
    for (int64_t s = 0; s < args.segments; ++s) {
      const auto* w = reinterpret_cast<const int8_t*>(args.weights + s * args.weight_bytes + n * args.row_bytes);
      for (int64_t k = 0; k < width; ++k) sum += w[k];
    }
    offsets[n] = 128 * sum;
  }
}

}  // namespace

void block_product(const BlockProduct& args, int64_t rows, int64_t columns, float* sums, int64_t stride) {
  with_element(args.format, [&](auto element) {
    columns_of<Dense<decltype(element)>>(args, rows, columns, sums, stride,
                                         std::make_integer_sequence<int, kVectors>());
  });
}

void int8_block_product(const BlockProduct& args, int64_t rows, int64_t columns, const float* row_scale,
                        const float* channel_scale, const float* bias, float* out, int64_t stride) {
  constexpr int64_t kMaxRows = 128;
  int32_t offsets[kMaxRows];
  sum_weights(args, rows, offsets);
  auto* sums = reinterpret_cast<int32_t*>(out);
  columns_of<Quads>(args, rows, columns, sums, stride, std::make_integer_sequence<int, kVectors>());
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t m = 0; m < columns; m += Vec::kLanes) {
      const Vec scale = load(row_scale + m, columns - m) * Vec(channel_scale[n]);
      Vec z = from_int32(sums + n * stride + m, offsets[n]) * scale;
      if (bias != nullptr) z = z + Vec(bias[n]);
      store(out + n * stride + m, z, Vec::kLanes);
    }
  }
}

}  // namespace burnish::BURNISH_ISA
