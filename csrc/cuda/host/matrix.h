// The matrix instructions of ptx.cuh. One computation per warp: the lanes' words become matrices, as ptx.cuh lays them
// out, and the product goes back into words. Floating-point products are exact and summed in float64, with one rounding
// at the end; a tensor core rounds inside the sum, in ways of its own.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstring>

#include "cuda/host/machine.h"
#include "math/half.h"

namespace burnish {
namespace host {

double exact(auto half) { return to_float(half); }
uint32_t exact(std::integral auto byte) { return static_cast<uint32_t>(byte); }

// Copies the parts of a matrix that a lane holds to its fragment, or from there. All fragments are made of tiles of
// eight rows, first down the matrix, then along it; of each, lane 4 g + t holds a part of row g, the t-th of four: a
// word, or two sums.
enum class To { kMatrix, kFragment };
template <To to, class T, int Rows, int Columns>
void copy_parts(T (&matrix)[Rows][Columns], auto* fragment, unsigned lane) {
  constexpr int kValues = sizeof(T) == 1 ? 4 : 2, kWords = kValues * sizeof(T) / 4;
  for (int i = 0; i < Rows * Columns / (32 * kValues); ++i) {
    T* part = &matrix[lane / 4 + i * 8 % Rows][(lane % 4 + i * 8 / Rows * 4) * kValues];
    if constexpr (to == To::kMatrix) std::memcpy(part, fragment + i * kWords, kWords * 4);
    if constexpr (to == To::kFragment) std::memcpy(fragment + i * kWords, part, kWords * 4);
  }
}

// sums[16][8] += a[16][N] * b[8][K]^T, where the i-th value in a row of a stands at column(row, i) of K.
template <class A, class B, class Sum, int N, int K>
void multiply(const A (&a)[16][N], const B (&b)[8][K], Sum (&sums)[16][8], const auto& column) {
  for (int row = 0; row < 16; ++row) {
    decltype(exact(A())) sum[8];
    std::copy_n(sums[row], 8, sum);
    for (int i = 0; i < N; ++i) {
      const int k = column(row, i);
      for (int j = 0; j < 8; ++j) sum[j] += exact(a[row][i]) * exact(b[j][k]);
    }
    std::copy_n(sum, 8, sums[row]);
  }
}

// Where the i-th kept value in a row of 16 stands among the columns, as mma_sparse has it; word(lane) is a lane's
// `kept`.
template <class A, int Selector>
int kept_column(const char* name, const auto& word, int row, int i, Where where) {
  constexpr bool kWide = sizeof(A) == 2;
  // which lane of the row's four has the digits of these four values, and from which bit on
  const int four = i / 2, from = row % 8 * 4 + (kWide ? Selector * 2 + four / 4 : row / 8 + four / 8 * 2);
  const uint32_t digits = word(from) >> (kWide ? row / 8 * 16 + four % 4 * 4 : four % 8 * 4);
  const int first = digits & 3, second = digits >> 2 & 3;
  if (first >= second) stop(where, name, ": the places of two kept values do not ascend");
  return four * 4 + (i % 2 == 0 ? first : second);
}

// A lane's words of a product, where they are; `kept` as mma_sparse has it.
template <class Sum>
struct Operands {
  Sum* sum;
  const uint32_t *a, *b;
  uint32_t kept;
};

// What mma and mma_sparse share; column(lanes, row, i) of all lanes' operands.
template <class A, class B, int N, int K, class Sum>
void product(const char* name, const Operands<Sum>& mine, Where where, const auto& column) {
  const auto compute = [&](const auto& lanes) {
    A a[16][N];
    B b[8][K];
    Sum sums[16][8];
    for (unsigned i = 0; i < 32; ++i) {
      copy_parts<To::kMatrix>(a, lanes[i]->a, i);
      copy_parts<To::kMatrix>(b, lanes[i]->b, i);
      copy_parts<To::kMatrix>(sums, lanes[i]->sum, i);
    }
    multiply(a, b, sums, [&](int row, int i) { return column(lanes, row, i); });
    for (unsigned i = 0; i < 32; ++i) copy_parts<To::kFragment>(sums, lanes[i]->sum, i);
    count_event("mma");
  };
  collective(name, {kFullWarp, where}, mine, compute, true);
}

// ldmatrix: lane 8 i + r brings row r of tile i.
template <int Count>
void load_tiles(const char* name, uint32_t (&tile)[Count], const void* row, bool transposed, Where where) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  struct Lane {
    const void* row;
    uint32_t* tile;
  };
  if (lane() < 8 * Count) access(Access::kMatrixLoad, row, 16, where);
  const auto compute = [&](const auto& lanes) {
    uint16_t tiles[8][8 * Count];
    for (unsigned i = 0; i < 8 * Count; ++i) {
      uint16_t values[8];
      std::memcpy(values, lanes[i]->row, sizeof values);
      for (unsigned j = 0; j < 8; ++j) tiles[transposed ? j : i % 8][i / 8 * 8 + (transposed ? i % 8 : j)] = values[j];
    }
    for (unsigned i = 0; i < 32; ++i) copy_parts<To::kFragment>(tiles, lanes[i]->tile, i);
  };
  collective(name, {kFullWarp, where}, Lane{row, tile}, compute, true);
}

}  // namespace host

void load_matrix(auto& tile, const void* row, host::Where where = host::Where::current()) {
  host::load_tiles("load_matrix", tile, row, false, where);
}

void load_matrix_transposed(auto& tile, const void* row, host::Where where = host::Where::current()) {
  host::load_tiles("load_matrix_transposed", tile, row, true, where);
}

template <class A, class B = A, class Sum>
void mma(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], host::Where where = host::Where::current()) {
  static_assert(sizeof(A) == sizeof(B) && std::is_integral_v<A> == std::is_integral_v<Sum>);
  constexpr int K = 32 / sizeof(A);
  host::product<A, B, K, K, Sum>("mma", {sum, a, b, 0}, where, [](const auto&, int, int i) { return i; });
}

template <class A, int Selector = 0, class Sum>
void mma_sparse(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t kept,
                host::Where where = host::Where::current()) {
  static_assert(std::is_integral_v<A> == std::is_integral_v<Sum> && Selector >= 0 && Selector < int(sizeof(A)));
  constexpr int K = 64 / sizeof(A);
  const auto column = [where](const auto& lanes, int row, int i) {
    return host::kept_column<A, Selector>("mma_sparse", [&](int lane) { return lanes[lane]->kept; }, row, i, where);
  };
  host::product<A, A, K / 2, K, Sum>("mma_sparse", {sum, a, b, kept}, where, column);
}

}  // namespace burnish
