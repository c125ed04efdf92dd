// The functions of one level, each defined in a file of this folder, and what they share.
#pragma once

#include "cpu/simd/vec.h"

namespace burnish::BURNISH_ISA {

int32_t quantize_row(const void* x, Format format, int64_t width, int64_t padded, int8_t* q, float* scale);
void int8_product(const Int8Product& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
void int8_dx(const Int8Dx& args, int64_t block_begin, int64_t block_end, float* scratch);
void slope_row(const void* dy, Format format, const float* z, int activation, const float* scale, int64_t count,
               float* out);
double peak_int8(int64_t steps);
double peak_fp32(int64_t steps);
double peak_bf16(int64_t steps);
uint64_t read(const void* data, int64_t bytes);

}  // namespace burnish::BURNISH_ISA
