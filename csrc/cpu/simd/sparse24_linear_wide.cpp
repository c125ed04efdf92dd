// Many rows of x times a 2:4 weight, by its stored half alone.
//
// A register of the weight has stored elements of one row and below them those of the next, both of the same columns,
// as many as a register of x has: so one permutation of one register of x selects what both meet, and one product
// multiplies it, where dense weights take two. A permutation of two registers, which the few rows of
// sparse24_linear.cpp take for they have no time to arrange weights, costs this kind of CPU as much as the product it
// saves. Eight rows of the weight are arranged a part of the depth at a time and stay in L1 while all rows of x go by.
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
constexpr int64_t kBlocks = 64;     // registers of x that are a part of the depth
constexpr int64_t kFinished = 32;   // columns of y that are finished together: a line
constexpr int64_t kRowBlock = 128;  // rows of x whose part stays in L2

struct Block {
  __m512i index[kPairs], values[kPairs];
};
template <class Out>
struct Arranged {
  Block blocks[kBlocks];
  Out sums[kRowBlock * kFinished], excess[kFinished];
};
// static_assert(sizeof(Arranged<float>) == kSparse24WideBytes && sizeof(Arranged<int32_t>) == kSparse24WideBytes);

// How the lanes of a register are selected for a row and the next: lane i is stored element i of the row, or of the
// next from the middle on. Bits 2 i of its metadata, of each 64 bits, say which of the four of its group it is.
template <class T>
struct Lanes {
  static constexpr int64_t kColumns = 64 / sizeof(T), kHalf = kColumns / 2;
  T offset[kColumns], group[kColumns];
  constexpr Lanes() : offset(), group() {
    for (int i = 0; i < kColumns; ++i) {
      offset[i] = static_cast<T>(2 * i % 64);
      group[i] = static_cast<T>(i % kHalf / 2 * 4);
    }
  }
};

BURNISH_INLINE __m256i low_half(__m512i a) { return _mm512_castsi512_si256(a); }
BURNISH_INLINE __m512i in_both(uint64_t first, uint64_t second, int64_t columns) {
  return _mm512_set1_epi64(static_cast<int64_t>(first | second << columns));
}

struct FloatSums {
  using Sum = Vec;
  using Out = float;
  static constexpr bool kExcess = false;
  static BURNISH_INLINE Vec zero() { return Vec(0.0f); }
  // The lanes of the sums of four pairs, added: eight sums.
  static BURNISH_INLINE void finish(const Vec (&sum)[kPairs], bool add, float* to) {
    __m256 pair[kPairs];
    BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) {
      pair[p] = _mm256_hadd_ps(_mm512_castps512_ps256(sum[p].v), _mm512_extractf32x8_ps(sum[p].v, 1));
    }
    const __m256 low = _mm256_hadd_ps(pair[0], pair[1]), high = _mm256_hadd_ps(pair[2], pair[3]);
    const __m256 total =
        _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    _mm256_storeu_ps(to, add ? _mm256_add_ps(total, _mm256_loadu_ps(to)) : total);
  }
};

// Stored as T, fp32 or fp16; x is fp32.
template <class T>
struct Singles : FloatSums {
  using Lane = uint32_t;
  using Value = T;
  static BURNISH_INLINE __m512i metadata(uint64_t first, uint64_t second) { return in_both(first, second, 16); }
  static BURNISH_INLINE __m512i threes() { return _mm512_set1_epi32(3); }
  static BURNISH_INLINE __m256i values(const T* from, int64_t count) {
    return low_half(_mm512_castps_si512(load(from, count).v));
  }
  static BURNISH_INLINE __m512i below(__m512i values, __m512i index, int64_t count) {
    return _mm512_maskz_mov_epi32(_mm512_cmplt_epu32_mask(index, _mm512_set1_epi32(static_cast<int>(count))), values);
  }
  static BURNISH_INLINE void multiply_add(Vec& sum, __m512i x, __m512i index, __m512i values) {
    sum.v = _mm512_fmadd_ps(_mm512_castsi512_ps(values), _mm512_permutexvar_ps(index, _mm512_castsi512_ps(x)), sum.v);
  }
};

struct Words : FloatSums {
  using Lane = uint16_t;
  using Value = bf16;
  static BURNISH_INLINE __m512i metadata(uint64_t first, uint64_t second) { return in_both(first, second, 32); }
  static BURNISH_INLINE __m512i threes() { return _mm512_set1_epi16(3); }
  static BURNISH_INLINE __m256i values(const bf16* from, int64_t count) { return load_words(from, count); }
  static BURNISH_INLINE __m512i below(__m512i values, __m512i index, int64_t count) {
    return _mm512_maskz_mov_epi16(_mm512_cmplt_epu16_mask(index, _mm512_set1_epi16(static_cast<short>(count))), values);
  }
  static BURNISH_INLINE void multiply_add(Vec& sum, __m512i x, __m512i index, __m512i values) {
    Pairs::multiply_add(sum, values, _mm512_permutexvar_epi16(index, x));
  }
};

// x is unsigned, q + 128, and 128 where there is none: each sum is too large by 128 times the sum of the values.
struct Bytes {
  using Lane = uint8_t;
  using Value = int8_t;
  using Sum = __m512i;
  using Out = int32_t;
  static constexpr bool kExcess = true;
  static BURNISH_INLINE __m512i zero() { return _mm512_setzero_si512(); }
  static BURNISH_INLINE __m512i metadata(uint64_t first, uint64_t second) {
    return _mm512_mask_set1_epi64(in_both(first, 0, 0), 0xf0, static_cast<int64_t>(second));
  }
  static BURNISH_INLINE __m512i threes() { return _mm512_set1_epi8(3); }
  static BURNISH_INLINE __m256i values(const int8_t* from, int64_t count) {
    if (count >= 32) [[likely]]
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_maskz_loadu_epi8((1u << count) - 1u, from);
  }
  static BURNISH_INLINE __m512i below(__m512i values, __m512i, int64_t) { return values; }
  static BURNISH_INLINE void multiply_add(__m512i& sum, __m512i x, __m512i index, __m512i values) {
    add_byte_products(sum, _mm512_permutexvar_epi8(index, x), values);
  }
  static void excess(const Block* weight, int64_t blocks, bool add, int32_t* to) {
    __m512i sum[kPairs] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      for (int p = 0; p < kPairs; ++p) add_byte_products(sum[p], _mm512_set1_epi8(-128), weight[b].values[p]);
    }
    finish(sum, add, to);
  }
  static BURNISH_INLINE void finish(const __m512i (&sum)[kPairs], bool add, int32_t* to) {
    __m256i pair[kPairs];
    BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) {
      pair[p] = _mm256_hadd_epi32(low_half(sum[p]), _mm512_extracti64x4_epi64(sum[p], 1));
    }
    const __m256i low = _mm256_hadd_epi32(pair[0], pair[1]), high = _mm256_hadd_epi32(pair[2], pair[3]);
    const __m256i total =
        _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
    auto* at = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(at, add ? _mm256_add_epi32(total, _mm256_loadu_si256(at)) : total);
  }
};

// Rows [row, row + kOctet) of the weight, columns [begin, end); those past its end are its last.
template <class Kind>
void arrange(const Sparse24Weight& weight, int64_t row, int64_t begin, int64_t end, Block* to) {
  using L = Lanes<typename Kind::Lane>;
  using Values = const typename Kind::Value*;
  alignas(64) static constexpr L kLanes;
  const __m512i offset = _mm512_load_si512(kLanes.offset), group = _mm512_load_si512(kLanes.group);
  const int64_t row_values = weight.row_bytes * kStep24 / 2;
  const auto join = [&](Values values, const uint8_t* metadata, int64_t below, int64_t bytes, Block& block,
                        int p) __attribute__((always_inline)) {
    uint64_t first = 0, second = 0;
    memcpy(&first, metadata, static_cast<size_t>(bytes));
    memcpy(&second, metadata + below * weight.row_bytes, static_cast<size_t>(bytes));
    const __m512i fields = _mm512_multishift_epi64_epi8(offset, Kind::metadata(first, second));
    block.index[p] = _mm512_ternarylogic_epi64(fields, Kind::threes(), group, 0xea);  // fields & 3 | group
    const __m256i mine = Kind::values(values, bytes * 4), others = Kind::values(values + below * row_values, bytes * 4);
    block.values[p] = _mm512_inserti64x4(_mm512_castsi256_si512(mine), others, 1);
  };
  constexpr int64_t kBytes = L::kColumns / kStep24;
  const int64_t blocks = (end - begin) / L::kColumns, left = (end - begin) % L::kColumns;
  Values values[kPairs];
  const uint8_t* metadata[kPairs];
  int64_t below[kPairs];
  for (int p = 0; p < kPairs; ++p) {
    const int64_t n = std::min(row + 2 * p, weight.rows - 1);
    below[p] = n + 1 < weight.rows ? 1 : 0;
    values[p] = static_cast<Values>(weight.values) + n * row_values + begin / 2;
    metadata[p] = weight.metadata + n * weight.row_bytes + begin / kStep24;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) {
      join(values[p] + b * L::kHalf, metadata[p] + b * kBytes, below[p], kBytes, to[b], p);
    }
  }
  if (left == 0) return;
  Block& last = to[blocks];
  for (int p = 0; p < kPairs; ++p) {
    join(values[p] + blocks * L::kHalf, metadata[p] + blocks * kBytes, below[p], (left + kStep24 - 1) / kStep24, last,
         p);
    // a NaN beyond the weight's width counts for nothing
    last.values[p] = Kind::below(last.values[p], last.index[p], left);
  }
}

// sums[m][n] = or += row m of x times row n of what is arranged.
template <class Kind, int MR>
void tile(const Block* weight, int64_t blocks, const char* x, int64_t x_stride, bool add, typename Kind::Out* sums) {
  typename Kind::Sum sum[MR][kPairs];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) sum[m][p] = Kind::zero();
  }
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i index[kPairs], values[kPairs];
    BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) {
      index[p] = weight[b].index[p];
      values[p] = weight[b].values[p];
    }
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      const __m512i row = _mm512_loadu_si512(x + m * x_stride + b * 64);
      BURNISH_UNROLL for (int p = 0; p < kPairs; ++p) Kind::multiply_add(sum[m][p], row, index[p], values[p]);
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) Kind::finish(sum[m], add, sums + m * kFinished);
}

template <class Kind>
using Tile = void (*)(const Block*, int64_t, const char*, int64_t, bool, typename Kind::Out*);
template <class Kind>
constexpr Tile<Kind> kTiles[kMaxRows] = {tile<Kind, 1>, tile<Kind, 2>, tile<Kind, 3>, tile<Kind, 4>, tile<Kind, 5>};

// At most kRowBlock rows of x by at most kFinished rows of the weight from `column` on.
template <class Kind>
void multiply(const Sparse24Weight& weight, const char* x, int64_t x_stride, int64_t rows, int64_t column,
              int64_t columns, Arranged<typename Kind::Out>& spare) {
  constexpr int64_t kColumns = Lanes<typename Kind::Lane>::kColumns, kPart = kBlocks * kColumns;
  const int64_t passes = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t k = 0; k < weight.width || k == 0; k += kPart) {
    const int64_t end = std::min(k + kPart, weight.width), blocks = (end - k + kColumns - 1) / kColumns;
    for (int64_t n = 0; n < columns; n += kOctet) {
      arrange<Kind>(weight, column + n, k, end, spare.blocks);
      if constexpr (Kind::kExcess) Kind::excess(spare.blocks, blocks, k > 0, spare.excess + n);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
        const Tile<Kind> run = kTiles<Kind>[last - first - 1];
        run(spare.blocks, blocks, x + first * x_stride + k / kColumns * 64, x_stride, k > 0,
            spare.sums + first * kFinished + n);
      }
    }
  }
}

// finish(row, column, count, sums) for the product of `rows` rows of x and rows [begin, end) of the weight.
template <class Kind, class Finish>
void multiply_all(const Sparse24Weight& weight, const void* x, int64_t x_stride, int64_t rows, int64_t begin,
                  int64_t end, void* spare, const Finish& finish) {
  auto& arranged = *static_cast<Arranged<typename Kind::Out>*>(spare);
  for (int64_t row = 0; row < rows; row += kRowBlock) {
    const int64_t here = std::min(kRowBlock, rows - row);
    for (int64_t n = begin; n < end; n += kFinished) {
      const int64_t columns = std::min(kFinished, end - n);
      multiply<Kind>(weight, static_cast<const char*>(x) + row * x_stride, x_stride, here, n, columns, arranged);
      for (int64_t m = 0; m < here; ++m) {
        auto* const sums = arranged.sums + m * kFinished;
        if constexpr (Kind::kExcess) {
          for (int64_t i = 0; i < columns; ++i) sums[i] -= arranged.excess[i];
        }
        finish(row + m, n, columns, sums);
      }
    }
  }
}

}  // namespace

void sparse24_wide(const Sparse24Weight& weight, Format stored, const Matrix& x, int64_t rows, int64_t begin,
                   int64_t end, void* spare, const Sink& y) {
  const auto finish = [&](int64_t row, int64_t column, int64_t count, const float* sums) {
    finish_row(sums, count, y.at(row, column));
  };
  const auto run = [&](auto kind) {
    multiply_all<decltype(kind)>(weight, x.data, x.stride, rows, begin, end, spare, finish);
  };
  switch (stored) {
    case Format::kFloat:
      return run(Singles<float>());
    case Format::kBf16:
      return run(Words());
    case Format::kFp16:
      return run(Singles<fp16>());
  }
}

void sparse24_int8_wide(const Sparse24Int8& args, int64_t begin, int64_t end, void* spare) {
  multiply_all<Bytes>(
      args.weight, args.q, args.q_stride, args.rows, begin, end, spare,
      [&](int64_t row, int64_t column, int64_t count, int32_t* sums) { finish_int8(args, row, column, count, sums); });
}

}  // namespace burnish::BURNISH_ISA

#endif
