// The microkernels of one instruction set, as the ops see them: a table of functions, one instance a level.
// simd/*.cpp fill it once per level; isa.h picks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/product.h"
#include "format.h"
#include "math/adagrad.h"
#include "math/adam.h"
#include "math/lamb.h"
#include "math/lion.h"
#include "math/rmsprop.h"
#include "math/sgd.h"
#include "optimizer.h"

namespace burnish {

// Steps blocks [begin, end) of a tensor, kStateBlock elements each.
template <class Scalars>
using StepKernel = void (*)(const OptimizerTensor& tensor, const Scalars& scalars, const OptimizerRule& rule,
                            int64_t begin, int64_t end);

// y = act(float(product) * (row_scale * channel_scale) + bias) on a block of rows and a range of panels.
struct Int8Product {
  const int8_t* q;             // [rows, q_stride], quantised activations, zero from K to round_up(K, 4)
  int64_t q_stride;            // bytes from a row to the next
  const float* row_scale;      // [rows]
  const int32_t* row_offset;   // [rows], 128 * sum(q): what the weights' offset adds to each product
  const uint8_t* weight;       // vnni layout, whole
  int64_t depth;               // round_up(K, 4) / 4
  int64_t channels;            // N
  const float* channel_scale;  // [N]
  const float* bias;           // [N], or null
  const float* addend;         // [rows, addend_stride] for the panels' columns, joins before the activation; or null
  int64_t addend_stride;       // floats
  int activation;              // enum class Activation
  void* y;                     // [rows, N], contiguous
  Format y_format;
};

// int8 weights in the vnni layout, whole.
struct Int8Weight {
  const uint8_t* data;
  int64_t channels;  // N
  int64_t width;     // K
};

// C [rows, columns] = sum over segments of W_s P_s: rows of weights as they lie, by a piece of a packed panel each.
struct BlockProduct {
  const char* weights;    // of the first segment
  int64_t weight_bytes;   // from a segment's to the next
  int64_t row_bytes;      // from a row to the next
  const char* panels;     // pieces [steps, columns] of 32-bit words: a float, two of bf16, four bytes of x + 128
  int64_t piece_bytes;    // from a piece to the next
  int64_t step_bytes;     // from a step to the next
  const int32_t* pieces;  // the piece that each segment meets; null: in order
  int64_t segments;
  int64_t steps;  // of a segment: words of a row of weights
  Format format;  // of weights and panels, a product format
};

// What values of a sparse weight are: floats of a format, or int8.
enum class Stored : int {
  kFloat = static_cast<int>(Format::kFloat),
  kBf16 = static_cast<int>(Format::kBf16),
  kFp16 = static_cast<int>(Format::kFp16),
  kInt8
};

// A weight of any kept elements: a bit each in the bitmap, rows of `row_bytes` whole words of 64.
struct BitmapWeight {
  const void* values;
  int64_t count;  // of values
  const uint8_t* bitmap;
  int64_t row_bytes;
  const int64_t* starts;  // [rows + 1]: where the values of each row begin
  const int32_t* before;  // [rows, lines of kLineBits]: values of a row before each; null where none are asked for
};

// Elements of a bitmap in a cache line.
constexpr int64_t kLineBits = 8 * kLineBytes;

// A 2:4 weight: a byte of metadata for each 8 elements of a row, of which 4 are values.
struct Sparse24Weight {
  const void* values;
  const uint8_t* metadata;
  int64_t row_bytes;  // of metadata
  int64_t rows;       // N
  int64_t width;      // K
};

// y = float(q W^T) * (row_scale * scale) + bias.
struct Sparse24Int8 {
  Sparse24Weight weight;
  const void* q;     // [rows, q_stride]: int8, or uint8 that are greater by sparse24_offset
  int64_t q_stride;  // bytes; a row ends with zeros (or the offset) up to a multiple of 128
  int64_t rows;
  const float* row_scale;  // [rows]
  const float* scale;      // [N]
  const float* bias;       // [N], or null
  void* y;                 // [rows, N], contiguous
  Format y_format;
};

// Rows of x that dot takes at most: a weight is better packed for more. kFewRowsSparse: rows that sparse_dot and
// sparse24_dot take at most.
constexpr int64_t kDotRows = 32, kFewRowsSparse = 24;

struct Kernels {
  const char* name;
  // Quantise `width` consecutive elements; q is written up to `padded`, zero from width on. Returns 128 * sum(q).
  int32_t (*quantize_row)(const void* x, Format format, int64_t width, int64_t padded, int8_t* q, float* scale);
  // Rows [row_begin, row_end) x panels [panel_begin, panel_end).
  void (*int8_product)(const Int8Product& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                       int64_t panel_end);
  // Rows [row, row + rows) of int8 weights, `width` elements from column `column` (a multiple of 4) on, into `out`, a
  // product format.
  void (*unpack_int8)(const Int8Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t width,
                      const Matrix& out);
  // out[i] = dy[i] * act'(z[i]) * (scale ? scale[i] : 1), count elements; z null for no activation.
  void (*slope_row)(const void* dy, Format format, const float* z, int activation, const float* scale, int64_t count,
                    float* out);
  // How the level multiplies elements of a format: kBf16 as pairs where it can, everything else as kFloat.
  Format (*product_format)(Format format);
  int64_t lanes;          // floats of a vector
  int64_t panel_columns;  // columns of a whole panel
  // W's panel: `columns` columns (zero up to a whole vector) by `depth`, from rows [columns, depth] or [depth,
  // columns].
  void (*pack_rows)(const Matrix& w, int64_t columns, int64_t depth, void* panel);
  void (*pack_columns)(const Matrix& w, int64_t columns, int64_t depth, void* panel);
  // to [columns, rows] = from [rows, columns], of one format, whichever.
  void (*turn)(const Matrix& from, int64_t rows, int64_t columns, const Matrix& to);
  // C = X W on one panel. X is in a product format.
  void (*multiply)(const Matrix& x, int64_t rows, const void* panel, int64_t columns, int64_t depth, const Sink& sink,
                   const Ahead& ahead);
  // C of many columns, W packed in panels `panel_bytes` apart: a few rows of X and of C, from end to end.
  void (*multiply_panels)(const Matrix& x, int64_t rows, const char* panels, int64_t panel_bytes, int64_t columns,
                          int64_t depth, const Sink& sink);
  // The sum of `count` terms for at most kDotRows rows of X, each W [columns, depth] as it lies in memory; all of
  // one format, whichever.
  void (*dot)(const DotTerm* terms, int64_t count, int64_t rows, int64_t columns, const Sink& sink);
  // sums [rows, columns], columns written up to a whole vector.
  void (*block_product)(const BlockProduct& args, int64_t rows, int64_t columns, float* sums, int64_t stride);
  // The same for a few columns, which are rows of x in weights' own format, `step_bytes` apart, `steps` elements wide
  // in a piece: at most 128 rows. sink is [columns, rows].
  void (*block_dot)(const BlockProduct& args, int64_t rows, int64_t columns, const Sink& sink);
  // block_product of int8 weights, at most 128 rows: out = float(sum) * (row_scale[column] * channel_scale[row]) +
  // bias[row].
  void (*int8_block_product)(const BlockProduct& args, int64_t rows, int64_t columns, const float* row_scale,
                             const float* channel_scale, const float* bias, float* out, int64_t stride);
  // Rows [row, row + rows) of x, `width` elements from column `column` (a multiple of 8) on, into `out`, a product
  // format, with dropout or without (null).
  void (*take_rows)(const Matrix& x, int64_t row, int64_t rows, int64_t column, int64_t width, const Dropout* dropout,
                    const Matrix& out);
  // sums[i][j] = 0 where element (row + i, column + j) is dropped.
  void (*drop_sums)(float* sums, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t width,
                    const Dropout& dropout);
  // y [columns, rows] of `to` = from [rows, columns], `stride` floats a row; nothing joins.
  void (*store_transposed)(const float* from, int64_t stride, int64_t rows, int64_t columns, const Sink& to);
  void (*add_floats)(const float* from, int64_t count, float* to);  // to[i] += from[i]
  // sums[j] += the sum of column j of x, in double: the cheap way to a sum that rounds once.
  void (*add_columns)(const Matrix& x, int64_t rows, int64_t columns, double* sums);
  // to[i] = from[i] * factor in another format, count elements.
  void (*convert)(const float* from, float factor, int64_t count, void* to, Format format);
  int64_t (*count_bits)(const uint8_t* bits, int64_t bytes);
  // out = rows [row, row + rows) of a weight, `width` elements from column `column` (a multiple of 8) on, in the format
  // that is stored, or a product format.
  void (*expand_sparse24)(const Sparse24Weight& weight, Stored stored, int64_t row, int64_t rows, int64_t column,
                          int64_t width, const Matrix& out);
  void (*expand_bitmap)(const BitmapWeight& weight, Format stored, int64_t row, int64_t rows, int64_t column,
                        int64_t width, const Matrix& out);
  // The same elements of `dense`, fp32, to where `values` has them, of `format` and the shape of the weight's; `width`
  // is a multiple of 8.
  void (*compress_sparse24)(const Sparse24Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t width,
                            const Matrix& dense, void* values, Format format);
  void (*compress_bitmap)(const BitmapWeight& weight, int64_t row, int64_t rows, int64_t column, int64_t width,
                          const Matrix& dense, void* values, Format format);
  // y = x W^T on rows [begin, end) of W, x [rows, width] of bf16 or fp32 with zeros up to the bitmap's width, at most
  // kFewRowsSparse. Returns a row whose contents contradict each other, or -1. `spare`: 4 rows of W, dense, 64 bytes
  // apart. Null where the level has no such kernel.
  int64_t (*sparse_dot)(const BitmapWeight& weight, const Matrix& x, int64_t rows, int64_t width, int64_t begin,
                        int64_t end, void* spare, const Sink& y);
  // The same by the kept elements alone: x is finite, transposed [width, vectors * lanes] and of fp32, its first `rows`
  // columns are wanted; at most kKeptWidth columns of W. `spare`: sparse_kept_spare(row_bytes).
  int64_t (*sparse_kept)(const BitmapWeight& weight, Format format, const float* x, int64_t vectors, int64_t rows,
                         int64_t width, int64_t begin, int64_t end, void* spare, const Sink& y);
  // y = x W^T on rows [begin, end) of 2:4 rows of bf16, x finite, with zeros up to a multiple of 64. Null where the
  // level has no such kernel, as the next.
  void (*sparse24_dot)(const Sparse24Weight& weight, const Matrix& x, int64_t rows, int64_t begin, int64_t end,
                       const Sink& y);
  // The same of any format for more rows of x, in a product format. `spare`: kSparse24WideBytes.
  void (*sparse24_wide)(const Sparse24Weight& weight, Format stored, const Matrix& x, int64_t rows, int64_t begin,
                        int64_t end, void* spare, const Sink& y);
  // On rows [begin, end) of W. `spare`: sparse24_spare(row_bytes) bytes.
  void (*sparse24_int8)(const Sparse24Int8& args, int64_t begin, int64_t end, void* spare);
  int64_t sparse24_offset;
  StepKernel<AdagradScalars> adagrad_step;
  StepKernel<AdamScalars> adam_step;
  StepKernel<LambScalars> lamb_step;
  // squares[0] = the sum of the squares of what the mask keeps in blocks [begin, end), squares[1] = of its update.
  void (*lamb_squares)(const OptimizerTensor& tensor, const LambScalars& scalars, const OptimizerRule& rule,
                       int64_t begin, int64_t end, double* squares);
  StepKernel<LionScalars> lion_step;
  StepKernel<RmspropScalars> rmsprop_step;
  StepKernel<SgdScalars> sgd_step;
  // The sum of the squares of `count` consecutive elements, in double: infinite or NaN where one of them is.
  double (*sum_squares)(const void* x, Format format, int64_t count);
  // Ceilings of one thread: operations of `steps` rounds of register-only work.
  double (*peak_int8)(int64_t steps);
  double (*peak_fp32)(int64_t steps);
  double (*peak_bf16)(int64_t steps);
  uint64_t (*read)(const void* data, int64_t bytes);
};

constexpr int64_t kSparse24WideBytes = ((32 + 16) << 10) + 128;
inline int64_t sparse24_spare(int64_t row_bytes) { return std::max(16 * 8 * row_bytes, kSparse24WideBytes); }

// Vectors of rows of x that sparse_kept takes at most.
constexpr int64_t kKeptVectors = 4;
constexpr int64_t kKeptWidth = int64_t{1} << 16;

inline int64_t sparse_kept_spare(int64_t row_bytes) { return 6 * row_bytes * 8 + 64; }

}  // namespace burnish
