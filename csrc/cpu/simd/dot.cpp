// X W^T for a few rows, both matrices as they lie in memory: nothing is packed, W is read once and from memory, into L2
// ahead of use: prefetched into L1 it would wait for the few misses that L1 can have at a time.
//
// Up to four rows of X meet four rows of W; each pair has a vector of partial sums over k, added up at the end.
#include <algorithm>

#include "cpu/simd/dot.h"
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kRows = 4, kColumns = 4;
constexpr int kBlock = 16;  // columns that are finished together

// MR rows of X, NC of W: sums are formed alike whatever the tile.
template <class Dot, int MR, int NC>
void tile(const char* x, int64_t x_stride, const char* w, int64_t w_stride, int64_t depth, float* out) {
  using Stored = typename Dot::Stored;
  Vec sum[MR][kColumns];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int n = 0; n < kColumns; ++n) sum[m][n] = Vec(0.0f);
  }
  const auto step = [&](int64_t k, auto... count) __attribute__((always_inline)) {
    typename Dot::Part left[MR];
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      left[m] = Dot::load_part(reinterpret_cast<const Stored*>(x + m * x_stride) + k, count...);
    }
    BURNISH_UNROLL for (int n = 0; n < NC; ++n) {
      const auto* from = reinterpret_cast<const Stored*>(w + n * w_stride) + k;
      __builtin_prefetch(from + NC * w_stride / static_cast<int64_t>(sizeof(Stored)), 0, 2);
      const auto right = Dot::load_part(from, count...);
      BURNISH_UNROLL for (int m = 0; m < MR; ++m) Dot::multiply_add(sum[m][n], right, left[m]);
    }
  };
  int64_t k = 0;
  if constexpr (Vec::kLanes == 1) {  // no lanes that keep sums short: blocks do
    Vec total[MR][kColumns] = {};
    for (; k < depth; ++k) {
      step(k);
      if (k % kShortSum != kShortSum - 1 && k + 1 < depth) continue;
      for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NC; ++n) {
          total[m][n] = total[m][n] + sum[m][n];
          sum[m][n] = Vec(0.0f);
        }
      }
    }
    for (int m = 0; m < MR; ++m) std::copy(total[m], total[m] + kColumns, sum[m]);
  } else {
    for (; k + Dot::kDepth <= depth; k += Dot::kDepth) step(k);
    if (k < depth) step(k, depth - k);
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    float sums[kColumns];
    add_lanes(sum[m], sums);
    std::copy(sums, sums + NC, out + m * kBlock);
  }
}

template <class Dot>
void dot_rows(const Matrix& x, int64_t rows, const Matrix& w, int64_t columns, int64_t depth, const Sink& sink) {
  const auto* xs = static_cast<const char*>(x.data);
  const auto* ws = static_cast<const char*>(w.data);
  float out[kRows * kBlock];
  for (int64_t n = 0; n < columns; n += kBlock) {
    const int64_t count = columns - n < kBlock ? columns - n : kBlock;
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t left = rows - m < kRows ? rows - m : kRows;
      static constexpr decltype(&tile<Dot, 1, 1>) kTiles[2][kRows] = {
          {tile<Dot, 1, 1>, tile<Dot, 2, 1>, tile<Dot, 3, 1>, tile<Dot, 4, 1>},
          {tile<Dot, 1, kColumns>, tile<Dot, 2, kColumns>, tile<Dot, 3, kColumns>, tile<Dot, 4, kColumns>}};
      for (int64_t i = 0; i < count;) {
        const bool whole = i + kColumns <= count;
        kTiles[whole][left - 1](xs + m * x.stride, x.stride, ws + (n + i) * w.stride, w.stride, depth, out + i);
        i += whole ? kColumns : 1;
      }
      for (int64_t r = 0; r < left; ++r) finish_row(out + r * kBlock, count, sink.at(m + r, n));
    }
  }
}

}  // namespace

void dot(const Matrix& x, int64_t rows, const Matrix& w, int64_t columns, int64_t depth, const Sink& sink) {
#if defined(__AVX512BF16__)
  if (w.format == Format::kBf16) return dot_rows<DotPairs>(x, rows, w, columns, depth, sink);
#endif
  with_type(w.format, [&](auto* type) {
    dot_rows<DotFloats<std::remove_pointer_t<decltype(type)>>>(x, rows, w, columns, depth, sink);
  });
}

void finish_row(const float* sums, int64_t count, const Sink& sink) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    Vec value = load(sums + i, count - i);
    if (sink.add) value = value + load(sink.sums + i, count - i);
    if (sink.y == nullptr) {
      store(sink.sums + i, value, count - i);
      continue;
    }
    if (sink.bias != nullptr) value = value + load(sink.bias + i, count - i);
    with_type(sink.y_format, [&](auto* type) { store(static_cast<decltype(type)>(sink.y) + i, value, count - i); });
  }
}

}  // namespace burnish::BURNISH_ISA
