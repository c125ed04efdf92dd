// What bsr_linear's forward and backward share: the checked weight, panels of the dense operand, the cut of the work.
#pragma once

#include <algorithm>
#include <optional>

#include "cpu/lowrank.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace burnish {

inline int64_t blocks_along(int64_t size, int64_t block) { return (size + block - 1) / block; }

// The weight's tensors, checked: shapes, and that every index is in range.
struct BlockWeight {
  const char* values;
  int64_t N, K, count, bn, bk, down, across;  // `count` blocks in a grid of [down, across]
  const int32_t *crow, *col;                  // by rows of blocks
  const int32_t *ccol, *row, *position;       // by columns of blocks
  bool int8;
  Format format;  // of x, and of values where they are not int8

  int64_t block_bytes() const { return bn * bk * (int8 ? 1 : size_of(format)); }
  // Multiply-adds of a block with these rows; to few rows it is the time of reading it that counts.
  int64_t work(int64_t rows) const { return bn * bk * std::max<int64_t>(rows, 16); }
};

BlockWeight check_blocks(const char* op, const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                         const Tensor& transposed, const std::optional<Tensor>& scale, int64_t N, bool backward);

// A dense operand [rows, width] with its rows in lanes: groups of the level's panel_columns rows, and in each a piece a
// block of the width, one after the other.
struct Panels {
  char* data;
  int64_t rows, width, block;  // elements
  int64_t group, lanes;        // rows of a group, of a vector
  int64_t depth;               // elements of a word of 32 bits
  Format format;

  // Elements to a word: one float, two of bf16, four of int8.
  Panels(const Kernels& level, int64_t rows, int64_t width, int64_t block, int64_t depth, Format format)
      : data(nullptr),
        rows(rows),
        width(width),
        block(block),
        group(level.panel_columns),
        lanes(level.lanes),
        depth(depth),
        format(format) {}
  int64_t steps() const { return blocks_along(block, depth); }
  int64_t padded() const { return blocks_along(width, block) * block; }
  int64_t groups() const { return blocks_along(rows, group); }
  int64_t group_rows(int64_t g) const { return std::min(group, rows - g * group); }
  int64_t step_bytes(int64_t g) const { return round_up(group_rows(g), lanes) * 4; }
  int64_t group_bytes() const { return blocks_along(width, block) * steps() * group * 4; }
  int64_t bytes() const { return groups() * group_bytes(); }
  // What a product needs of group g, all but its weights and pieces.
  BlockProduct product(int64_t g) const;
  // From x [rows, width] in the panels' format; of int8, x + 128 in rows of padded() bytes.
  void pack(const Kernels& level, const Matrix& x, int64_t g) const;
};

// Work of the rows of blocks that `starts` tells, for each of `groups` groups, cut evenly: calls f(row of blocks,
// group) for a range of whole units; `bundle` rows of blocks go together.
template <class F>
void for_blocks(const int32_t* starts, int64_t down, int64_t bundle, int64_t groups, int64_t unit_work, const F& f) {
  const auto before = [&](int64_t b) {
    const int64_t row = std::min(b * bundle, down);
    return (starts[row] + row) * groups;
  };
  const int64_t bundles = blocks_along(down, bundle);
  constexpr int64_t kWork = int64_t{1} << 20;  // multiply-adds that are worth another thread
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, unit_work));
  balanced_for(0, before(bundles), grain, [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = bundles;  // the last bundle that begins at `begin` or before
    while (high - low > 1) (before((low + high) / 2) <= begin ? low : high) = (low + high) / 2;
    for (int64_t b = low; b < bundles && before(b) < end; ++b) {
      const int64_t each = (before(b + 1) - before(b)) / groups;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = before(b) + g * each;
        if (at >= begin && at < end) f(b * bundle, std::min((b + 1) * bundle, down), g);
      }
    }
  });
}

}  // namespace burnish
