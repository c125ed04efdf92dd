// The microkernels of one instruction set, as the ops see them: a table of functions, one instance a level.
// simd/*.cpp fill it once per level; isa.h picks.
#pragma once

#include <cstdint>

namespace burnish {

enum class Format : int { kFloat = 0, kBf16 = 1, kFp16 = 2 };

inline int64_t size_of(Format format) { return format == Format::kFloat ? 4 : 2; }

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
  int activation;              // enum class Activation
  void* y;                     // [rows, N], contiguous
  Format y_format;
};

// One row of [from, to) output columns of dx: see int8_dx.
struct Int8Dx {
  const float* dz;        // [rows, dz_stride]: dy * act'(z) * channel_scale, zero from N to round_up(N, 16)
  int64_t dz_stride;      // floats from a row to the next
  int64_t rows;           // M
  const uint8_t* weight;  // vnni layout, whole
  int64_t channels;       // N
  int64_t width;          // K
  void* dx;               // [rows, K], contiguous
  Format dx_format;
};

struct Kernels {
  const char* name;
  // Quantise `width` consecutive elements; q is written up to `padded`, zero from width on. Returns 128 * sum(q).
  int32_t (*quantize_row)(const void* x, Format format, int64_t width, int64_t padded, int8_t* q, float* scale);
  // Rows [row_begin, row_end) x panels [panel_begin, panel_end).
  void (*int8_product)(const Int8Product& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                       int64_t panel_end);
  // Column blocks of 64 [block_begin, block_end) of dx, all rows. scratch: int8_dx_scratch(rows) floats.
  void (*int8_dx)(const Int8Dx& args, int64_t block_begin, int64_t block_end, float* scratch);
  // out[i] = dy[i] * act'(z[i]) * (scale ? scale[i] : 1), count elements; z null for no activation.
  void (*slope_row)(const void* dy, Format format, const float* z, int activation, const float* scale, int64_t count,
                    float* out);
  // Ceilings of one thread: operations of `steps` rounds of register-only work.
  double (*peak_int8)(int64_t steps);
  double (*peak_fp32)(int64_t steps);
  double (*peak_bf16)(int64_t steps);
  uint64_t (*read)(const void* data, int64_t bytes);
};

inline int64_t int8_dx_scratch(int64_t rows) { return 64 * 64 + rows * 64; }

}  // namespace burnish
