// A few rows of bf16 or fp32 times a bitmap weight: each of its rows is read once, expanded in registers and multiplied
// with all rows of x.
//
// Four rows of the weight run side by side, so that a chunk of x is loaded once for four and the chains of popcounts
// that say where the next values begin overlap. The expansion is one instruction of two operations beside one
// operation of each product: 2.5 cycles for a chunk of 32 elements and one row of x.
#include <algorithm>
#include <bit>

#include "cpu/simd/bitmap.h"
#include "cpu/simd/element.h"
#include "cpu/simd/spread.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512BF16__)

namespace {

constexpr int kWeights = 4;          // rows of the weight side by side
constexpr int kMaxRows = 6;          // of x: 6 x 4 sums, 4 expanded chunks and one of x fit the 32 registers
constexpr int64_t kChunkBytes = 64;  // of elements that are expanded together
constexpr int64_t kFinished = 16;    // columns of y that are finished together

// Four rows of the weight, T: their elements as bits.
template <class T>
struct Quad {
  const T* values[kWeights];
  const uint8_t* bits[kWeights];
};

// What may be prefetched meanwhile into L2 (see dot.cpp), a line now and then.
struct Lines {
  const char* next;
  const char* end;
};

BURNISH_INLINE __m512i expand_chunk(const uint16_t* values, uint32_t bits) {
  return spread_words(_mm512_loadu_si512(values), bits);
}
BURNISH_INLINE __m512i expand_chunk(const uint32_t* values, uint16_t bits) {
  return spread_dwords(_mm512_loadu_si512(values), bits);
}

BURNISH_INLINE void multiply_add(Vec& sum, __m512i weight, __m512i x, uint16_t) { Pairs::multiply_add(sum, weight, x); }
BURNISH_INLINE void multiply_add(Vec& sum, __m512i weight, __m512i x, uint32_t) {
  sum = fma(Vec(_mm512_castsi512_ps(weight)), Vec(_mm512_castsi512_ps(x)), sum);
}

// A bit for each element of a chunk.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint32_t, uint16_t>;

// out[m][n] = row m of x times row n of the quad; `taken`: values that each row used.
template <class T, int MR>
void tile(const Quad<T>& quad, const char* x, int64_t x_stride, int64_t chunks, Lines* lines,
          int64_t (&taken)[kWeights], float* out) {
  Vec sum[MR][kWeights];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) sum[m][n] = Vec(0.0f);
  }
  int64_t at[kWeights] = {};
  for (int64_t c = 0; c < chunks; ++c) {
    __m512i weight[kWeights];
    BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) {
      Bits<T> bits;
      memcpy(&bits, quad.bits[n] + c * sizeof(bits), sizeof(bits));
      weight[n] = expand_chunk(quad.values[n] + at[n], bits);
      at[n] += std::popcount(bits);
    }
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      const __m512i left = _mm512_loadu_si512(x + m * x_stride + c * kChunkBytes);
      BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) multiply_add(sum[m][n], weight[n], left, T());
    }
    BURNISH_UNROLL for (int i = 0; i < 2; ++i) {
      if (lines[i].next < lines[i].end) {
        __builtin_prefetch(lines[i].next, 0, 2);
        __builtin_prefetch(lines[i].next + 64, 0, 2);
        lines[i].next += 128;
      }
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) add_lanes(sum[m], out + m * kFinished);
  std::copy(at, at + kWeights, taken);
}

template <class T>
constexpr void (*kTiles[kMaxRows])(const Quad<T>&, const char*, int64_t, int64_t, Lines*, int64_t (&)[kWeights],
                                   float*) = {tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, 4>, tile<T, 5>, tile<T, 6>};

template <class T>
int64_t dot_rows(const BitmapWeight& weight, const Matrix& x, int64_t rows, int64_t width, int64_t begin, int64_t end,
                 void* spare, const Sink& y) {
  constexpr int64_t kChunk = kChunkBytes / sizeof(T);
  const auto* values = static_cast<const T*>(weight.values);
  const auto* xs = static_cast<const char*>(x.data);
  const int64_t most = weight.row_bytes * 8, chunks = most / kChunk, passes = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t block = begin; block < end; block += kFinished) {
    const int64_t columns = std::min(kFinished, end - block);
    float out[kFewRowsSparse * kFinished];
    for (int64_t n = block; n < block + columns; n += kWeights) {
      const int64_t count = std::min<int64_t>(kWeights, block + columns - n);
      if (!in_order(weight, n, count)) return n;
      Quad<T> quad;
      // whole vectors are read, and a bitmap that contradicts row_starts is found out only at the end of its row
      const bool tail = weight.starts[n + count] + most + kChunk > weight.count;
      for (int64_t i = 0; i < kWeights; ++i) {
        const int64_t row = n + std::min(i, count - 1), start = weight.starts[row],
                      size = weight.starts[row + 1] - start;
        quad.bits[i] = weight.bitmap + row * weight.row_bytes;
        quad.values[i] = values + start;
        if (beyond(quad.bits[i], weight.row_bytes, width)) return row;
        if (!tail) continue;
        if (size != count_bits(quad.bits[i], weight.row_bytes)) return row;
        auto* copy = static_cast<T*>(spare) + i * (most + kChunk);
        std::copy(values + start, values + start + size, copy);
        quad.values[i] = copy;
      }
      const int64_t next = std::min(n + kWeights, end), after = std::min(next + kWeights, end);
      Lines lines[2] = {{reinterpret_cast<const char*>(values + weight.starts[n + count]), nullptr},
                        {reinterpret_cast<const char*>(weight.bitmap + next * weight.row_bytes),
                         reinterpret_cast<const char*>(weight.bitmap + after * weight.row_bytes)}};
      lines[0].end = reinterpret_cast<const char*>(values + weight.starts[after]);
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
        int64_t taken[kWeights];
        kTiles<T>[last - first - 1](quad, xs + first* x.stride, x.stride, chunks, lines, taken,
                                    out + first* kFinished + n - block);
        for (int64_t i = 0; i < count; ++i) {
          if (taken[i] != weight.starts[n + i + 1] - weight.starts[n + i]) return n + i;
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m) finish_row(out + m * kFinished, columns, y.at(m, block));
  }
  return -1;
}

}  // namespace

int64_t sparse_dot(const BitmapWeight& weight, const Matrix& x, int64_t rows, int64_t width, int64_t begin, int64_t end,
                   void* spare, const Sink& y) {
  return (x.format == Format::kBf16 ? dot_rows<uint16_t> : dot_rows<uint32_t>)(weight, x, rows, width, begin, end,
                                                                               spare, y);
}

#endif

}  // namespace burnish::BURNISH_ISA
