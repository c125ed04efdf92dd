// bsr_linear on the CPU: see burnish/ops/bsr_linear.py. Checks, scratch memory and the cut of work over threads are
// here; the arithmetic is in simd/.
//
// x is packed once, with its rows in the lanes of vectors; the weights are read as they lie. Every output element is
// computed by one thread, in the order of its row's blocks, so results do not depend on the cut.
#include "cpu/bsr_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "cpu/isa.h"

namespace burnish {
namespace {

constexpr int64_t kMaxDepth = 131072;  // of int8 values: int32 sums hold it
constexpr int64_t kBlocks[][2] = {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {1, 16}, {4, 16}};
constexpr int64_t kPanelBytes = int64_t{1} << 20;  // of x, packed together: they stay in L2
constexpr int64_t kFewRows = 4;                    // up to which x is read as it lies
constexpr int64_t kTileRows = 32;                  // outputs that are finished together, at least: whole lines of bf16

const int32_t* check_vector(const char* op, const char* name, const Tensor& tensor, int64_t length,
                            const BlockWeight& w) {
  check_cpu(op, name, tensor);
  BURNISH_CHECK(tensor.scalar_type() == ScalarType::Int, op, ": ", name, " is ", dtype_name(tensor.scalar_type()),
                ", expected int32");
  BURNISH_CHECK(tensor.dim() == 1 && tensor.size(0) == length, op, ": ", name, " has shape ", shape_text(tensor),
                ", expected [", length, "] for N=", w.N, ", K=", w.K, ", ", w.count, " blocks of ", w.bn, "x", w.bk);
  BURNISH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous");
  return tensor.const_data_ptr<int32_t>();
}

// Raises unless `starts` runs from 0 to `count`, never backwards.
void check_starts(const char* op, const char* name, const int32_t* starts, int64_t length, int64_t count) {
  bool ordered = starts[0] == 0 && starts[length] == count;
  for (int64_t i = 0; i < length; ++i) ordered &= starts[i] <= starts[i + 1];
  BURNISH_CHECK(ordered, op, ": ", name, " does not run from 0 to ", count, " without falling");
}

void check_range(const char* op, const char* name, const int32_t* places, int64_t count, int64_t limit) {
  uint32_t most = 0;  // a negative place is a large unsigned one
  for (int64_t i = 0; i < count; ++i) most = std::max(most, static_cast<uint32_t>(places[i]));
  BURNISH_CHECK(count == 0 || static_cast<int64_t>(most) < limit, op, ": ", name,
                " has an index out of range, expected 0 to ", limit - 1);
}

void check_scale(const char* op, const Tensor& scale, int64_t N) {
  check_cpu(op, "scale", scale);
  BURNISH_CHECK(scale.scalar_type() == ScalarType::Float, op, ": scale is ", dtype_name(scale.scalar_type()),
                ", expected fp32");
  BURNISH_CHECK(scale.dim() == 1 && scale.size(0) == N, op, ": scale has shape ", shape_text(scale), ", expected [", N,
                "]");
}

}  // namespace

BlockWeight check_blocks(const char* op, const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                         const Tensor& transposed, const std::optional<Tensor>& scale, int64_t N, bool backward) {
  check_floating(op, "x", x);
  BURNISH_CHECK(x.dim() >= 1, op, ": x is a scalar, expected at least one dimension");
  check_cpu(op, "values", values);
  const bool int8 = scale.has_value();
  const ScalarType type = int8 ? ScalarType::Char : x.scalar_type();
  BURNISH_CHECK(values.scalar_type() == type, op, ": values is ", dtype_name(values.scalar_type()), ", expected ",
                dtype_name(type), int8 ? " as there is a scale" : " as x is, or int8 with a scale");
  const bool known = values.dim() == 3 && std::any_of(std::begin(kBlocks), std::end(kBlocks), [&](const auto& block) {
                       return values.size(1) == block[0] && values.size(2) == block[1];
                     });
  BURNISH_CHECK(known, op, ": values has shape ", shape_text(values),
                ", expected [nnzb, bn, bk] with blocks of 16x16, 32x32, 64x64, 128x128, 1x16, 4x16");
  BURNISH_CHECK(values.is_contiguous(), op, ": values is not contiguous");
  const int64_t K = x.size(x.dim() - 1), count = values.size(0), bn = values.size(1), bk = values.size(2);
  BURNISH_CHECK(N >= 1, op, ": N is ", N, ", expected at least 1");
  BURNISH_CHECK(!int8 || K <= kMaxDepth, op, ": K is ", K, ", expected at most ", kMaxDepth, " with int8 values");
  BlockWeight made{};
  made.values = static_cast<const char*>(values.const_data_ptr());
  made.N = N, made.K = K, made.count = count, made.bn = bn, made.bk = bk;
  made.down = blocks_along(N, bn), made.across = blocks_along(K, bk);
  made.int8 = int8, made.format = format_of(x.scalar_type());
  made.crow = check_vector(op, "crow_indices", crow, made.down + 1, made);
  made.col = check_vector(op, "col_indices", col, count, made);
  made.ccol = check_vector(op, "transposed", transposed, made.across + 1 + 2 * count, made);
  made.row = made.ccol + made.across + 1;
  made.position = made.row + count;
  check_starts(op, "crow_indices", made.crow, made.down, count);
  check_range(op, "col_indices", made.col, count, made.across);
  if (backward) {
    check_starts(op, "transposed", made.ccol, made.across, count);
    check_range(op, "transposed", made.row, count, made.down);
    check_range(op, "transposed", made.position, count, count);
  }
  if (int8) check_scale(op, *scale, N);
  return made;
}

BlockProduct Panels::product(int64_t g) const {
  BlockProduct made{};
  made.panels = data + g * group_bytes();
  made.step_bytes = step_bytes(g);
  made.piece_bytes = steps() * made.step_bytes;
  made.steps = steps();
  made.format = format;
  return made;
}

void Panels::pack(const Kernels& level, const Matrix& x, int64_t g) const {
  char* to = data + g * group_bytes();
  const int64_t count = group_rows(g), whole = padded() / depth;
  if (depth == 4) return level.pack_rows(x.at(g * group, 0), count, whole, to);
  level.pack_rows(x.at(g * group, 0), count, width, to);
  const int64_t packed = blocks_along(width, depth), step = step_bytes(g);
  std::fill(to + packed * step, to + whole * step, char{0});
}

namespace {

// What a forward call has made ready for its rows of blocks.
struct Forward {
  const Kernels& level;
  const BlockWeight& w;
  Panels panels;
  const float* scale;      // [N] of int8 values
  const float* row_scale;  // [rows] of the packed x
  Sink y;                  // [rows, N]
};

// Rows of blocks [first, last) for one group of rows of x, into y.
void multiply(const Forward& f, int64_t first, int64_t last, int64_t g) {
  static thread_local Scratch scratch;
  const BlockWeight& w = f.w;
  const int64_t lanes = f.panels.group, count = f.panels.group_rows(g), most = (last - first) * w.bn;
  const bool converts = !w.int8 && w.format != f.panels.format;
  int64_t longest = 0;
  for (int64_t r = first; r < last; ++r) longest = std::max<int64_t>(longest, w.crow[r + 1] - w.crow[r]);
  const int64_t floats = converts ? longest * w.bn * w.bk : 0;
  scratch.reserve(Scratch::bytes<float>(most * lanes) + Scratch::bytes<float>(floats));
  float* sums = scratch.take<float>(most * lanes);
  float* converted = scratch.take<float>(floats);
  BlockProduct product = f.panels.product(g);
  product.weight_bytes = converts ? w.bn * w.bk * 4 : w.block_bytes();
  product.row_bytes = product.weight_bytes / w.bn;
  const int64_t n = first * w.bn, outputs = std::min(last * w.bn, w.N) - n;
  for (int64_t r = first; r < last; ++r) {
    const int64_t begin = w.crow[r], blocks = w.crow[r + 1] - begin;
    product.weights = w.values + begin * w.block_bytes();
    product.pieces = w.col + begin;
    product.segments = blocks;
    const int64_t at = (r - first) * w.bn, rows = std::min(w.bn, outputs - at);
    if (w.int8) {
      f.level.int8_block_product(product, rows, count, f.row_scale + g * f.panels.group, f.scale + n + at,
                                 f.y.at(0, n + at).bias, sums + at * lanes, lanes);
      continue;
    }
    if (converts) {
      const Matrix from{product.weights, w.bk * size_of(w.format), w.format};
      f.level.take_rows(from, 0, blocks * w.bn, 0, w.bk, nullptr, {converted, w.bk * 4, Format::kFloat});
      product.weights = reinterpret_cast<const char*>(converted);
    }
    f.level.block_product(product, rows, count, sums + at * lanes, lanes);
    for (int64_t i = 0; i < rows && f.y.bias != nullptr; ++i) {
      float* row = sums + (at + i) * lanes;
      for (int64_t m = 0; m < count; ++m) row[m] += f.y.bias[n + at + i];
    }
  }
  f.level.store_transposed(sums, lanes, outputs, count, f.y.at(g * f.panels.group, n));
  scratch.trim();
}

// x + 128 in rows of bytes, zero of x beyond its width.
Matrix quantise(const Kernels& level, const Matrix& x, const Panels& panels, int8_t* q, float* scale) {
  const int64_t stride = panels.padded();
  parallel_for(0, panels.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      int8_t* row = q + m * stride;
      level.quantize_row(x.at(m, 0).data, x.format, panels.width, stride, row, scale + m);
      for (int64_t k = 0; k < stride; ++k) row[k] = static_cast<int8_t>(row[k] ^ -128);
    }
  });
  return {q, stride, Format::kFloat};
}

// All rows of blocks for `rows` rows of x.
void multiply_rows(const Kernels& level, const BlockWeight& w, const Matrix& x, int64_t rows, const float* scale,
                   const Sink& y) {
  static thread_local Scratch scratch, copies;
  const Format format = w.int8 ? Format::kFloat : level.product_format(x.format);
  Panels panels(level, rows, w.K, w.bk, w.int8 ? 4 : format == Format::kBf16 ? 2 : 1, format);
  scratch.reserve(Scratch::bytes<char>(panels.bytes()) + Scratch::bytes<float>(rows + 16) +
                  Scratch::bytes<int8_t>(rows * panels.padded()));
  panels.data = scratch.take<char>(panels.bytes());
  auto* row_scale = scratch.take<float>(rows + 16);
  const Matrix from = w.int8 ? quantise(level, x, panels, scratch.take<int8_t>(rows * panels.padded()), row_scale)
                             : in_product_format(level, x, rows, w.K, copies);
  parallel_for(0, panels.groups(), std::max<int64_t>(1, 65536 / (panels.group * std::max<int64_t>(1, w.K))),
               [&](int64_t begin, int64_t end) {
                 for (int64_t g = begin; g < end; ++g) panels.pack(level, from, g);
               });
  const Forward forward{level, w, panels, scale, row_scale, y};
  const int64_t bundle = std::max<int64_t>(1, kTileRows / w.bn);
  for_blocks(w.crow, w.down, bundle, panels.groups(), w.work(std::min(rows, panels.group)),
             [&](int64_t first, int64_t last, int64_t g) { multiply(forward, first, last, g); });
  scratch.trim();
  copies.trim();
}

// A few rows of x: nothing is packed.
void multiply_few(const Kernels& level, const BlockWeight& w, const Matrix& x, int64_t rows, const Sink& y) {
  static thread_local Scratch scratch;
  const int64_t padded = w.across * w.bk, size = size_of(w.format), bytes = round_up(padded * size, 64);
  Matrix from = x;
  if (padded != w.K) {  // the last block is read whole
    scratch.reserve(Scratch::bytes<char>(rows * bytes));
    auto* copy = scratch.take<char>(rows * bytes);
    for (int64_t m = 0; m < rows; ++m) {
      std::memcpy(copy + m * bytes, x.at(m, 0).data, static_cast<size_t>(w.K * size));
      std::fill(copy + m * bytes + w.K * size, copy + m * bytes + padded * size, char{0});
    }
    from = {copy, bytes, x.format};
  }
  for_blocks(w.crow, w.down, 1, 1, w.work(rows), [&](int64_t first, int64_t last, int64_t) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t begin = w.crow[r];
      BlockProduct product{};
      product.weights = w.values + begin * w.block_bytes();
      product.weight_bytes = w.block_bytes();
      product.row_bytes = w.bk * size;
      product.panels = static_cast<const char*>(from.data);
      product.piece_bytes = w.bk * size;
      product.step_bytes = from.stride;
      product.pieces = w.col + begin;
      product.segments = w.crow[r + 1] - begin;
      product.steps = w.bk;
      product.format = w.format;
      level.block_dot(product, std::min(w.bn, w.N - r * w.bn), rows, y.at(0, r * w.bn));
    }
  });
}

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                  const Tensor& transposed, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                  int64_t N) {
  constexpr const char* kOp = "bsr_linear";
  const BlockWeight w = check_blocks(kOp, x, values, crow, col, transposed, scale, N, false);
  check_bias(kOp, bias, N);
  static thread_local Scratch floats;
  const Operand from(x);
  const int64_t M = from.rows.count;
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, N));
  floats.reserve(2 * Scratch::bytes<float>(N));
  const float* biases = bias.has_value() ? as_floats(*bias, floats.take<float>(N)) : nullptr;
  const float* scales = w.int8 ? as_floats(*scale, floats.take<float>(N)) : nullptr;
  const Kernels& level = kernels();
  const Sink out = all_of(y.mutable_data_ptr(), M, N, from.matrix.format, biases);
  if (M <= kFewRows && !w.int8) {
    if (M > 0) multiply_few(level, w, from.matrix, M, out);
    return y;
  }
  const int64_t group = level.panel_columns, row_bytes = std::max<int64_t>(w.across * w.bk, 1) * 4;
  const int64_t most = std::max<int64_t>(1, kPanelBytes / (row_bytes * group)) * group;
  for (int64_t m = 0; m < M; m += most) {
    multiply_rows(level, w, from.matrix.at(m, 0), std::min(most, M - m), scales, out.at(m, 0));
  }
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("bsr_linear", TORCH_BOX(&burnish::bsr_linear));
  m.impl("bsr_linear.inference", TORCH_BOX(&burnish::bsr_linear));
}
