// sparse_linear and sparse_linear_backward on the CPU: see burnish/ops/sparse_linear.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sparse.h"

namespace burnish {
namespace {

constexpr int64_t kWord = 64;                          // elements that a row of the bitmap is a multiple of
constexpr int64_t kSerialElements = int64_t{1} << 18;  // of the weight: what a second thread must be worth
constexpr int64_t kKeptBytes = 640 << 10;              // of x transposed, which is to stay in L2
constexpr int64_t kTransposed = 256;                   // columns of x that are transposed together
constexpr const char* kContradiction = " of bitmap keeps other elements than row_starts counts";

class Bitmapped : public SparseWeight {
 public:
  Bitmapped(const BitmapWeight& weight, Format format, int64_t N, int64_t K)
      : SparseWeight(N, K), weight_(weight), format_(format) {}

  void take(const Kernels& level, Range rows, Range columns, const Block& out) const override {
    level.expand_bitmap(weight_, format_, rows.begin, rows.size(), columns.begin, columns.size(), out.matrix());
  }
  void give(const Kernels& level, const Block& dense, Range rows, Range columns, void* values,
            Format format) const override {
    level.compress_bitmap(weight_, rows.begin, rows.size(), columns.begin, round_up(columns.size(), 8), dense.matrix(),
                          values, format);
  }

 private:
  const BitmapWeight weight_;
  const Format format_;
};

void check_operands(const char* op, const Tensor& x, const Tensor& values, const Tensor& bitmap,
                    const Tensor& row_starts) {
  check_floating(op, "x", x);
  BURNISH_CHECK(x.dim() >= 1, op, ": x is a scalar, expected at least one dimension");
  check_cpu(op, "values", values);
  check_cpu(op, "bitmap", bitmap);
  check_cpu(op, "row_starts", row_starts);
  BURNISH_CHECK(values.scalar_type() == x.scalar_type(), op, ": values are ", dtype_name(values.scalar_type()),
                ", expected ", dtype_name(x.scalar_type()), " as x is");
  BURNISH_CHECK(values.dim() == 1, op, ": values have shape ", shape_text(values), ", expected [nnz]");
  BURNISH_CHECK(bitmap.scalar_type() == ScalarType::Byte, op, ": bitmap is ", dtype_name(bitmap.scalar_type()),
                ", expected uint8");
  const int64_t K = x.size(x.dim() - 1), width = round_up(K, kWord) / 8;
  BURNISH_CHECK(bitmap.dim() == 2 && bitmap.size(0) >= 1 && bitmap.size(1) == width, op, ": bitmap has shape ",
                shape_text(bitmap), ", expected [N, ", width, "] with N >= 1 for K=", K);
  const int64_t N = bitmap.size(0);
  BURNISH_CHECK(row_starts.scalar_type() == ScalarType::Long, op, ": row_starts is ",
                dtype_name(row_starts.scalar_type()), ", expected int64");
  BURNISH_CHECK(row_starts.dim() == 1 && row_starts.size(0) == N + 1, op, ": row_starts has shape ",
                shape_text(row_starts), ", expected [", N + 1, "]");
  BURNISH_CHECK(values.is_contiguous(), op, ": values are not contiguous, expected compress's result");
  BURNISH_CHECK(bitmap.is_contiguous(), op, ": bitmap is not contiguous, expected compress's result");
  BURNISH_CHECK(row_starts.is_contiguous(), op, ": row_starts is not contiguous, expected compress's result");
}

// Throws unless the rows' starts begin with none of the values and end with all.
void check_ends(const char* op, const Tensor& values, const Tensor& row_starts) {
  const auto* starts = row_starts.const_data_ptr<int64_t>();
  const int64_t last = starts[row_starts.size(0) - 1], nnz = values.size(0);
  BURNISH_CHECK(starts[0] == 0 && last == nnz, op, ": row_starts begins with ", starts[0], " and ends with ", last,
                ", expected 0 and ", nnz, ", the number of values");
}

// The weight with what its kernels for whole rows ask for, in `storage`. Throws unless bitmap, row_starts and the
// number of values say the same: kernels read where they say.
BitmapWeight checked_contents(const char* op, const Tensor& values, const Tensor& bitmap, const Tensor& row_starts,
                              int64_t K, Scratch& storage) {
  check_ends(op, values, row_starts);
  const int64_t N = bitmap.size(0), width = bitmap.size(1), lines = ceil_div(width, kLineBytes);
  const auto* bits = bitmap.const_data_ptr<uint8_t>();
  const auto* starts = row_starts.const_data_ptr<int64_t>();
  storage.reserve(Scratch::bytes<int32_t>(N * lines));
  auto* before = storage.take<int32_t>(N * lines);
  const Kernels& level = kernels();
  std::atomic<int64_t> wrong{N};
  parallel_for(0, N, std::max<int64_t>(1, 131072 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* there = bits + row * width;
      bool beyond = K % 8 != 0 && there[K / 8] >> K % 8 != 0;
      for (int64_t i = (K + 7) / 8; i < width; ++i) beyond = beyond || there[i] != 0;
      int64_t count = 0;
      for (int64_t line = 0; line < lines; ++line) {
        before[row * lines + line] = static_cast<int32_t>(count);
        count += level.count_bits(there + line * kLineBytes, std::min(kLineBytes, width - line * kLineBytes));
      }
      if (beyond || starts[row + 1] - starts[row] != count) {
        wrong = std::min(wrong.load(), row);
      }
    }
  });
  BURNISH_CHECK(wrong == N, op, ": row ", wrong.load(), kContradiction);
  return {values.const_data_ptr(), values.size(0), bits, width, starts, before};
}

// Calls f(begin, end, memory of `spare` bytes) for rows of a weight of `width` columns, by all threads. f returns a row
// whose contents contradict each other, or -1; so does this.
template <class F>
int64_t for_rows(int64_t N, int64_t width, int64_t spare, const F& f) {
  std::atomic<int64_t> wrong{-1};
  const int64_t grain = std::max<int64_t>(1, kSerialElements / kWeightRows / std::max<int64_t>(1, width));
  balanced_for(0, (N + kWeightRows - 1) / kWeightRows, grain, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    scratch.reserve(Scratch::bytes<char>(spare));
    const int64_t found = f(begin * kWeightRows, std::min(end * kWeightRows, N), scratch.take<char>(spare));
    if (found >= 0) wrong = found;
  });
  return wrong;
}

// A few rows of bf16 or fp32; returns a row of the weight whose contents contradict each other, or -1.
int64_t multiply_few_rows(const Operand& x, const BitmapWeight& weight, int64_t N, const Sink& y) {
  static thread_local Scratch padded;
  const Matrix rows = whole_blocks(kernels(), x, x.matrix.format, padded);
  const int64_t width = weight.row_bytes * 8;
  return for_rows(N, width, 4 * (width * size_of(rows.format) + 64), [&](int64_t begin, int64_t end, char* spare) {
    return kernels().sparse_dot(weight, rows, x.rows.count, x.rows.width, begin, end, spare, y);
  });
}

// Vectors of rows of x that are multiplied together: their columns of x transposed stay in L2.
int64_t kept_vectors(const Kernels& level, int64_t rows, int64_t K) {
  const int64_t most = kKeptBytes / (4 * level.lanes * std::max<int64_t>(1, K));
  return std::clamp<int64_t>(most, 1, std::min(kKeptVectors, (rows + level.lanes - 1) / level.lanes));
}

// Whether the kept elements cost less one by one than whole rows do, both in cycles for an element of the weight, as
// measured: a kept one its multiply-adds, every one its part of decoding; a whole row its multiply-adds and expansion.
bool keeps_few(const Operand& x, const BitmapWeight& weight, int64_t N) {
  const Kernels& level = kernels();
  const int64_t M = x.rows.count, K = x.rows.width;
  if (M == 0 || K == 0 || K > kKeptWidth) return false;
  const auto share = static_cast<double>(weight.count) / static_cast<double>(N * K);
  const int64_t vectors = (M + level.lanes - 1) / level.lanes, at_once = kept_vectors(level, M, K);
  const auto passes = static_cast<double>((vectors + at_once - 1) / at_once);
  const bool pairs = level.product_format(x.matrix.format) == Format::kBf16;
  const double one_by_one = 2.3 * share * static_cast<double>(vectors) + 0.1 * passes;
  const double whole = 1.25 * static_cast<double>(M) / static_cast<double>(level.lanes * (pairs ? 2 : 1)) + 0.06;
  return one_by_one < whole && is_finite(x);
}

// Rows of x by the kept elements alone; returns a row of the weight whose contents contradict each other, or -1.
int64_t multiply_kept(const Operand& x, const BitmapWeight& weight, Format format, int64_t N, const Sink& y) {
  static thread_local Scratch storage;
  const Kernels& level = kernels();
  const int64_t M = x.rows.count, K = x.rows.width, vectors = kept_vectors(level, M, K), block = vectors * level.lanes;
  storage.reserve_large(Scratch::bytes<float>(K * block));
  auto* transposed = storage.take<float>(K * block);
  int64_t wrong = -1;
  for (int64_t row = 0; row < M && wrong < 0; row += block) {
    const int64_t rows = std::min(block, M - row), used = (rows + level.lanes - 1) / level.lanes,
                  columns = used * level.lanes;
    parallel_for(0, (K + kTransposed - 1) / kTransposed, std::max<int64_t>(1, 64 / columns),
                 [&](int64_t begin, int64_t end) {
                   static thread_local Scratch scratch;
                   scratch.reserve(Block::bytes(columns, kTransposed, Format::kFloat));
                   const Block copy = Block::take(scratch, columns, kTransposed, Format::kFloat);
                   for (int64_t i = rows; i < columns; ++i) std::fill_n(copy.floats(i), kTransposed, 0.0f);
                   for (int64_t k = begin * kTransposed; k < std::min(end * kTransposed, K); k += kTransposed) {
                     const int64_t width = std::min(kTransposed, K - k);
                     level.take_rows(x.matrix, row, rows, k, width, nullptr, copy.matrix());
                     level.store_transposed(copy.floats(0), copy.stride / 4, columns, width,
                                            into(transposed + k * columns, columns, Format::kFloat));
                   }
                 });
    wrong = for_rows(
        N, weight.row_bytes * 8, sparse_kept_spare(weight.row_bytes), [&](int64_t begin, int64_t end, char* spare) {
          return level.sparse_kept(weight, format, transposed, used, rows, K, begin, end, spare, y.at(row, 0));
        });
  }
  storage.trim();
  return wrong;
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& bitmap, const Tensor& row_starts,
                     const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "sparse_linear";
  static thread_local Scratch floats;
  check_operands(kOp, x, values, bitmap, row_starts);
  const int64_t N = bitmap.size(0), K = x.size(x.dim() - 1);
  check_bias(kOp, bias, N);
  Tensor made = torch::stable::new_empty(x, sizes_with_last(x, N));
  floats.reserve(Scratch::bytes<float>(N));
  const Format format = format_of(x.scalar_type());
  const Operand rows(x);
  const Sink y = all_of(made.mutable_data_ptr(), rows.rows.count, N, format,
                        bias.has_value() ? as_floats(*bias, floats.take<float>(N)) : nullptr);
  const BitmapWeight weight{values.const_data_ptr(),
                            values.size(0),
                            bitmap.const_data_ptr<uint8_t>(),
                            bitmap.size(1),
                            row_starts.const_data_ptr<int64_t>(),
                            nullptr};
  const Kernels& level = kernels();
  const bool few = keeps_few(rows, weight, N);
  if (few || (rows.rows.count <= kFewRowsSparse && format != Format::kFp16 && level.sparse_dot != nullptr)) {
    check_ends(kOp, values, row_starts);
    const int64_t wrong = few ? multiply_kept(rows, weight, format, N, y) : multiply_few_rows(rows, weight, N, y);
    BURNISH_CHECK(wrong < 0, kOp, ": row ", wrong, kContradiction);
  } else {
    static thread_local Scratch storage;
    const BitmapWeight checked = checked_contents(kOp, values, bitmap, row_starts, K, storage);
    sparse_product(rows, Bitmapped(checked, format, N, K), y);
    storage.trim();
  }
  return made;
}

SparseGradients sparse_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values, const Tensor& bitmap,
                                       const Tensor& row_starts, bool x_grad, bool values_grad, bool bias_grad) {
  constexpr const char* kOp = "sparse_linear_backward";
  check_operands(kOp, x, values, bitmap, row_starts);
  check_gradient(kOp, dy, x, bitmap.size(0));
  const int64_t K = x.size(x.dim() - 1);
  static thread_local Scratch storage;
  const BitmapWeight checked = checked_contents(kOp, values, bitmap, row_starts, K, storage);
  const Bitmapped weight(checked, format_of(x.scalar_type()), bitmap.size(0), K);
  const SparseGradients made = sparse_backward(dy, x, weight, values, nullptr, {x_grad, values_grad, bias_grad});
  storage.trim();
  return made;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&burnish::sparse_linear));
  m.impl("sparse_linear.inference", TORCH_BOX(&burnish::sparse_linear));
  m.impl("sparse_linear_backward", TORCH_BOX(&burnish::sparse_linear_backward));
}
