// The matrix instructions of ptx.cuh. One computation per warp: the lanes' words become matrices, as ptx.cuh lays them
// out, and the product goes back into words. Floating-point products are exact and summed in float64, with one rounding
// at the end; a tensor core rounds inside the sum, in ways of its own.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/host/machine.h"
#include "math/half.h"

namespace burnish {
namespace host {

inline double exact(bf16 value) { return to_float(value); }
inline double exact(fp16 value) { return to_float(value); }
inline uint32_t exact(int8_t value) { return static_cast<uint32_t>(value); }
inline uint32_t exact(uint8_t value) { return value; }

// a[16][K] from four words a lane, b[8][K] from two or four.
template <class T, int K>
void gather_a(T (&a)[16][K], const uint32_t* words, int lane) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  for (int i = 0; i < 4; ++i) std::memcpy(&a[lane / 4 + i % 2 * 8][lane % 4 * kPerWord + i / 2 * K / 2], words + i, 4);
}

template <class T, int K>
void gather_b(T (&b)[8][K], const uint32_t* words, int lane) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T)), kEach = 4 * kPerWord;
  for (int i = 0; i < K / kEach; ++i) std::memcpy(&b[lane / 4][lane % 4 * kPerWord + i * kEach], words + i, 4);
}

// What stands at other places than the kept ones is not multiplied, so that an infinity there leaves the sum as it is.
template <class Sum, class A, class B, int K>
void multiply(const A (&a)[16][K], const B (&b)[8][K], const bool (&kept)[16][K], const Sum* const (&c)[32],
              Sum* const (&d)[32]) {
  using Wide = decltype(exact(A()));
  Wide columns[K][8];
  for (int k = 0; k < K; ++k) {
    for (int j = 0; j < 8; ++j) columns[k][j] = exact(b[j][k]);
  }
  for (int row = 0; row < 16; ++row) {
    Wide sum[8];
    for (int j = 0; j < 8; ++j) sum[j] = static_cast<Wide>(c[row % 8 * 4 + j / 2][row / 8 * 2 + j % 2]);
    for (int k = 0; k < K; ++k) {
      if (!kept[row][k]) continue;
      const Wide factor = exact(a[row][k]);
      for (int j = 0; j < 8; ++j) sum[j] += factor * columns[k][j];
    }
    for (int j = 0; j < 8; ++j) d[row % 8 * 4 + j / 2][row / 8 * 2 + j % 2] = static_cast<Sum>(sum[j]);
  }
}

template <class Sum, int Words>
struct Operands {
  uint32_t a[4], b[Words], kept;
  Sum c[4];
};

template <class Sum>
struct Fragment {
  Sum d[4];
};

// What mma and mma_sparse share: expand(ins, a, kept) makes the 16 x K matrix of all lanes' words.
template <class A, class B, int K, class Sum, int Words, class Expand>
void product(const char* name, Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[Words], uint32_t kept,
             Where where, const Expand& expand) {
  using In = Operands<Sum, Words>;
  In in{{}, {}, kept, {}};
  std::memcpy(in.a, a, sizeof in.a);
  std::memcpy(in.b, b, sizeof in.b);
  std::memcpy(in.c, sum, sizeof in.c);
  const auto compute = [&](const In* const* ins, Fragment<Sum>* const* outs) {
    A left[16][K];
    B right[8][K];
    bool there[16][K];
    const Sum* c[32];
    Sum* d[32];
    for (int lane = 0; lane < 32; ++lane) {
      gather_b(right, ins[lane]->b, lane);
      c[lane] = ins[lane]->c;
      d[lane] = outs[lane]->d;
    }
    expand(ins, left, there);
    multiply(left, right, there, c, d);
    count_event("mma");
  };
  const Fragment<Sum> out = collective<Fragment<Sum>>(name, 0xffffffffu, in, where, compute, true);
  std::memcpy(sum, out.d, sizeof out.d);
}

// ldmatrix: lane 8 i + r brings row r of tile i.
template <int Count>
void load_tiles(const char* name, uint32_t (&tile)[Count], const void* row, bool transposed, Where where) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  struct Out {
    uint32_t word[Count];
  };
  if (lane() < 8 * Count) access(Access::kMatrixLoad, row, 16, where);
  const auto compute = [&](const void* const* const* rows, Out* const* outs) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 2 * Count; ++i) {
        const unsigned across = lane / 4, along = lane % 4 * 2 + i % 2;
        const void* from = *rows[i / 2 * 8 + (transposed ? along : across)];
        std::memcpy(reinterpret_cast<uint16_t*>(outs[lane]->word) + i,
                    static_cast<const uint16_t*>(from) + (transposed ? across : along), 2);
      }
    }
  };
  const Out out = collective<Out>(name, 0xffffffffu, row, where, compute, true);
  std::memcpy(tile, out.word, sizeof out.word);
}

}  // namespace host

template <int Count>
void load_matrix(uint32_t (&tile)[Count], const void* row, host::Where where = host::Where::current()) {
  host::load_tiles("load_matrix", tile, row, false, where);
}

template <int Count>
void load_matrix_transposed(uint32_t (&tile)[Count], const void* row, host::Where where = host::Where::current()) {
  host::load_tiles("load_matrix_transposed", tile, row, true, where);
}

template <class A, class B = A, class Sum>
void mma(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], host::Where where = host::Where::current()) {
  static_assert(sizeof(A) == sizeof(B) && std::is_integral_v<A> == std::is_integral_v<Sum>);
  constexpr int K = 32 / static_cast<int>(sizeof(A));
  host::product<A, B, K>("mma", sum, a, b, 0, where, [](const auto* const* ins, A(&left)[16][K], bool (&there)[16][K]) {
    for (int lane = 0; lane < 32; ++lane) host::gather_a(left, ins[lane]->a, lane);
    std::memset(there, true, sizeof there);
  });
}

template <class A, int Selector = 0, class Sum>
void mma_sparse(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t kept,
                host::Where where = host::Where::current()) {
  static_assert(std::is_integral_v<A> == std::is_integral_v<Sum> && Selector >= 0 && Selector < int(sizeof(A)));
  constexpr int K = 64 / static_cast<int>(sizeof(A));
  host::product<A, A, K>(
      "mma_sparse", sum, a, b, kept, where, [&](const auto* const* ins, A(&left)[16][K], bool (&there)[16][K]) {
        A packed[16][K / 2];
        for (int lane = 0; lane < 32; ++lane) host::gather_a(packed, ins[lane]->a, lane);
        std::memset(there, false, sizeof there);
        for (int row = 0; row < 16; ++row) {
          for (int four = 0; four < K / 4; ++four) {
            const bool wide = sizeof(A) == 2;  // which lane of the row's four has the digits of these four values
            const int lane = row % 8 * 4 + (wide ? Selector * 2 + four / 4 : row / 8 + four / 8 * 2);
            const int digits = static_cast<int>(ins[lane]->kept >> (wide ? row / 8 * 16 + four % 4 * 4 : four % 8 * 4));
            const int first = digits & 3, second = digits >> 2 & 3;
            if (first >= second) host::stop("mma_sparse: the places of two kept values do not ascend", where);
            left[row][four * 4 + first] = packed[row][four * 2];
            left[row][four * 4 + second] = packed[row][four * 2 + 1];
            there[row][four * 4 + first] = there[row][four * 4 + second] = true;
          }
        }
      });
}

}  // namespace burnish
