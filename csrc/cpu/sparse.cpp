#include "cpu/sparse.h"

#include <algorithm>
#include <atomic>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace burnish {
namespace {

constexpr int64_t kFewRowsDense = 16;  // of x, up to which dense rows are multiplied as they lie
constexpr int64_t kBlockRows = 256;    // of the weight's gradient, made dense together: they stay in L2

}  // namespace

void sparse_product(const Operand& x, const SparseWeight& weight, const Sink& y) {
  const Kernels& level = kernels();
  const int64_t M = x.rows.count, N = weight.N, K = weight.K;
  if (M <= kFewRowsDense) {
    const int64_t blocks = (N + kWeightRows - 1) / kWeightRows;
    return parallel_for(0, blocks, std::max<int64_t>(1, 2048 / std::max<int64_t>(1, K)),
                        [&](int64_t begin, int64_t end) {
                          static thread_local Scratch scratch;
                          scratch.reserve(Block::bytes(kWeightRows, K, x.matrix.format));
                          const Block dense = Block::take(scratch, kWeightRows, K, x.matrix.format);
                          for (int64_t n = begin * kWeightRows; n < std::min(end * kWeightRows, N); n += kWeightRows) {
                            const Range rows{n, std::min(n + kWeightRows, N)};
                            weight.take(level, rows, {0, K}, dense);
                            const DotTerm term{x.matrix, dense.matrix(), K};
                            level.dot(&term, 1, M, rows.size(), y.at(0, n));
                          }
                        });
  }
  static thread_local Scratch scratch;
  const Matrix rows = in_product_format(level, x.matrix, M, K, scratch);
  add_products_parallel(level, {{rows, {rows, false, nullptr, &weight}, K}}, M, N, y);
  scratch.trim();
}

Matrix whole_blocks(const Kernels& level, const Operand& x, Format format, Scratch& storage) {
  const int64_t K = x.rows.width, padded = round_up(K, 64), size = size_of(format);
  if (padded == K && format == x.matrix.format) return x.matrix;
  storage.reserve(Block::bytes(x.rows.count, padded, format));
  const Block copy = Block::take(storage, x.rows.count, padded, format);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, padded));
  parallel_for(0, x.rows.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto* from = static_cast<const char*>(x.matrix.at(row, 0).data);
      char* to = copy.row(row);
      if (format == x.matrix.format) {
        std::copy(from, from + K * size, to);
      } else {
        level.take_rows(x.matrix, row, 1, 0, K, nullptr, {to, copy.stride, format});
      }
      std::fill(to + K * size, to + padded * size, '\0');
    }
  });
  return copy.matrix();
}

namespace {

// Whether no element's exponent, the bits of `mask`, is all ones.
template <class T>
bool has_finite(const void* row, int64_t count, T mask) {
  const auto* elements = static_cast<const T*>(row);
  bool all = true;
  for (int64_t k = 0; k < count; ++k) all &= (elements[k] & mask) != mask;
  return all;
}

}  // namespace

bool is_finite(const Operand& x) {
  std::atomic<bool> finite{true};
  const int64_t M = x.rows.count, K = x.rows.width;
  parallel_for(0, M, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, K)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const void* row = x.matrix.at(m, 0).data;
      const bool all = x.matrix.format == Format::kFloat  ? has_finite<uint32_t>(row, K, 0x7f800000)
                       : x.matrix.format == Format::kBf16 ? has_finite<uint16_t>(row, K, 0x7f80)
                                                          : has_finite<uint16_t>(row, K, 0x7c00);
      if (!all) finite = false;
    }
  });
  return finite;
}

namespace {

// dvalues: dy^T x a block at a time, of which the stored elements are kept.
void pull_values(const Kernels& level, const Matrix& dy, const Matrix& x, int64_t M, const SparseWeight& weight,
                 void* dvalues, Format format) {
  static thread_local Scratch transposed;
  const int64_t N = weight.N, K = weight.K, width = 4 * level.panel_columns;
  transposed.reserve(Block::bytes(N, M, dy.format));
  const Block pulled = Block::take(transposed, N, M, dy.format);
  parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    static thread_local Scratch floats;
    floats.reserve(Block::bytes(M, end - begin, Format::kFloat));
    const Block copy = Block::take(floats, M, end - begin, Format::kFloat);
    for (int64_t row = 0; row < M; ++row) {
      level.slope_row(dy.at(row, begin).data, dy.format, nullptr, 0, nullptr, end - begin, copy.floats(row));
    }
    level.store_transposed(copy.floats(0), copy.stride / 4, M, end - begin,
                           into(pulled.row(begin), pulled.stride / size_of(dy.format), dy.format));
    floats.trim();
  });
  parallel_for(0, (K + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    scratch.reserve(Block::bytes(kBlockRows, width, Format::kFloat));
    const Block dense = Block::take(scratch, kBlockRows, width, Format::kFloat);
    for (int64_t k = begin * width; k < std::min(end * width, K); k += width) {
      const Range columns{k, std::min(k + width, K)};
      for (int64_t n = 0; n < N; n += kBlockRows) {
        const Range rows{n, std::min(n + kBlockRows, N)};
        add_products(level, {{pulled.matrix().at(n, 0), {x.at(0, k), true}, M}}, rows.size(), {0, columns.size()},
                     dense.sums(false));
        for (int64_t i = 0; i < rows.size(); ++i) {
          std::fill(dense.floats(i) + columns.size(), dense.floats(i) + round_up(columns.size(), 8), 0.0f);
        }
        weight.give(level, dense, rows, columns, dvalues, format);
      }
    }
  });
  transposed.trim();
}

// The sums of dy's columns.
void pull_bias(const Kernels& level, const Matrix& dy, int64_t M, int64_t N, float* dbias) {
  parallel_for(0, N, std::max<int64_t>(64, 65536 / std::max<int64_t>(1, M)), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    scratch.reserve(Scratch::bytes<double>(end - begin));
    auto* sums = scratch.take<double>(end - begin);
    std::fill(sums, sums + (end - begin), 0.0);
    level.add_columns(dy.at(0, begin), M, end - begin, sums);
    std::copy(sums, sums + (end - begin), dbias + begin);
  });
}

}  // namespace

SparseGradients sparse_backward(const Tensor& dy, const Tensor& x, const SparseWeight& weight, const Tensor& values,
                                const float* scale, SparseWanted wanted) {
  static thread_local Scratch copies, x_copies;
  const Operand pulled(dy);
  const int64_t M = pulled.rows.count, N = weight.N, K = weight.K;
  const Format format = pulled.matrix.format;
  const std::vector<int64_t> none{0};
  const std::vector<int64_t> kept(values.sizes().begin(), values.sizes().end());
  Tensor dx = torch::stable::new_empty(x, wanted.x ? sizes_with_last(x, K) : none);
  Tensor dvalues = torch::stable::new_empty(x, wanted.values ? kept : none);
  Tensor dbias = torch::stable::new_empty(x, {wanted.bias ? N : 0}, ScalarType::Float);
  const Kernels& level = kernels();
  if (wanted.bias) pull_bias(level, pulled.matrix, M, N, dbias.mutable_data_ptr<float>());
  Matrix dz{};
  if (scale == nullptr) {
    dz = in_product_format(level, pulled.matrix, M, N, copies);
  } else {
    copies.reserve(Block::bytes(M, N, level.product_format(format)));
    const Block scaled = Block::take(copies, M, N, level.product_format(format));
    scale_columns(level, pulled.matrix, M, scale, N, scaled);
    dz = scaled.matrix();
  }
  if (wanted.x) {
    const Sink to = all_of(dx.mutable_data_ptr(), M, K, format, nullptr);
    add_products_parallel(level, {{dz, {dz, true, nullptr, &weight}, N}}, M, K, to);
  }
  if (wanted.values) {
    const Operand from(x);
    const Matrix rows = in_product_format(level, from.matrix, M, K, x_copies);
    pull_values(level, dz, rows, M, weight, dvalues.mutable_data_ptr(), format);
  }
  copies.trim();
  x_copies.trim();
  return {dx, dvalues, dbias};
}

}  // namespace burnish
