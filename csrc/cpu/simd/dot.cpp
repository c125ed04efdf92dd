// X W^T for a few rows, all matrices as they lie in memory: nothing is packed, W is read once and from memory, into L2
// ahead of use: prefetched into L1 it would wait for the few misses that L1 can have at a time.
//
// A tile of rows of X meets a tile of rows of W; each pair has a vector of partial sums over k and over the terms,
// added up at the end.
#include <algorithm>
#include <utility>

#include "cpu/simd/dot.h"
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr bool kManyRegisters = Vec::kLanes == 16;
constexpr int kRows = kManyRegisters ? 4 : 2, kColumns = kManyRegisters ? 6 : 4;
constexpr int kBlock = 48;  // columns that are finished together
constexpr int kSummed = 4;  // vectors whose lanes are added up together

// MR rows of X, from `row` on, and NC of W, from `column`: sums are formed alike whatever the tile. The columns `ahead`
// of the next tile are brought closer.
template <class Dot, int MR, int NC>
void tile(const DotTerm* terms, int64_t count, int64_t row, int64_t column, std::pair<int, int> ahead, float* out) {
  using Stored = typename Dot::Stored;
  Vec sum[NC][MR];
  BURNISH_UNROLL for (int n = 0; n < NC; ++n) { BURNISH_UNROLL for (int m = 0; m < MR; ++m) sum[n][m] = Vec(0.0f); }
  [[maybe_unused]] Vec total[NC][MR] = {};
  for (const DotTerm* term = terms; term < terms + count; ++term) {
    const auto* x = static_cast<const char*>(term->x.at(row, 0).data);
    const auto* w = static_cast<const char*>(term->w.at(column, 0).data);
    const int64_t x_stride = term->x.stride, w_stride = term->w.stride, depth = term->depth;
    const auto step = [&](int64_t k, auto... left) __attribute__((always_inline)) {
      typename Dot::Part part[MR];
      BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
        part[m] = Dot::load_part(reinterpret_cast<const Stored*>(x + m * x_stride) + k, left...);
      }
      BURNISH_UNROLL for (int n = 0; n < NC; ++n) {
        const auto* from = reinterpret_cast<const Stored*>(w + n * w_stride) + k;
        if (ahead.first <= n && n < ahead.second) {
          __builtin_prefetch(reinterpret_cast<const char*>(from) + NC * w_stride, 0, 2);
        }
        const auto right = Dot::load_part(from, left...);
        BURNISH_UNROLL for (int m = 0; m < MR; ++m) Dot::multiply_add(sum[n][m], right, part[m]);
      }
    };
    int64_t k = 0;
    if constexpr (Vec::kLanes == 1) {  // no lanes that keep sums short: blocks do
      for (; k < depth; ++k) {
        step(k);
        if (k % kShortSum != kShortSum - 1 && k + 1 < depth) continue;
        for (int n = 0; n < NC; ++n) {
          for (int m = 0; m < MR; ++m) {
            total[n][m] = total[n][m] + sum[n][m];
            sum[n][m] = Vec(0.0f);
          }
        }
      }
    } else {
      for (; k + Dot::kDepth <= depth; k += Dot::kDepth) step(k);
      if (k < depth) step(k, depth - k);
    }
  }
  BURNISH_UNROLL for (int n = 0; n < NC; ++n) {
    Vec of[kSummed];
    BURNISH_UNROLL for (int m = 0; m < kSummed; ++m) {
      of[m] = m >= MR ? Vec(0.0f) : Vec::kLanes == 1 ? total[n][m % MR] : sum[n][m % MR];
    }
    float sums[kSummed];
    add_lanes(of, sums);
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) out[m * kBlock + n] = sums[m];
  }
}

template <class Dot>
using Tile = decltype(&tile<Dot, 1, 1>);

template <class Dot, int NC, int... MR>
Tile<Dot> tile_of(int64_t rows, std::integer_sequence<int, MR...>) {
  static constexpr Tile<Dot> kTable[] = {tile<Dot, MR + 1, NC>...};
  return kTable[rows - 1];
}

template <class Dot, int... NC>
Tile<Dot> tile_of(int64_t rows, int64_t columns, std::integer_sequence<int, NC...>) {
  using Rows = std::make_integer_sequence<int, kRows>;
  static constexpr Tile<Dot> (*kTable[])(int64_t, Rows) = {tile_of<Dot, NC + 1>...};
  return kTable[columns - 1](rows, Rows());
}

template <class Dot>
void dot_rows(const DotTerm* terms, int64_t count, int64_t rows, int64_t columns, const Sink& sink) {
  const auto passes = (rows + kRows - 1) / kRows;
  float out[kDotRows * kBlock];
  for (int64_t block = 0; block < columns; block += kBlock) {
    const int64_t width = columns - block < kBlock ? columns - block : kBlock;
    const int64_t tiles = (width + kColumns - 1) / kColumns;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t n = width * t / tiles, here = width * (t + 1) / tiles - n;
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t m = rows * pass / passes, high = rows * (pass + 1) / passes - m;
        const std::pair<int, int> ahead(here * pass / passes, here * (pass + 1) / passes);
        tile_of<Dot>(high, here, std::make_integer_sequence<int, kColumns>())(terms, count, m, block + n, ahead,
                                                                              out + m * kBlock + n);
      }
    }
    for (int64_t m = 0; m < rows; ++m) finish_row(out + m * kBlock, width, sink.at(m, block));
  }
}

}  // namespace

void dot(const DotTerm* terms, int64_t count, int64_t rows, int64_t columns, const Sink& sink) {
  const Format format = terms[0].w.format;
#if defined(__AVX512BF16__)
  if (format == Format::kBf16) return dot_rows<DotPairs>(terms, count, rows, columns, sink);
#endif
  with_type(format, [&](auto* type) {
    dot_rows<DotFloats<std::remove_pointer_t<decltype(type)>>>(terms, count, rows, columns, sink);
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
