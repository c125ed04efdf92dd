// Many rows of x times a 2:4 weight of bf16, by its stored half alone.
//
// A register of the weight has 16 stored elements of one row and below them 16 of the next, both of the same 32
// columns: so one permutation of one register of x selects what both meet, and one product multiplies it, where dense
// weights take two. A permutation of two registers, which the few rows of sparse24_linear.cpp take for they have no
// time to arrange weights, costs this kind of CPU as much as the product it saves. Eight rows of the weight are
// arranged a part of the depth at a time and stay in L1 while all rows of x go by.
#include <algorithm>

#include "cpu/simd/element.h"
#include "cpu/simd/level.h"
#include "math/sparse24.h"

#if defined(__AVX512BF16__)

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kPairs = 4;    // of rows of the weight side by side
constexpr int kMaxRows = 5;  // of x: 5 x 4 sums, 4 of indices, 4 of values, x and a selection
constexpr int64_t kOctet = 2 * kPairs;
constexpr int64_t kBlock = 32;          // columns of a register of x
constexpr int64_t kPart = 64 * kBlock;  // columns that are arranged together
constexpr int64_t kFinished = 32;       // columns of y that are finished together: a line
constexpr int64_t kRowBlock = 128;      // rows of x whose part stays in L2

struct Block {
  __m512i index[kPairs], values[kPairs];
};
struct Arranged {
  Block blocks[kPart / kBlock];
  float sums[kRowBlock * kFinished];
};
static_assert(sizeof(Arranged) == kSparse24WideBytes);

// Selected words of a register for a row and the next: bits 2 i of the metadata of both say which of the four of its
// group element i is.
struct Lanes {
  uint16_t offset[32], group[32];
  constexpr Lanes() : offset(), group() {
    for (int i = 0; i < 32; ++i) {
      offset[i] = static_cast<uint16_t>(2 * i);
      group[i] = static_cast<uint16_t>(i % 16 / 2 * 4);
    }
  }
};

// Sixteen stored elements of a row and the metadata that goes with them, or as many as there are.
struct Half {
  __m256i values;
  uint32_t metadata;

  BURNISH_INLINE Half(const char* from, const uint8_t* described) : values(load_words(from, 16)) {
    memcpy(&metadata, described, 4);
  }
  BURNISH_INLINE Half(const char* from, const uint8_t* described, int64_t bytes)
      : values(_mm256_maskz_loadu_epi16(first_lanes(4 * bytes), from)), metadata(0) {
    memcpy(&metadata, described, static_cast<size_t>(bytes));
  }
};

// Rows [row, row + kOctet) of the weight, columns [begin, end); those past its end are its last.
void arrange(const Sparse24Weight& weight, int64_t row, int64_t begin, int64_t end, Arranged& to) {
  alignas(64) static constexpr Lanes kLanes;
  const __m512i offset = _mm512_load_si512(kLanes.offset), group = _mm512_load_si512(kLanes.group);
  const auto join = [&](Half first, Half second, Block& block, int p) __attribute__((always_inline)) {
    const uint64_t metadata = first.metadata | static_cast<uint64_t>(second.metadata) << 32;
    const __m512i fields = _mm512_multishift_epi64_epi8(offset, _mm512_set1_epi64(static_cast<int64_t>(metadata)));
    block.index[p] = _mm512_ternarylogic_epi64(fields, _mm512_set1_epi16(3), group, 0xea);  // fields & 3 | group
    block.values[p] = _mm512_inserti64x4(_mm512_castsi256_si512(first.values), second.values, 1);
  };
  const int64_t blocks = (end - begin) / kBlock, left = (end - begin) % kBlock;
  for (int p = 0; p < kPairs; ++p) {
    const int64_t n = std::min(row + 2 * p, weight.rows - 1), below = n + 1 < weight.rows ? 1 : 0;
    const char* values = static_cast<const char*>(weight.values) + n * weight.row_bytes * kStep24 + begin;
    const uint8_t* metadata = weight.metadata + n * weight.row_bytes + begin / kStep24;
    const char* next = values + below * weight.row_bytes * kStep24;
    const uint8_t* described = metadata + below * weight.row_bytes;
    for (int64_t b = 0; b < blocks; ++b) {
      join({values + b * kBlock, metadata + b * 4}, {next + b * kBlock, described + b * 4}, to.blocks[b], p);
    }
    if (left == 0) continue;
    const int64_t bytes = (left + kStep24 - 1) / kStep24;
    Block& last = to.blocks[blocks];
    join({values + blocks * kBlock, metadata + blocks * 4, bytes},
         {next + blocks * kBlock, described + blocks * 4, bytes}, last, p);
    // a NaN beyond the weight's width counts for nothing
    const __mmask32 within = _mm512_cmplt_epu16_mask(last.index[p], _mm512_set1_epi16(static_cast<short>(left)));
    last.values[p] = _mm512_maskz_mov_epi16(within, last.values[p]);
  }
}

// The lanes of the sums of four pairs, added: eight sums.
BURNISH_INLINE __m256 added(const Vec (&sum)[kPairs]) {
  __m256 pair[kPairs];
  BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) {
    pair[p] = _mm256_hadd_ps(_mm512_castps512_ps256(sum[p].v), _mm512_extractf32x8_ps(sum[p].v, 1));
  }
  const __m256 low = _mm256_hadd_ps(pair[0], pair[1]), high = _mm256_hadd_ps(pair[2], pair[3]);
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// sums[m][n] = or += row m of x times row n of what is arranged.
template <int MR>
void tile(const Arranged& weight, int64_t blocks, const char* x, int64_t x_stride, bool add, float* sums) {
  Vec sum[MR][kPairs];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) { BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) sum[m][p] = Vec(0.0f); }
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i index[kPairs], values[kPairs];
    BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) {
      index[p] = weight.blocks[b].index[p];
      values[p] = weight.blocks[b].values[p];
    }
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      const __m512i row = _mm512_loadu_si512(x + m * x_stride + b * 64);
      BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) {
        Pairs::multiply_add(sum[m][p], values[p], _mm512_permutexvar_epi16(index[p], row));
      }
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    float* const to = sums + m * kFinished;
    const __m256 total = added(sum[m]);
    _mm256_storeu_ps(to, add ? _mm256_add_ps(total, _mm256_loadu_ps(to)) : total);
  }
}

using Tile = void (*)(const Arranged&, int64_t, const char*, int64_t, bool, float*);
constexpr Tile kTiles[kMaxRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>};

// At most kRowBlock rows of x by at most kFinished rows of the weight from `column` on.
void multiply(const Sparse24Weight& weight, const Matrix& x, int64_t rows, int64_t column, int64_t columns,
              Arranged& spare) {
  const int64_t passes = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t k = 0; k < weight.width || k == 0; k += kPart) {
    const int64_t end = std::min(k + kPart, weight.width);
    for (int64_t n = 0; n < columns; n += kOctet) {
      arrange(weight, column + n, k, end, spare);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
        kTiles[last - first - 1](spare, (end - k + kBlock - 1) / kBlock, static_cast<const char*>(x.at(first, k).data),
                                 x.stride, k > 0, spare.sums + first * kFinished + n);
      }
    }
  }
}

}  // namespace

void sparse24_wide(const Sparse24Weight& weight, const Matrix& x, int64_t rows, int64_t begin, int64_t end, void* spare,
                   const Sink& y) {
  auto& arranged = *static_cast<Arranged*>(spare);
  for (int64_t row = 0; row < rows; row += kRowBlock) {
    const int64_t here = std::min(kRowBlock, rows - row);
    for (int64_t n = begin; n < end; n += kFinished) {
      const int64_t columns = std::min(kFinished, end - n);
      multiply(weight, x.at(row, 0), here, n, columns, arranged);
      for (int64_t m = 0; m < here; ++m) finish_row(arranged.sums + m * kFinished, columns, y.at(row + m, n));
    }
  }
}

}  // namespace burnish::BURNISH_ISA

#endif
