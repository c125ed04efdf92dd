#include "cpu/lowrank.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace burnish {
namespace {

constexpr int64_t kGatherRows = 256;  // rows of dy that are read at a time, from L2 the second time
constexpr int64_t kGatherParts = 16;  // of the columns of dy, at most
constexpr int64_t kPartialBytes = int64_t{4} << 20;
constexpr int64_t kTurnedBytes = 256;  // of a row of a transposed weight that are read together
constexpr int64_t kWideRows = 256;     // of a block, which repay packing factors of any rank

}  // namespace

void add_few_rows(const Kernels& level, const std::vector<Term>& terms, int64_t rows, int64_t N, const Sink& y) {
  const Format format = terms[0].weight.matrix.format;
  const auto turns = [](const Term& term) { return term.weight.transposed; };
  const int64_t most = std::any_of(terms.begin(), terms.end(), turns) ? kTurnedBytes / size_of(format) : N;
  int64_t depth = 0;
  for (const Term& term : terms) depth += term.depth;
  const int64_t grain = std::max<int64_t>(16, 32768 / std::max<int64_t>(1, depth));
  parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
    static thread_local Scratch copies;
    const int64_t width = std::min(end - begin, most);
    int64_t bytes = 0;
    for (const Term& term : terms) bytes += turns(term) ? Block::bytes(width, term.depth, format) : 0;
    std::vector<DotTerm> dots;
    for (int64_t n = begin; n < end; n += width) {
      const int64_t columns = std::min(width, end - n);
      copies.reserve(bytes);
      dots.clear();
      for (const Term& term : terms) {
        Matrix weight = term.weight.matrix.at(n, 0);
        if (turns(term)) {
          weight = Block::take(copies, width, term.depth, format).matrix();
          level.turn(term.weight.matrix.at(0, n), term.depth, columns, weight);
        }
        dots.push_back({term.x, weight, term.depth});
      }
      level.dot(dots.data(), static_cast<int64_t>(dots.size()), rows, columns, y.at(0, n));
    }
    copies.trim();
  });
}

namespace {

// One reading of dy [M, N]: t = factor * dy B, and dB = dy^T s, dbias = sum of dy where they are wanted.
void gather(const Kernels& level, const Matrix& dy, int64_t M, const Factors& factors, const Projection* s,
            const Projection& t, void* dB, float* dbias) {
  static thread_local Scratch scratch;
  const int64_t N = factors.outputs(), R = factors.rank();
  const int64_t most = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, M * R * 4));
  const int64_t parts = std::min({kGatherParts, (N + 63) / 64, most});
  scratch.reserve(Block::bytes(parts * M, R, Format::kFloat) + Block::bytes(R, N, Format::kFloat) +
                  Scratch::bytes<double>(N));
  const Block partial = Block::take(scratch, parts * M, R, Format::kFloat);
  const Block pulled = Block::take(scratch, R, N, Format::kFloat);
  auto* sums = scratch.take<double>(N);
  std::fill(sums, sums + N, 0.0);
  const int64_t width = round_up((N + parts - 1) / parts, 64);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Range n{std::min(part * width, N), std::min((part + 1) * width, N)};
      for (int64_t row = 0; row < M || row == 0; row += kGatherRows) {
        const int64_t rows = std::min(kGatherRows, M - row);
        const Sink to = sums_of(partial.floats(part * M + row), partial.stride / 4, false);
        add_products(level, {{dy.at(row, n.begin), {factors.B.matrix.at(n.begin, 0), true}, n.size()}}, rows, {0, R},
                     to);
        if (dbias != nullptr) level.add_columns(dy.at(row, n.begin), rows, n.size(), sums + n.begin);
        if (s == nullptr) continue;
        const Term gathered{s->transposed.matrix().at(0, row), {dy.at(row, 0), true}, rows};
        add_products(level, {gathered}, R, n, pulled.sums(row > 0));
      }
      if (dB != nullptr) {
        const Format format = factors.B.matrix.format;
        level.store_transposed(pulled.floats(0) + n.begin, pulled.stride / 4, R, n.size(),
                               into(static_cast<char*>(dB) + n.begin * R * size_of(format), R, format));
      }
      if (dbias != nullptr) std::copy(sums + n.begin, sums + n.end, dbias + n.begin);
    }
  });
  round_projection(level, partial, parts, M, R, factors.factor, t);
  scratch.trim();
}

}  // namespace

Operand::Operand(const Tensor& tensor)
    : rows(as_rows(tensor)),
      matrix{rows.tensor.const_data_ptr(), rows.stride * size_of(format_of(tensor.scalar_type())),
             format_of(tensor.scalar_type())} {}

void check_factors(const char* op, const Tensor& x, const Tensor& A, const Tensor& B) {
  check_floating(op, "x", x);
  BURNISH_CHECK(x.dim() >= 1, op, ": x is a scalar, expected at least one dimension");
  const int64_t K = x.size(x.dim() - 1);
  for (const auto& [name, factor] : {std::pair{"A", &A}, std::pair{"B", &B}}) {
    check_cpu(op, name, *factor);
    BURNISH_CHECK(factor->scalar_type() == x.scalar_type(), op, ": ", name, " is ", dtype_name(factor->scalar_type()),
                  ", expected ", dtype_name(x.scalar_type()), " as x is");
  }
  BURNISH_CHECK(A.dim() == 2 && A.size(0) >= 1, op, ": A has shape ", shape_text(A), ", expected [R, K] with R >= 1");
  BURNISH_CHECK(A.size(1) == K, op, ": A has shape ", shape_text(A), ", expected [R, ", K, "]");
  BURNISH_CHECK(B.dim() == 2 && B.size(0) >= 1, op, ": B has shape ", shape_text(B), ", expected [N, R] with N >= 1");
  BURNISH_CHECK(B.size(1) == A.size(0), op, ": B has shape ", shape_text(B), ", expected [N, ", A.size(0),
                "] for A's rank ", A.size(0));
}

void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t N) {
  if (!bias.has_value()) return;
  check_floating(op, "bias", *bias);
  BURNISH_CHECK(bias->dim() == 1 && bias->size(0) == N, op, ": bias has shape ", shape_text(*bias), ", expected [", N,
                "]");
}

void check_gradient(const char* op, const Tensor& dy, const Tensor& x, int64_t N) {
  check_cpu(op, "dy", dy);
  BURNISH_CHECK(dy.scalar_type() == x.scalar_type(), op, ": dy is ", dtype_name(dy.scalar_type()), ", expected ",
                dtype_name(x.scalar_type()), " as x is");
  const std::vector<int64_t> expected = sizes_with_last(x, N);
  BURNISH_CHECK(std::equal(expected.begin(), expected.end(), dy.sizes().begin(), dy.sizes().end()), op,
                ": dy has shape ", shape_text(dy), ", expected x's with N=", N, " last");
}

namespace {

// s, rounded to the product format of x, or to x's own where `as_x`.
Projection project_down(const Kernels& level, const Operand& x, const Factors& factors, bool as_x, bool transposed,
                        Scratch& scratch) {
  const Format format = as_x ? x.matrix.format : level.product_format(x.matrix.format);
  const int64_t M = x.rows.count, R = factors.rank();
  scratch.reserve(Projection::bytes(M, R, format, transposed));
  const Projection made = Projection::take(scratch, M, R, format, transposed);
  project(level, x.matrix, M, x.rows.width, {factors.A.matrix, false}, R, factors.mask(), factors.factor, made);
  return made;
}

// Both products a block of rows at a time, from x to y: each thread packs the factors for its own blocks, which for at
// least `few` rows costs less than to wait for the others in between, and for a quarter of them less than to stand
// idle.
void blocks_of_rows(const Kernels& level, const Operand& x, const Factors& factors, int64_t few, const Sink& y) {
  const int64_t K = x.rows.width, N = factors.outputs(), R = factors.rank();
  parallel_for(0, x.rows.count, few / 4, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t pieces = std::max<int64_t>(1, (end - begin) / kWideRows), most = (end - begin) / pieces + 1;
    scratch.reserve(Block::bytes(most, R, Format::kFloat) + Projection::bytes(most, R, x.matrix.format, false));
    const Block sums = Block::take(scratch, most, R, Format::kFloat);
    const Projection s = Projection::take(scratch, most, R, x.matrix.format, false);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t row = begin + (end - begin) * piece / pieces;
      const int64_t rows = begin + (end - begin) * (piece + 1) / pieces - row;
      add_products(level, {{x.matrix.at(row, 0), {factors.A.matrix, false}, K}}, rows, {0, R}, sums.sums(false));
      round_projection(level, sums, 1, rows, R, factors.factor, s);
      add_products(level, {{s.rows.matrix(), {factors.B.matrix, false}, R}}, rows, {0, N}, y.at(row, 0));
    }
  });
}

}  // namespace

Tensor lowrank_forward(const Tensor& x, const Factors& factors, const Base* base, const std::optional<Tensor>& bias) {
  static thread_local Scratch scratch, floats;
  const Operand from(x);
  const int64_t M = from.rows.count, N = factors.outputs(), R = factors.rank();
  Tensor made = torch::stable::new_empty(x, sizes_with_last(x, N));
  if (M == 0) return made;
  const Kernels& level = kernels();
  floats.reserve(Scratch::bytes<float>(N));
  const float* offset = bias.has_value() ? as_floats(*bias, floats.take<float>(N)) : nullptr;
  const Sink y = all_of(made.mutable_data_ptr(), M, N, from.matrix.format, offset);
  const int64_t block = R <= kNarrow ? kNarrowRows : kWideRows;
  if (base == nullptr && factors.mask() == nullptr && M >= 2 * block &&
      level.product_format(from.matrix.format) == from.matrix.format) {
    blocks_of_rows(level, from, factors, block, y);
    return made;
  }
  const bool few = factors.mask() == nullptr && M <= (base == nullptr ? kFewRows : base->few_rows());
  const Projection s = project_down(level, from, factors, few, false, scratch);
  const Term low{s.rows.matrix(), {factors.B.matrix, false}, R};
  if (base != nullptr) {
    base->forward(level, from, low, y);
  } else if (few) {
    add_few_rows(level, {low}, M, N, y);
  } else {
    add_products_parallel(level, {low}, M, N, y);
  }
  scratch.trim();
  return made;
}

Gradients lowrank_backward(const Tensor& dy, const Tensor& x, const Factors& factors, const Base* base, Wanted wanted) {
  static thread_local Scratch s_scratch, t_scratch, copies;
  const Operand from(x), pulled(dy);
  const int64_t M = from.rows.count, K = from.rows.width, N = factors.outputs(), R = factors.rank();
  const ScalarType type = x.scalar_type();
  Tensor dx = torch::stable::new_empty(x, wanted.x ? sizes_with_last(x, K) : std::vector<int64_t>{0});
  Tensor dA = torch::stable::new_empty(x, wanted.factors ? std::vector<int64_t>{R, K} : std::vector<int64_t>{0}, type);
  Tensor dB = torch::stable::new_empty(x, wanted.factors ? std::vector<int64_t>{N, R} : std::vector<int64_t>{0}, type);
  Tensor dbias = torch::stable::new_empty(x, {wanted.bias ? N : 0}, ScalarType::Float);
  const Kernels& level = kernels();
  const Format product = level.product_format(from.matrix.format);
  const Matrix dz = in_product_format(level, pulled.matrix, M, N, copies);
  std::optional<Projection> s;
  if (wanted.factors) s = project_down(level, from, factors, false, true, s_scratch);
  t_scratch.reserve(Projection::bytes(M, R, product, true));
  const Projection t = Projection::take(t_scratch, M, R, product, true);
  gather(level, dz, M, factors, s.has_value() ? &*s : nullptr, t, wanted.factors ? dB.mutable_data_ptr() : nullptr,
         wanted.bias ? dbias.mutable_data_ptr<float>() : nullptr);
  if (wanted.x) {
    const Term low{t.rows.matrix(), {factors.A.matrix, true}, R};
    const Sink to = all_of(dx.mutable_data_ptr(), M, K, from.matrix.format, nullptr);
    if (base != nullptr) {
      base->backward(level, pulled, low, factors.mask(), to);
    } else {
      add_products_parallel(level, {low}, M, K, to);
    }
  }
  if (wanted.factors) {
    const Sink to = all_of(dA.mutable_data_ptr(), R, K, factors.A.matrix.format, nullptr);
    add_products_parallel(level, {{t.transposed.matrix(), {from.matrix, true, factors.mask()}, M}}, R, K, to);
  }
  s_scratch.trim();
  t_scratch.trim();
  copies.trim();
  return {dx, dA, dB, dbias};
}

}  // namespace burnish
