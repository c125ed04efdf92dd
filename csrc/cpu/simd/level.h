// The functions of one level, each defined in a file of this folder, and what they share.
#pragma once

#include "cpu/simd/vec.h"

namespace burnish::BURNISH_ISA {

constexpr int kPanelColumns = Vec::kLanes == 16 ? 64 : Vec::kLanes == 8 ? 16 : 8;  // of product.cpp's panels
constexpr int kVectorBytes = Vec::kLanes * 4;

// Columns of a panel with those that fill its last vector.
constexpr int64_t padded_columns(int64_t columns) { return (columns + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes; }

int32_t quantize_row(const void* x, Format format, int64_t width, int64_t padded, int8_t* q, float* scale);
void int8_product(const Int8Product& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
void unpack_int8(const Int8Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t width, const Matrix& out);
void slope_row(const void* dy, Format format, const float* z, int activation, const float* scale, int64_t count,
               float* out);
Format product_format(Format format);
void pack_rows(const Matrix& w, int64_t columns, int64_t depth, void* panel);
void pack_columns(const Matrix& w, int64_t columns, int64_t depth, void* panel);
void turn(const Matrix& from, int64_t rows, int64_t columns, const Matrix& to);
void multiply(const Matrix& x, int64_t rows, const void* panel, int64_t columns, int64_t depth, const Sink& sink,
              const Ahead& ahead);
void multiply_panels(const Matrix& x, int64_t rows, const char* panels, int64_t panel_bytes, int64_t columns,
                     int64_t depth, const Sink& sink);
void dot(const DotTerm* terms, int64_t count, int64_t rows, int64_t columns, const Sink& sink);
void block_product(const BlockProduct& args, int64_t rows, int64_t columns, float* sums, int64_t stride);
void block_dot(const BlockProduct& args, int64_t rows, int64_t columns, const Sink& sink);
void int8_block_product(const BlockProduct& args, int64_t rows, int64_t columns, const float* row_scale,
                        const float* channel_scale, const float* bias, float* out, int64_t stride);
void finish_row(const float* sums, int64_t count, const Sink& sink);
void take_rows(const Matrix& x, int64_t row, int64_t rows, int64_t column, int64_t width, const Dropout* dropout,
               const Matrix& out);
void drop_sums(float* sums, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t width,
               const Dropout& dropout);
void store_transposed(const float* from, int64_t stride, int64_t rows, int64_t columns, const Sink& to);
void add_floats(const float* from, int64_t count, float* to);
void add_columns(const Matrix& x, int64_t rows, int64_t columns, double* sums);
void convert(const float* from, float factor, int64_t count, void* to, Format format);
int64_t count_bits(const uint8_t* bits, int64_t bytes);
void expand_sparse24(const Sparse24Weight& weight, Stored stored, int64_t row, int64_t rows, int64_t column,
                     int64_t width, const Matrix& out);
void expand_bitmap(const BitmapWeight& weight, Format stored, int64_t row, int64_t rows, int64_t column, int64_t width,
                   const Matrix& out);
void compress_sparse24(const Sparse24Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t width,
                       const Matrix& dense, void* values, Format format);
void compress_bitmap(const BitmapWeight& weight, int64_t row, int64_t rows, int64_t column, int64_t width,
                     const Matrix& dense, void* values, Format format);
int64_t sparse_kept(const BitmapWeight& weight, Format format, const float* x, int64_t vectors, int64_t rows,
                    int64_t width, int64_t begin, int64_t end, void* spare, const Sink& y);
void sparse24_int8(const Sparse24Int8& args, int64_t begin, int64_t end, void* spare);
// y of one row and `count` columns from `column` on
void finish_int8(const Sparse24Int8& args, int64_t row, int64_t column, int64_t count, const int32_t* sums);
#if defined(__AVX512BF16__)
int64_t sparse_dot(const BitmapWeight& weight, const Matrix& x, int64_t rows, int64_t width, int64_t begin, int64_t end,
                   void* spare, const Sink& y);
void sparse24_dot(const Sparse24Weight& weight, const Matrix& x, int64_t rows, int64_t begin, int64_t end,
                  const Sink& y);
void sparse24_wide(const Sparse24Weight& weight, Format stored, const Matrix& x, int64_t rows, int64_t begin,
                   int64_t end, void* spare, const Sink& y);
void sparse24_int8_wide(const Sparse24Int8& args, int64_t begin, int64_t end, void* spare);
constexpr int64_t kSparse24Offset = 128;
#else
void expand_bytes(const Sparse24Weight& weight, int64_t row, int8_t* out);  // a row of int8 as it is
constexpr decltype(Kernels::sparse_dot) sparse_dot = nullptr;
constexpr decltype(Kernels::sparse24_dot) sparse24_dot = nullptr;
constexpr decltype(Kernels::sparse24_wide) sparse24_wide = nullptr;
constexpr int64_t kSparse24Offset = 0;
#endif
void adagrad_step(const OptimizerTensor& tensor, const AdagradScalars& scalars, const OptimizerRule& rule,
                  int64_t begin, int64_t end);
void adam_step(const OptimizerTensor& tensor, const AdamScalars& scalars, const OptimizerRule& rule, int64_t begin,
               int64_t end);
void lamb_step(const OptimizerTensor& tensor, const LambScalars& scalars, const OptimizerRule& rule, int64_t begin,
               int64_t end);
void lamb_squares(const OptimizerTensor& tensor, const LambScalars& scalars, const OptimizerRule& rule, int64_t begin,
                  int64_t end, double* squares);
void lion_step(const OptimizerTensor& tensor, const LionScalars& scalars, const OptimizerRule& rule, int64_t begin,
               int64_t end);
void rmsprop_step(const OptimizerTensor& tensor, const RmspropScalars& scalars, const OptimizerRule& rule,
                  int64_t begin, int64_t end);
void sgd_step(const OptimizerTensor& tensor, const SgdScalars& scalars, const OptimizerRule& rule, int64_t begin,
              int64_t end);
double sum_squares(const void* x, Format format, int64_t count);
double peak_int8(int64_t steps);
double peak_fp32(int64_t steps);
double peak_bf16(int64_t steps);
uint64_t read(const void* data, int64_t bytes);

}  // namespace burnish::BURNISH_ISA
