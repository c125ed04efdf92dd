// The floats in a 32-bit word.
#pragma once

#include "cuda/ptx.cuh"
#include "math/half.h"

namespace burnish {

// The fp32 values in a 32-bit word of T; the 16-bit types have two.
template <class T>
struct Word;
template <>
struct Word<float> {
  static constexpr int kElements = 1;
  static __device__ float element(uint32_t word, int) { return bits_float(word); }
};
template <>
struct Word<bf16> {
  static constexpr int kElements = 2;
  static __device__ float element(uint32_t word, int i) { return bits_float(i == 0 ? word << 16 : word & 0xffff0000u); }
};
template <>
struct Word<fp16> {
  static constexpr int kElements = 2;
  static __device__ float element(uint32_t word, int i) { return float_from_fp16(i == 0 ? word : word >> 16); }
};

}  // namespace burnish
