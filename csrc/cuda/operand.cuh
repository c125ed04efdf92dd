// What kernels multiply: rows of bytes, read in units of 16 bytes, whatever their alignment.
#pragma once

#include "cuda/ptx.cuh"
#include "rows.h"

namespace burnish {

// Rows of bytes. Where not `aligned` to 16 bytes in address, stride and width, they are fetched by elements.
struct Operand {
  const unsigned char* data;
  int64_t stride;
  int rows;
  int width;
  bool aligned;
};

// t, or a copy, whose elements lie one after the other from an address that is aligned to 16 bytes.
inline torch::stable::Tensor aligned(const torch::stable::Tensor& t) {
  const torch::stable::Tensor whole = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : torch::stable::clone(whole);
}

inline Operand operand_of(const Rows& rows, int64_t element) {
  const auto address = reinterpret_cast<uintptr_t>(rows.tensor.const_data_ptr());
  const int64_t stride = rows.stride * element, width = rows.width * element;
  const bool aligned = address % 16 == 0 && width % 16 == 0 && (rows.count == 1 || stride % 16 == 0);
  return {static_cast<const unsigned char*>(rows.tensor.const_data_ptr()), stride, static_cast<int>(rows.count),
          static_cast<int>(width), aligned};
}

// The rows, or a copy of them, so that their operand is aligned where its width is, and none lies over another.
inline Rows aligned_rows(const Rows& rows, int64_t element) {
  const bool apart = rows.count == 1 || rows.stride >= rows.width;
  return apart && operand_of(rows, element).aligned ? rows : as_rows(aligned(rows.tensor));
}

// 16 bytes of a row, with zeros from `end` on; none of a row that is not there.
template <class Element>
__device__ Bytes16 by_elements(const Operand& from, int row, int byte, int end) {
  constexpr int kElement = sizeof(Element);
  Bytes16 unit{};
  if (row >= from.rows) return unit;
  const unsigned char* first = from.data + row * from.stride + byte;
#pragma unroll
  for (int i = 0; i < 16; i += kElement) {
    if (byte + i < end) unit.word[i / 4] |= uint32_t{load(reinterpret_cast<const Element*>(first + i))} << i % 4 * 8;
  }
  return unit;
}

}  // namespace burnish
