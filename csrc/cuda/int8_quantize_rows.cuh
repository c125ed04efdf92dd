// int8_quantize_rows on the GPU, for the kernels that quantise their input by it.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "rows.h"

namespace burnish {

// Writes q [count, padded] with zeros beyond x's width, and scale [count]. Lets a dependent launch start at once.
void quantize_rows(const Rows& x, int8_t* q, int64_t padded, float* scale, cudaStream_t stream);

}  // namespace burnish
