// The matrix product of float layers, as the instruction sets implement it (simd/product.cpp, simd/dot.cpp):
//
//   C [rows, columns] = X [rows, depth] W          X by rows, W packed a panel of columns at a time
//
// Elements are multiplied as fp32, or as pairs of bf16 where the processor does that (product_format); sums are fp32.
#pragma once

#include <cstdint>

#include "format.h"

namespace burnish {

// Rows of consecutive elements, `stride` bytes apart.
struct Matrix {
  const void* data;
  int64_t stride;
  Format format;

  Matrix at(int64_t row, int64_t column) const {
    return {static_cast<const char*>(data) + row * stride + column * size_of(format), stride, format};
  }
};

// Memory that a product may prefetch while it computes: `rows` rows of `lines` cache lines each.
struct Ahead {
  const char* next = nullptr;
  int64_t stride = 0;
  int64_t lines = 0;
  int64_t rows = 0;
};

// One of the products X W^T that make a sum, both by rows and of one format.
struct DotTerm {
  Matrix x, w;
  int64_t depth;
};

constexpr int64_t kLineBytes = 64;

// Where a product goes: fp32 sums, or y. With `add`, the sums that are there join. `bias` joins in y.
struct Sink {
  float* sums;
  int64_t sums_stride;  // floats
  bool add;
  void* y;           // null: the result stays in sums
  int64_t y_stride;  // elements
  Format y_format;
  const float* bias;    // or null
  bool stream = false;  // whole lines of y go past the caches; y and its rows begin at lines

  Sink at(int64_t row, int64_t column) const {
    Sink moved = *this;
    if (sums != nullptr) moved.sums += row * sums_stride + column;
    if (y != nullptr) moved.y = static_cast<char*>(y) + (row * y_stride + column) * size_of(y_format);
    if (bias != nullptr) moved.bias += column;
    moved.stream = stream && column * size_of(y_format) % kLineBytes == 0;
    return moved;
  }
};

// Sums without y.
inline Sink sums_of(float* sums, int64_t stride, bool add) {
  return {sums, stride, add, nullptr, 0, Format::kFloat, nullptr};
}

// y alone, `stride` elements from row to row.
inline Sink into(void* y, int64_t stride, Format format) { return {nullptr, 0, false, y, stride, format, nullptr}; }

// All of y [rows, columns], with nothing between its rows. A y of `kStreamed` bytes and more is not read first to be
// written: that costs more than what reads y next saves. In fp32 it gains nothing.
inline Sink all_of(void* y, int64_t rows, int64_t columns, Format format, const float* bias) {
  constexpr int64_t kStreamed = int64_t{512} << 10;
  const int64_t width = columns * size_of(format);
  const bool lines = reinterpret_cast<uintptr_t>(y) % kLineBytes == 0 && width % kLineBytes == 0;
  return {nullptr, 0, false, y, columns, format, bias, format == Format::kBf16 && lines && rows * width >= kStreamed};
}

// A row of dropout: which elements are kept. Bit i of byte g is element 8 g + i.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
};

}  // namespace burnish
