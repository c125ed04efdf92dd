// Sums of float matrix products, blocked for the caches and cut up for the threads: what the low-rank ops are made of.
// How work is cut depends on shapes alone, so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace burnish {

class Compressed;

// W of a product, [columns, depth], or where `transposed` [depth, columns] in memory; then its elements may be dropped.
// A compressed one has no memory: it is made dense where it is packed.
struct Weight {
  Matrix matrix;
  bool transposed;
  const Dropout* dropout = nullptr;
  const Compressed* compressed = nullptr;
};

// X W^T: X [rows, depth] in a product format.
struct Term {
  Matrix x;
  Weight weight;
  int64_t depth;

  Term below(int64_t row) const { return {x.at(row, 0), weight, depth}; }
};

// Memory of a call's own for `rows` rows; a row has some cache lines to itself, an odd number of them, so that rows of
// a power of two do not meet in the same cache sets.
struct Block {
  char* data;
  int64_t stride;
  Format format;

  static int64_t stride_of(int64_t columns, Format format) { return (columns * size_of(format) + 63) / 128 * 128 + 64; }
  static int64_t bytes(int64_t rows, int64_t columns, Format format) {
    return Scratch::bytes<char>(rows * stride_of(columns, format));
  }
  static Block take(Scratch& scratch, int64_t rows, int64_t columns, Format format) {
    const int64_t stride = stride_of(columns, format);
    return {scratch.take<char>(rows * stride), stride, format};
  }
  Matrix matrix() const { return {data, stride, format}; }
  char* row(int64_t i) const { return data + i * stride; }
  float* floats(int64_t i) const { return reinterpret_cast<float*>(row(i)); }
  Sink sums(bool add) const { return sums_of(floats(0), stride / 4, add); }
};

// `begin` to `end` of something.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Columns of W that are packed together, in panels.
constexpr int64_t kColumnBlock = 64;

// A matrix that is stored in another form.
class Compressed {
 public:
  virtual ~Compressed() = default;
  // out = these rows and columns, dense, in out's format, a product format. Columns begin at a multiple of 8.
  virtual void take(const Kernels& level, Range rows, Range columns, const Block& out) const = 0;
  // Columns that are taken together where the rows are the depth: a multiple of kColumnBlock.
  virtual int64_t together() const { return kColumnBlock; }
  // The depth that is summed in one go, at most: less where a float's error would grow too large.
  virtual int64_t longest(Format) const { return std::numeric_limits<int64_t>::max(); }
};

// `columns` (from a multiple of kColumnBlock on, and to one or the last) of sink = the sum of the terms, for `rows`
// rows of X. With `dropout`, the first term's product is dropped where row `mask_row` + i, column j is; at least one
// more term or sums must follow it.
void add_products(const Kernels& level, const std::vector<Term>& terms, int64_t rows, Range columns, const Sink& sink,
                  const Dropout* dropout = nullptr, int64_t mask_row = 0);

// The same for all rows and all `columns` of sink, by all threads.
void add_products_parallel(const Kernels& level, const std::vector<Term>& terms, int64_t rows, int64_t columns,
                           const Sink& sink, const Dropout* dropout = nullptr);

// Columns up to which W costs little to pack again, for as many rows of X.
constexpr int64_t kNarrow = 32, kNarrowRows = 64;

// A sum over a long depth, cut into parts [rows, depth] that are summed apart.
struct Cut {
  int64_t rows, depth, row_part, depth_part;

  Cut(int64_t rows, int64_t depth, int64_t columns);
  int64_t row_parts() const { return rows == 0 ? 0 : (rows + row_part - 1) / row_part; }
  int64_t depth_parts() const { return depth == 0 ? 1 : (depth + depth_part - 1) / depth_part; }
  int64_t parts() const { return row_parts() * depth_parts(); }
  Range row_range(int64_t part) const {
    const int64_t i = part / depth_parts();
    return {i * row_part, rows < (i + 1) * row_part ? rows : (i + 1) * row_part};
  }
  Range depth_range(int64_t part) const {
    const int64_t i = part % depth_parts();
    return {i * depth_part, depth < (i + 1) * depth_part ? depth : (i + 1) * depth_part};
  }
};

// What is left of a projection s = factor * X W^T once it is rounded to a product format: s itself, and its transpose.
struct Projection {
  Block rows;        // [rows, columns]
  Block transposed;  // [columns, rows]; without data where not wanted

  static int64_t bytes(int64_t rows, int64_t columns, Format format, bool transposed);
  static Projection take(Scratch& scratch, int64_t rows, int64_t columns, Format format, bool transposed);
};

// to = factor * X W^T, X [rows, depth] in any float format and with dropout, if given.
void project(const Kernels& level, const Matrix& x, int64_t rows, int64_t depth, const Weight& weight, int64_t columns,
             const Dropout* dropout, float factor, const Projection& to);

// to = factor * the sum of the `parts` blocks of `rows` rows in `sums`, which it overwrites.
void round_projection(const Kernels& level, const Block& sums, int64_t parts, int64_t rows, int64_t columns,
                      float factor, const Projection& to);

// x in `format`, its own or kFloat: itself where it has it, else a copy in `storage`, made by all threads.
Matrix in_format(const Kernels& level, const Matrix& x, int64_t rows, int64_t width, Format format, Scratch& storage);

// to [rows, N] = dy * scale, in a product format.
void scale_columns(const Kernels& level, const Matrix& dy, int64_t rows, const float* scale, int64_t N,
                   const Block& to);

// x in the product format.
Matrix in_product_format(const Kernels& level, const Matrix& x, int64_t rows, int64_t width, Scratch& storage);

}  // namespace burnish
