// The kept blocks of a row of blocks by a few rows of x, both as they lie: nothing is packed and the weights stream
// from memory once, prefetched into L2 (see dot.cpp) over the ends of blocks.
//
// A pass keeps the sums of some rows of weights, a vector of partial sums each, over all blocks. Where a row of a block
// is shorter than a vector, one holds two rows or, of blocks with one row, two blocks.
#include <utility>

#include "cpu/simd/dot.h"
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kSums = Vec::kLanes == 16 ? 16 : 8;  // registers of sums
constexpr int kMostRows = 8;                       // rows of x that meet the weights in one pass
constexpr int64_t kAhead = 4;                      // blocks
constexpr int64_t kTallest = 128;                  // rows of a block

// Weight vectors that meet MR rows of x together.
template <int MR>
constexpr int kVectors = Vec::kLanes == 1 ? 1 : kSums / MR;

#if defined(__AVX512BF16__)
// Two rows of a block to a vector: blocks of 16 columns.
struct TwoRows : DotPairs {
  static BURNISH_INLINE Part load_x(const bf16* x, int64_t) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static constexpr int kSpan = 2;
  static constexpr int64_t kStep = 16;
};
#endif

template <class Dot>
struct OneRow : Dot {
  static BURNISH_INLINE auto load_x(const typename Dot::Stored* x, int64_t k) { return Dot::load_part(x + k); }
  static constexpr int kSpan = 1;
  static constexpr int64_t kStep = Dot::kDepth;
};

// The sums of a vector's kSpan parts.
template <int kSpan>
BURNISH_INLINE void add_parts(Vec sum, float* out) {
#if defined(__AVX512F__)
  if constexpr (kSpan == 2) {
    const Vec halves[4] = {Vec(_mm512_maskz_mov_ps(0x00ff, sum.v)), Vec(_mm512_maskz_mov_ps(0xff00, sum.v)), Vec(0.0f),
                           Vec(0.0f)};
    float sums[4];
    add_lanes(halves, sums);
    out[0] = sums[0];
    out[1] = sums[1];
    return;
  }
#endif
  const Vec one[4] = {sum, Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  float sums[4];
  add_lanes(one, sums);
  out[0] = sums[0];
}

// `NV` vectors of weights from row `row` of each block on, by MR rows of x: out[m][row].
template <class Dot, int MR, int NV>
void pass(const BlockProduct& args, int64_t row, float* out) {
  using Stored = typename Dot::Stored;
  Vec sum[MR][NV];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) { BURNISH_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = Vec(0.0f); }
  [[maybe_unused]] Vec total[MR][NV] = {};
  const int64_t width = args.steps, vector_bytes = Dot::kSpan * args.row_bytes;
  const char* weights = args.weights + row * args.row_bytes;
  for (int64_t s = 0; s < args.segments; ++s, weights += args.weight_bytes) {
    const char* x = args.panels + args.pieces[s] * args.piece_bytes;
    for (int64_t k = 0; k < width; k += Dot::kStep) {
      const char* w = weights + k * static_cast<int64_t>(sizeof(Stored));
      typename Dot::Part left[MR];
      BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
        left[m] = Dot::load_x(reinterpret_cast<const Stored*>(x + m * args.step_bytes), k);
      }
      BURNISH_UNROLL for (int v = 0; v < NV; ++v) {
        __builtin_prefetch(w + kAhead * args.weight_bytes + v * vector_bytes, 0, 2);
        const auto right = Dot::load_part(reinterpret_cast<const Stored*>(w + v * vector_bytes));
        BURNISH_UNROLL for (int m = 0; m < MR; ++m) Dot::multiply_add(sum[m][v], right, left[m]);
      }
    }
    if constexpr (Vec::kLanes == 1) {  // no lanes that keep sums short: blocks do
      for (int m = 0; m < MR; ++m) {
        for (int v = 0; v < NV; ++v) {
          total[m][v] = total[m][v] + sum[m][v];
          sum[m][v] = Vec(0.0f);
        }
      }
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int v = 0; v < NV; ++v) {
      add_parts<Dot::kSpan>(Vec::kLanes == 1 ? total[m][v] : sum[m][v], out + m * kTallest + row + v * Dot::kSpan);
    }
  }
}

template <class Dot, int MR, int... V>
void rows_of(const BlockProduct& args, int64_t rows, float* out, std::integer_sequence<int, V...>) {
  using Pass = void (*)(const BlockProduct&, int64_t, float*);
  static constexpr Pass kTable[] = {pass<Dot, MR, V + 1>...};
  const int64_t vectors = (rows + Dot::kSpan - 1) / Dot::kSpan, most = static_cast<int64_t>(sizeof...(V));
  const int64_t passes = (vectors + most - 1) / most;
  for (int64_t p = 0; p < passes; ++p) {
    const int64_t first = vectors * p / passes, last = vectors * (p + 1) / passes;
    kTable[last - first - 1](args, first * Dot::kSpan, out);
  }
}

#if defined(__AVX512BF16__)
// Blocks of one row and 16 columns, two to a vector.
template <int MR>
void single_row(const BlockProduct& args, float* out) {
  Vec sum[MR][2];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = Vec(0.0f);
  const auto x_at = [&](int64_t s, int m) __attribute__((always_inline)) {
    const char* x = args.panels + args.pieces[s] * args.piece_bytes + m * args.step_bytes;
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  };
  int64_t s = 0;
  const auto two = [&](int part) __attribute__((always_inline)) {
    const __m512i w = _mm512_loadu_si512(args.weights + s * 32);
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(x_at(s, m)), x_at(s + 1, m), 1);
      DotPairs::multiply_add(sum[m][part], w, x);
    }
    s += 2;
  };
  while (s + 4 <= args.segments) {
    __builtin_prefetch(args.weights + s * 32 + 1024);
    __builtin_prefetch(args.weights + s * 32 + 1088);
    two(0);
    two(1);
  }
  if (s + 2 <= args.segments) two(0);
  if (s < args.segments) {
    const __m512i w = _mm512_maskz_loadu_epi16(0xffff, args.weights + s * 32);
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      DotPairs::multiply_add(sum[m][1], w, _mm512_zextsi256_si512(x_at(s, m)));
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) add_parts<1>(sum[m][0] + sum[m][1], out + m * kTallest);
}
#endif

template <int MR>
void some_rows(const BlockProduct& args, int64_t rows, float* out) {
  using Vectors = std::make_integer_sequence<int, kVectors<MR>>;
#if defined(__AVX512BF16__)
  if (args.format == Format::kBf16) {
    if (args.steps >= DotPairs::kDepth) return rows_of<OneRow<DotPairs>, MR>(args, rows, out, Vectors());
    if (args.row_bytes == args.weight_bytes) return single_row<MR>(args, out);
    return rows_of<TwoRows, MR>(args, rows, out, Vectors());
  }
#endif
  with_type(args.format, [&](auto* type) {
    rows_of<OneRow<DotFloats<std::remove_pointer_t<decltype(type)>>>, MR>(args, rows, out, Vectors());
  });
}

template <int... M>
void any_rows(const BlockProduct& args, int64_t rows, int64_t columns, float* out, std::integer_sequence<int, M...>) {
  static constexpr decltype(&some_rows<1>) kTable[] = {some_rows<M + 1>...};
  kTable[columns - 1](args, rows, out);
}

}  // namespace

void block_dot(const BlockProduct& args, int64_t rows, int64_t columns, const Sink& sink) {
  float out[kMostRows * kTallest];
  for (int64_t m = 0; m < columns; m += kMostRows) {
    const int64_t here = columns - m < kMostRows ? columns - m : kMostRows;
    BlockProduct some = args;
    some.panels += m * args.step_bytes;
    any_rows(some, rows, here, out, std::make_integer_sequence<int, kMostRows>());
    for (int64_t i = 0; i < here; ++i) finish_row(out + i * kTallest, rows, sink.at(m + i, 0));
  }
}

}  // namespace burnish::BURNISH_ISA
