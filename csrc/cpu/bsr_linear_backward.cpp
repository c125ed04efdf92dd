// bsr_linear_backward on the CPU: see burnish/ops/bsr_linear.py.
//
// dx is the forward's product with the blocks of a column, transposed: dy in panels, and each block turned round once
// for all rows of dy. dvalues is one product a block over the rows of dy: dy turned round, and x in panels of its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/bsr_linear.h"

#include "cpu/isa.h"

namespace burnish {
namespace {

constexpr int64_t kTurned = 64;  // columns of dy that are turned round together: they stay in L2

// A call's operands. Products are in `format`: pairs of bf16 need blocks of an even height.
struct Backward {
  const Kernels& level;
  const BlockWeight& w;
  int64_t M;
  Format format;
  int64_t depth() const { return format == Format::kBf16 ? 2 : 1; }
};

// [columns, rows] words = x [rows, columns] in steps of `depth` rows; `words` has storage for the pairs, untransposed.
void turn(const Backward& b, const Matrix& x, int64_t rows, int64_t columns, char* words, char* to) {
  if (b.depth() == 1) return b.level.pack_rows(x, rows, columns, to);
  b.level.pack_columns(x, columns, rows, words);
  b.level.pack_rows({words, round_up(columns, b.level.lanes) * 4, Format::kFloat}, blocks_along(rows, 2), columns, to);
}

// Bytes between the rows that turn makes.
int64_t turned_stride(const Backward& b, int64_t rows) {
  return round_up(blocks_along(rows, b.depth()), b.level.lanes) * 4;
}

// The block at `position`, as [bn, bk] of the product format: itself, or a copy in `storage`, twice as large.
Matrix block_at(const Backward& b, int64_t position, float* storage) {
  const BlockWeight& w = b.w;
  const char* from = w.values + position * w.block_bytes();
  if (!w.int8 && w.format == b.format) return {from, w.bk * size_of(w.format), w.format};
  const Matrix copy{storage, w.bk * size_of(b.format), b.format};
  if (w.int8) {
    const int64_t size = w.bn * w.bk;
    const auto* bytes = reinterpret_cast<const int8_t*>(from);
    std::copy(bytes, bytes + size, storage + size);
    b.level.convert(storage + size, 1.0f, size, storage, b.format);
  } else {
    b.level.take_rows({from, w.bk * size_of(w.format), w.format}, 0, w.bn, 0, w.bk, nullptr, copy);
  }
  return copy;
}

// dx of columns of blocks [first, last), all groups: the blocks turned round once, then multiplied by each group.
void pull(const Backward& b, const Panels& panels, int64_t first, int64_t last, const Sink& dx) {
  static thread_local Scratch scratch;
  const BlockWeight& w = b.w;
  const int64_t stride = turned_stride(b, w.bn), turned = stride * w.bk;
  int64_t longest = 0;
  for (int64_t c = first; c < last; ++c) longest = std::max<int64_t>(longest, w.ccol[c + 1] - w.ccol[c]);
  scratch.reserve(Scratch::bytes<char>(longest * turned) + Scratch::bytes<float>(w.bk * panels.group) +
                  Scratch::bytes<char>(4 * (w.bn * w.bk + w.bk * b.level.lanes)) +
                  Scratch::bytes<float>(2 * w.bn * w.bk));
  char* blocks = scratch.take<char>(longest * turned);
  auto* sums = scratch.take<float>(w.bk * panels.group);
  auto* words = scratch.take<char>(4 * (w.bn * w.bk + w.bk * b.level.lanes));
  auto* storage = scratch.take<float>(2 * w.bn * w.bk);
  for (int64_t c = first; c < last; ++c) {
    const int64_t begin = w.ccol[c], count = w.ccol[c + 1] - begin, outputs = std::min(w.bk, w.K - c * w.bk);
    for (int64_t i = 0; i < count; ++i) {
      turn(b, block_at(b, w.position[begin + i], storage), w.bn, w.bk, words, blocks + i * turned);
    }
    for (int64_t g = 0; g < panels.groups(); ++g) {
      BlockProduct product = panels.product(g);
      product.weights = blocks;
      product.weight_bytes = turned;
      product.row_bytes = stride;
      product.pieces = w.row + begin;
      product.segments = count;
      b.level.block_product(product, outputs, panels.group_rows(g), sums, panels.group);
      b.level.store_transposed(sums, panels.group, outputs, panels.group_rows(g), dx.at(g * panels.group, c * w.bk));
    }
  }
  scratch.trim();
}

// dx [M, K] from dz [M, N] of the product format.
void pull_all(const Backward& b, const Matrix& dz, const Sink& dx) {
  static thread_local Scratch scratch;
  Panels panels(b.level, b.M, b.w.N, b.w.bn, b.depth(), b.format);
  scratch.reserve(Scratch::bytes<char>(panels.bytes()));
  panels.data = scratch.take<char>(panels.bytes());
  parallel_for(0, panels.groups(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) panels.pack(b.level, dz, g);
  });
  for_blocks(b.w.ccol, b.w.across, 1, 1, b.w.work(b.M),
             [&](int64_t first, int64_t last, int64_t) { pull(b, panels, first, last, dx); });
  scratch.trim();
}

// dvalues from dy and x of the product format.
void gather(const Backward& b, const Matrix& dy, const Matrix& x, char* dvalues) {
  static thread_local Scratch scratch;
  const BlockWeight& w = b.w;
  const int64_t steps = blocks_along(b.M, b.depth()), stride = turned_stride(b, b.M);
  const int64_t wide = std::max(w.bn, kTurned), chunks = blocks_along(w.N, wide);
  const int64_t piece = steps * w.bk * 4, size = size_of(w.format);
  scratch.reserve(Scratch::bytes<char>(w.N * stride) + Scratch::bytes<char>(w.across * piece));
  char* turned = scratch.take<char>(w.N * stride);
  char* pieces = scratch.take<char>(w.across * piece);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch words;
    words.reserve(Scratch::bytes<char>(steps * wide * 4));
    char* pairs = words.take<char>(steps * wide * 4);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i * wide;
      turn(b, dy.at(0, n), b.M, std::min(wide, w.N - n), pairs, turned + n * stride);
    }
    words.trim();
  });
  parallel_for(0, w.across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      b.level.pack_columns(x.at(0, c * w.bk), std::min(w.bk, w.K - c * w.bk), b.M, pieces + c * piece);
    }
  });
  for_blocks(w.crow, w.down, 1, 1, w.work(b.M), [&](int64_t first, int64_t last, int64_t) {
    static thread_local Scratch tiles;
    tiles.reserve(Scratch::bytes<float>(w.bn * w.bk));
    auto* sums = tiles.take<float>(w.bn * w.bk);
    for (int64_t r = first; r < last; ++r) {
      for (int64_t i = w.crow[r]; i < w.crow[r + 1]; ++i) {
        const int64_t rows = std::min(w.bn, w.N - r * w.bn), columns = std::min(w.bk, w.K - w.col[i] * w.bk);
        BlockProduct product{};
        product.weights = turned + r * w.bn * stride;
        product.row_bytes = stride;
        product.panels = pieces + w.col[i] * piece;
        product.step_bytes = round_up(columns, b.level.lanes) * 4;
        product.segments = 1;
        product.steps = steps;
        product.format = b.format;
        b.level.block_product(product, rows, columns, sums, w.bk);
        for (int64_t n = 0; n < w.bn; ++n) {
          std::fill(sums + n * w.bk + (n < rows ? columns : 0), sums + (n + 1) * w.bk, 0.0f);
        }
        b.level.convert(sums, 1.0f, w.bn * w.bk, dvalues + i * w.bn * w.bk * size, w.format);
      }
    }
  });
  scratch.trim();
}

// sums[n] = the sum of column n of dy.
void sum_columns(const Kernels& level, const Matrix& dy, int64_t M, int64_t N, float* sums) {
  parallel_for(0, N, std::max<int64_t>(64, 65536 / std::max<int64_t>(1, M)), [&](int64_t begin, int64_t end) {
    std::vector<double> wide(static_cast<size_t>(end - begin));
    level.add_columns(dy.at(0, begin), M, end - begin, wide.data());
    std::copy(wide.begin(), wide.end(), sums + begin);
  });
}

// dy * scale, in `storage`.
Matrix scaled(const Kernels& level, const Matrix& dy, int64_t M, int64_t N, const Tensor& scale, Format format,
              Scratch& storage) {
  storage.reserve(Block::bytes(M, N, format) + Scratch::bytes<float>(N));
  const Block dz = Block::take(storage, M, N, format);
  scale_columns(level, dy, M, as_floats(scale, storage.take<float>(N)), N, dz);
  return dz.matrix();
}

std::tuple<Tensor, Tensor, Tensor> bsr_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                       const Tensor& crow, const Tensor& col, const Tensor& transposed,
                                                       const std::optional<Tensor>& scale, bool x_grad,
                                                       bool values_grad, bool bias_grad) {
  constexpr const char* kOp = "bsr_linear_backward";
  check_floating(kOp, "dy", dy);
  BURNISH_CHECK(dy.dim() >= 1, kOp, ": dy is a scalar, expected at least one dimension");
  const int64_t N = dy.size(dy.dim() - 1);
  const BlockWeight w = check_blocks(kOp, x, values, crow, col, transposed, scale, N, true);
  check_gradient(kOp, dy, x, N);
  BURNISH_CHECK(!w.int8 || !values_grad, kOp, ": values_grad is True, expected False: int8 values are frozen");
  static thread_local Scratch left, right;
  const Operand from(x), pulled(dy);
  const Kernels& level = kernels();
  const int64_t M = from.rows.count, K = w.K;
  Tensor dx = torch::stable::new_empty(x, x_grad ? sizes_with_last(x, K) : std::vector<int64_t>{0});
  Tensor dvalues =
      torch::stable::new_empty(x, values_grad ? std::vector<int64_t>{w.count, w.bn, w.bk} : std::vector<int64_t>{0});
  Tensor dbias = torch::stable::new_empty(x, {bias_grad ? N : 0}, ScalarType::Float);
  const Format format = level.product_format(from.matrix.format);
  if (x_grad) {
    const Backward call{level, w, M, w.bn == 1 ? Format::kFloat : format};
    const Matrix dz = w.int8 ? scaled(level, pulled.matrix, M, N, *scale, call.format, left)
                             : in_format(level, pulled.matrix, M, N, call.format, left);
    pull_all(call, dz, all_of(dx.mutable_data_ptr(), M, K, from.matrix.format, nullptr));
  }
  if (values_grad) {
    const Backward call{level, w, M, format};
    const Matrix dz = in_format(level, pulled.matrix, M, N, format, left);
    gather(call, dz, in_format(level, from.matrix, M, K, format, right),
           static_cast<char*>(dvalues.mutable_data_ptr()));
  }
  if (bias_grad) sum_columns(level, pulled.matrix, M, N, dbias.mutable_data_ptr<float>());
  left.trim();
  right.trim();
  return {dx, dvalues, dbias};
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) { m.impl("bsr_linear_backward", TORCH_BOX(&burnish::bsr_linear_backward)); }
