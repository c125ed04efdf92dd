// A tensor [..., K] seen as a matrix of rows, each with consecutive elements.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace burnish {

struct Rows {
  torch::stable::Tensor tensor;  // owns the memory: x itself, or a contiguous copy
  int64_t count;
  int64_t width;
  int64_t stride;  // elements from a row to the next
};

// Whether rows are consecutive elements and all lie the same distance apart; sets that distance.
inline bool find_row_stride(const torch::stable::Tensor& x, int64_t& stride) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return false;
  stride = x.size(last);
  int64_t expected = -1;  // no dimension with more than one row seen yet
  for (int64_t i = last - 1; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (expected < 0) {
      stride = x.stride(i);
    } else if (x.stride(i) != expected) {
      return false;
    }
    expected = x.stride(i) * x.size(i);
  }
  return true;
}

// x [..., K] as rows, without a copy where its strides allow.
inline Rows as_rows(const torch::stable::Tensor& x) {
  const int64_t last = x.dim() - 1;
  Rows rows{x, 1, x.size(last), x.size(last)};
  for (int64_t i = 0; i < last; ++i) rows.count *= x.size(i);
  if (rows.count > 0 && !find_row_stride(x, rows.stride)) {
    rows.tensor = torch::stable::contiguous(x);
    rows.stride = rows.width;
  }
  return rows;
}

// The sizes of x with another last dimension, or with none for a negative one.
inline std::vector<int64_t> sizes_with_last(const torch::stable::Tensor& x, int64_t size) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  if (size >= 0) sizes.push_back(size);
  return sizes;
}

}  // namespace burnish
