// What the optimizers' kernels are given: a parameter with all that belongs to it, and what holds for all parameters.
#pragma once

#include <cstdint>

#include "format.h"

namespace burnish {

constexpr int64_t kStateBlock = 256;  // elements that are staged together, and that share the scale of their codes
constexpr int kMostMoments = 3;

enum class Master : int { kNone, kFloat, kSplit };

struct OptimizerTensor {
  int64_t count;
  uint32_t index;  // of the parameter among all
  Format format;
  void* parameter;
  const void* gradient;
  Format gradient_format;
  void* moments[kMostMoments];  // those that there are, one after the other; then null
  float* scales;                // [kinds of moment, blocks], of coded moments
  void* master;                 // floats, or low bytes; or null
  float* average;               // or null
  const uint8_t* mask;          // or null
};

struct OptimizerRule {
  bool coded;  // the moments are 8-bit codes
  Format moments;
  Master master;
  float average_kept, average_taken;  // decay, 1 - decay
  bool random;                        // rounds stochastically
  uint64_t seed;
};

}  // namespace burnish
