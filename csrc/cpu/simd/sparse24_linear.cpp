// Rows of x times a 2:4 weight: for each stored weight the element of x that it meets is selected, and only those are
// multiplied.
//
// The metadata of a block, 64 elements of bf16 or 128 of int8, become the indices of a permutation of two registers by
// two operations, which all rows of x share; then each row takes a permutation and a product where a dense weight takes
// two products. Levels without such permutations expand a row of int8 and multiply it as it is; bf16 they leave to the
// products of dense rows.
#include <algorithm>
#include <type_traits>

#include "cpu/simd/element.h"
#include "cpu/simd/level.h"
#include "math/pack.h"
#include "math/sparse24.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int64_t kFinished = 16;  // columns of y that are finished together

}  // namespace

void finish_int8(const Sparse24Int8& args, int64_t row, int64_t column, int64_t count, const int32_t* sums) {
  with_type(args.y_format, [&](auto* type) {
    auto* y = static_cast<decltype(type)>(args.y) + row * args.weight.rows + column;
    for (int64_t n = 0; n < count; n += Vec::kLanes) {
      Vec z = from_int32(sums + n, 0) * (Vec(args.row_scale[row]) * load(args.scale + column + n, count - n));
      if (args.bias != nullptr) z = z + load(args.bias + column + n, count - n);
      store(y + n, z, count - n);
    }
  });
}

namespace {

#if defined(__AVX512BF16__)

constexpr int kWeights = 4;  // rows of the weight side by side
constexpr int kMaxRows = 4;  // of x: 4 x 4 sums, 4 of indices, 4 of values, 2 of x, a selection and three constants
constexpr int64_t kChunkBytes = 4096;  // of a row of x, multiplied with some rows of the weight: four stay in L1

struct Words {
  using Sum = Vec;
  using Out = float;
  static constexpr int64_t kMetadata = 8;  // bytes of a block
  static constexpr int kOffset = 0;        // of x
  struct Lanes {
    uint16_t offset[32], group[32];
    constexpr Lanes() : offset(), group() {
      for (int i = 0; i < 32; ++i) {
        offset[i] = static_cast<uint16_t>(2 * i);
        group[i] = static_cast<uint16_t>(i / 2 * 4);
      }
    }
  };
  // all of the block's metadata in each 64 bits
  static BURNISH_INLINE __m512i metadata(const uint8_t* p) {
    long long word;
    memcpy(&word, p, 8);
    return _mm512_set1_epi64(word);
  }
  static BURNISH_INLINE __m512i low_bits() { return _mm512_set1_epi16(3); }
  static BURNISH_INLINE __m512i select(__m512i low, __m512i index, __m512i high) {
    return _mm512_permutex2var_epi16(low, index, high);
  }
  static BURNISH_INLINE Vec zero() { return Vec(0.0f); }
  static BURNISH_INLINE void multiply_add(Vec& sum, __m512i x, __m512i values) { Pairs::multiply_add(sum, values, x); }
  static BURNISH_INLINE void add_all(const Vec (&sum)[kWeights], float* out) {
    float sums[kWeights];
    add_lanes(sum, sums);
    BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) out[n] += sums[n];
  }
  // the values at places below `count`: a NaN beyond K counts for nothing
  static BURNISH_INLINE __m512i below(__m512i values, __m512i index, int64_t count) {
    return _mm512_maskz_mov_epi16(_mm512_cmplt_epu16_mask(index, _mm512_set1_epi16(static_cast<short>(count))), values);
  }
};

// x is unsigned here, q + 128: each sum is too large by 128 times the sum of the values.
struct Bytes {
  using Sum = __m512i;
  using Out = int32_t;
  static constexpr int64_t kMetadata = 16;
  static constexpr int kOffset = 128;
  struct Lanes {
    uint8_t offset[64], group[64];
    constexpr Lanes() : offset(), group() {
      for (int i = 0; i < 64; ++i) {
        offset[i] = static_cast<uint8_t>(2 * (i % 8));
        group[i] = static_cast<uint8_t>(i / 2 * 4);
      }
    }
  };
  // 16 bits of it for the 8 bytes of each 64 bits
  static BURNISH_INLINE __m512i metadata(const uint8_t* p) {
    return _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static BURNISH_INLINE __m512i low_bits() { return _mm512_set1_epi8(3); }
  static BURNISH_INLINE __m512i select(__m512i low, __m512i index, __m512i high) {
    return _mm512_permutex2var_epi8(low, index, high);
  }
  static BURNISH_INLINE __m512i zero() { return _mm512_setzero_si512(); }
  static BURNISH_INLINE void multiply_add(__m512i& sum, __m512i x, __m512i values) {
    add_byte_products(sum, x, values);
  }
  static BURNISH_INLINE void add_all(const __m512i (&sum)[kWeights], int32_t* out) {
    __m256i half[kWeights];
    BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) {
      half[n] = _mm256_add_epi32(_mm512_castsi512_si256(sum[n]), _mm512_extracti64x4_epi64(sum[n], 1));
    }
    const __m256i both = _mm256_hadd_epi32(_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    auto* to = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), sums));
  }
  // values beyond K meet zeros of q
  static BURNISH_INLINE __m512i below(__m512i values, __m512i, int64_t) { return values; }
};

// A chunk of four rows of the weight; `ahead`, `next`: what may be prefetched into L2 (see dot.cpp), values and
// metadata of the next four.
struct Quad {
  const char* values[kWeights];
  const uint8_t* metadata[kWeights];
  int64_t ahead;
  const uint8_t* next;
};

// out[m][n] += row m of x times row n of the quad, rows of `width` elements; with kExcess, excess[n] += Kind::kOffset
// times the values of row n.
template <class Kind, int MR, bool kExcess>
void tile(const Quad& quad, const char* x, int64_t x_stride, int64_t width, typename Kind::Out* out,
          typename Kind::Out* excess) {
  alignas(64) static constexpr typename Kind::Lanes kLanes;
  const __m512i offset = _mm512_load_si512(kLanes.offset), group = _mm512_load_si512(kLanes.group);
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(Kind::kOffset));
  typename Kind::Sum sum[MR][kWeights], total[kWeights];
  BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) {
    total[n] = Kind::zero();
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) sum[m][n] = Kind::zero();
  }
  constexpr int64_t kBlock = Kind::kMetadata * kStep24;
  const int64_t blocks = width / kBlock, left = width % kBlock;
  const auto step = [&](int64_t block, const uint8_t* const(&metadata)[kWeights], const char* const(&values)[kWeights],
                        auto last) __attribute__((always_inline)) {
    __m512i index[kWeights], value[kWeights];
    BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) {
      const __m512i fields = _mm512_multishift_epi64_epi8(offset, Kind::metadata(metadata[n]));
      index[n] = _mm512_ternarylogic_epi64(fields, Kind::low_bits(), group, 0xea);  // fields & 3 | group
      value[n] = _mm512_loadu_si512(values[n]);
      if constexpr (decltype(last)::value) value[n] = Kind::below(value[n], index[n], left);
      if constexpr (kExcess) Kind::multiply_add(total[n], shift, value[n]);
    }
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      const char* from = x + m * x_stride + block * 128;
      const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 64);
      BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) {
        Kind::multiply_add(sum[m][n], Kind::select(low, index[n], high), value[n]);
      }
    }
  };
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* metadata[kWeights];
    const char* values[kWeights];
    BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) {
      metadata[n] = quad.metadata[n] + block * Kind::kMetadata;
      values[n] = quad.values[n] + block * 64;
      __builtin_prefetch(values[n] + quad.ahead, 0, 2);
    }
    __builtin_prefetch(quad.next + block * Kind::kMetadata * kWeights, 0, 2);
    step(block, metadata, values, std::false_type());
  }
  if (left > 0) {
    const int64_t bytes = (left + kStep24 - 1) / kStep24;
    alignas(64) char copies[kWeights][128] = {};
    const uint8_t* metadata[kWeights];
    const char* values[kWeights];
    for (int n = 0; n < kWeights; ++n) {
      memcpy(copies[n], quad.values[n] + blocks * 64, static_cast<size_t>(bytes * 64 / Kind::kMetadata));
      memcpy(copies[n] + 64, quad.metadata[n] + blocks * Kind::kMetadata, static_cast<size_t>(bytes));
      values[n] = copies[n];
      metadata[n] = reinterpret_cast<const uint8_t*>(copies[n] + 64);
    }
    step(blocks, metadata, values, std::true_type());
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) Kind::add_all(sum[m], out + m * kFinished);
  if constexpr (kExcess) Kind::add_all(total, excess);
}

template <class Kind>
using Tile = void (*)(const Quad&, const char*, int64_t, int64_t, typename Kind::Out*, typename Kind::Out*);

template <class Kind, bool kExcess>
Tile<Kind> tile_of(int64_t rows) {
  static constexpr Tile<Kind> kTable[kMaxRows] = {tile<Kind, 1, kExcess>, tile<Kind, 2, kExcess>,
                                                  tile<Kind, 3, kExcess>, tile<Kind, 4, kExcess>};
  return kTable[rows - 1];
}

// finish(row, column, count, sums) for the product of `rows` rows of x and rows [begin, end) of the weight.
template <class Kind, class Finish>
void multiply(const Sparse24Weight& weight, const char* x, int64_t x_stride, int64_t rows, int64_t begin, int64_t end,
              const Finish& finish) {
  constexpr int64_t kBlocks = kChunkBytes / 128, kChunk = kBlocks * Kind::kMetadata * kStep24;
  const int64_t passes = (rows + kMaxRows - 1) / kMaxRows, value_bytes = weight.row_bytes * 64 / Kind::kMetadata;
  for (int64_t n = begin; n < end; n += kFinished) {
    const int64_t columns = std::min(kFinished, end - n);
    typename Kind::Out excess[kFinished] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
      const Tile<Kind> run = (pass == 0 ? tile_of<Kind, Kind::kOffset != 0> : tile_of<Kind, false>)(last - first);
      typename Kind::Out out[kMaxRows * kFinished] = {};
      for (int64_t chunk = 0; chunk * kChunk < weight.width; ++chunk) {
        const int64_t from = chunk * kBlocks;
        for (int64_t i = 0; i < columns; i += kWeights) {
          Quad quad;
          for (int64_t j = 0; j < kWeights; ++j) {
            const int64_t row = n + std::min(i + j, columns - 1);
            quad.values[j] = static_cast<const char*>(weight.values) + row * value_bytes + from * 64;
            quad.metadata[j] = weight.metadata + row * weight.row_bytes + from * Kind::kMetadata;
          }
          quad.ahead = pass == 0 ? kWeights * value_bytes : 0;
          quad.next = quad.metadata[0] +
                      (pass == 0 ? kWeights * weight.row_bytes + (kWeights - 1) * from * Kind::kMetadata : 0);
          run(quad, x + first * x_stride + chunk * kChunkBytes, x_stride,
              std::min(kChunk, weight.width - chunk * kChunk), out + i, excess + i);
        }
      }
      for (int64_t m = first; m < last; ++m) {
        typename Kind::Out* const sums = out + (m - first) * kFinished;
        if constexpr (Kind::kOffset != 0) {
          for (int64_t i = 0; i < kFinished; ++i) sums[i] -= excess[i];
        }
        finish(m, n, columns, sums);
      }
    }
  }
}

#else

// The product of two rows of int8.
int32_t multiply_bytes(const int8_t* a, const int8_t* b, int64_t count) {
  int32_t total = 0;
  int64_t k = 0;
#if defined(__AVX2__)
  __m256i sum = _mm256_setzero_si256();
  for (; k + 16 <= count; k += 16) {
    const __m256i left = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + k)));
    const __m256i right = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + k)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(left, right));
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  for (const int32_t lane : lanes) total += lane;
#endif
  for (; k < count; ++k) total += a[k] * b[k];
  return total;
}

#endif

}  // namespace

#if defined(__AVX512BF16__)

void sparse24_dot(const Sparse24Weight& weight, const Matrix& x, int64_t rows, int64_t begin, int64_t end,
                  const Sink& y) {
  multiply<Words>(weight, static_cast<const char*>(x.data), x.stride, rows, begin, end,
                  [&](int64_t row, int64_t column, int64_t count, const float* sums) {
                    finish_row(sums, count, y.at(row, column));
                  });
}

void sparse24_int8(const Sparse24Int8& args, int64_t begin, int64_t end, void* spare) {
  if (args.rows > kFewRowsSparse) return sparse24_int8_wide(args, begin, end, spare);
  multiply<Bytes>(args.weight, static_cast<const char*>(args.q), args.q_stride, args.rows, begin, end,
                  [&](int64_t row, int64_t column, int64_t count, const int32_t* sums) {
                    finish_int8(args, row, column, count, sums);
                  });
}

#else

void sparse24_int8(const Sparse24Int8& args, int64_t begin, int64_t end, void* spare) {
  const int64_t width = args.weight.row_bytes * kStep24;
  auto* dense = static_cast<int8_t*>(spare);
  for (int64_t n = begin; n < end; n += kFinished) {
    const int64_t columns = std::min(kFinished, end - n);
    for (int64_t i = 0; i < columns; ++i) expand_bytes(args.weight, n + i, dense + i * width);
    for (int64_t m = 0; m < args.rows; ++m) {
      int32_t sums[kFinished] = {};
      const int8_t* q = static_cast<const int8_t*>(args.q) + m * args.q_stride;
      for (int64_t i = 0; i < columns; ++i) sums[i] = multiply_bytes(q, dense + i * width, width);
      finish_int8(args, m, n, columns, sums);
    }
  }
}

#endif

}  // namespace burnish::BURNISH_ISA
