// A few rows of bf16 times a bitmap weight: each of its rows is read once, expanded in registers and multiplied with
// all rows of x.
//
// Four rows of the weight run side by side, so that a chunk of x is loaded once for four and the chains of popcounts
// that say where the next values begin overlap. The expansion is one instruction of two operations beside one
// operation of each product: 2.5 cycles for a chunk of 32 elements and one row of x.
#include <algorithm>
#include <bit>

#include "cpu/simd/element.h"
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512BF16__)

namespace {

constexpr int kWeights = 4;        // rows of the weight side by side
constexpr int kMaxRows = 6;        // of x: 6 x 4 sums, 4 expanded chunks and one of x fit the 32 registers
constexpr int64_t kChunk = 32;     // elements that are expanded together
constexpr int64_t kFinished = 16;  // columns of y that are finished together

// Four rows of the weight.
struct Quad {
  const uint16_t* values[kWeights];
  const uint8_t* bits[kWeights];
};

// What may be prefetched meanwhile, a line now and then.
struct Lines {
  const char* next;
  const char* end;
};

// Assembly: the compiler would read the values by the instruction itself, and reuse one register, whose old contents
// the instruction waits for.
BURNISH_INLINE __m512i expand_chunk(const uint16_t* values, uint32_t bits) {
  __m512i chunk;
  const __m512i packed = _mm512_loadu_si512(values);
  asm volatile("vpexpandw %1, %0%{%2%}%{z%}" : "=v"(chunk) : "v"(packed), "Yk"(static_cast<__mmask32>(bits)));
  return chunk;
}

// out[m][n] = row m of x times row n of the quad; `taken`: values that each row used.
template <int MR>
void tile(const Quad& quad, const char* x, int64_t x_stride, int64_t chunks, Lines* lines, int64_t (&taken)[kWeights],
          float* out) {
  Vec sum[MR][kWeights];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) sum[m][n] = Vec(0.0f);
  }
  int64_t at[kWeights] = {};
  for (int64_t c = 0; c < chunks; ++c) {
    __m512i weight[kWeights];
    BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) {
      uint32_t bits;
      memcpy(&bits, quad.bits[n] + c * 4, 4);
      weight[n] = expand_chunk(quad.values[n] + at[n], bits);
      at[n] += std::popcount(bits);
    }
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      const __m512i left = _mm512_loadu_si512(x + m * x_stride + c * 64);
      BURNISH_UNROLL for (int n = 0; n < kWeights; ++n) Pairs::multiply_add(sum[m][n], weight[n], left);
    }
    BURNISH_UNROLL for (int i = 0; i < 2; ++i) {
      if (lines[i].next < lines[i].end) {
        __builtin_prefetch(lines[i].next, 0, 3);
        __builtin_prefetch(lines[i].next + 64, 0, 3);
        lines[i].next += 128;
      }
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) add_lanes(sum[m], out + m * kFinished);
  std::copy(at, at + kWeights, taken);
}

using Tile = void (*)(const Quad&, const char*, int64_t, int64_t, Lines*, int64_t (&)[kWeights], float*);
constexpr Tile kTiles[kMaxRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// Whether rows [n, n + count) may be read: their starts ascend and lie in the values.
bool in_order(const BitmapWeight& weight, int64_t n, int64_t count) {
  bool ordered = weight.starts[n] >= 0;
  for (int64_t i = 0; i < count; ++i) ordered = ordered && weight.starts[n + i] <= weight.starts[n + i + 1];
  return ordered && weight.starts[n + count] <= weight.count;
}

// Whether a row of the bitmap has bits beyond `width` columns.
bool beyond(const uint8_t* bits, int64_t row_bytes, int64_t width) {
  if (width == row_bytes * 8) return false;
  uint64_t last;
  memcpy(&last, bits + row_bytes - 8, 8);
  return last >> (width - (row_bytes - 8) * 8) != 0;
}

}  // namespace

int64_t sparse_dot(const BitmapWeight& weight, const Matrix& x, int64_t rows, int64_t width, int64_t begin, int64_t end,
                   void* spare, const Sink& y) {
  const auto* values = static_cast<const uint16_t*>(weight.values);
  const auto* xs = static_cast<const char*>(x.data);
  const int64_t most = weight.row_bytes * 8, chunks = most / kChunk, passes = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t block = begin; block < end; block += kFinished) {
    const int64_t columns = std::min(kFinished, end - block);
    float out[kFewRowsSparse * kFinished];
    for (int64_t n = block; n < block + columns; n += kWeights) {
      const int64_t count = std::min<int64_t>(kWeights, block + columns - n);
      if (!in_order(weight, n, count)) return n;
      Quad quad;
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
        auto* copy = static_cast<uint16_t*>(spare) + i * (most + kChunk);
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
        kTiles[last - first - 1](quad, xs + first * x.stride, x.stride, chunks, lines, taken,
                                 out + first * kFinished + n - block);
        for (int64_t i = 0; i < count; ++i) {
          if (taken[i] != weight.starts[n + i + 1] - weight.starts[n + i]) return n + i;
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m) finish_row(out + m * kFinished, columns, y.at(m, block));
  }
  return -1;
}

#endif

}  // namespace burnish::BURNISH_ISA
