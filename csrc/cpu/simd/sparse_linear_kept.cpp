// y = x W^T by what a bitmap weight keeps and nothing else: each kept element times a row of x transposed.
//
// A row of the weight is first decoded: the columns of its elements, and their values as floats. An element then
// costs its broadcast and one multiply-add for each vector of rows of x, where a dense product of the expanded row pays
// for all K of them.
#include <algorithm>
#include <bit>

#include "cpu/simd/bitmap.h"
#include "cpu/simd/element.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int64_t kFinished = 16;  // rows of the weight, columns of y, that are finished together
constexpr int64_t kRowsAhead = 2;  // from a row to the one that is prefetched meanwhile
constexpr int kChains = 4;         // sums that hide the latency of a multiply-add
constexpr int64_t kLongestSum = Vec::kLanes == 1 ? kShortSum : 64;  // elements that are summed in one go

#if defined(__AVX512VBMI2__)

struct Bytes {
  alignas(64) uint8_t of[64];
  constexpr Bytes() : of() {
    for (int i = 0; i < 64; ++i) of[i] = static_cast<uint8_t>(i);
  }
};
constexpr Bytes kBytes;

#endif

// The columns whose bit is set, in order; up to 15 more are written.
int64_t decode(const uint8_t* bits, int64_t bytes, uint16_t* columns) {
  uint16_t* to = columns;
  for (int64_t at = 0; at < bytes; at += 8) {
    uint64_t word;
    memcpy(&word, bits + at, 8);
    const int64_t here = std::popcount(word);
#if defined(__AVX512VBMI2__)
    __m512i places = _mm512_maskz_compress_epi8(word, _mm512_load_si512(kBytes.of));
    const __m256i base = _mm256_set1_epi16(static_cast<short>(at * 8));
    int64_t done = 0;
    do {
      const __m256i some = _mm256_cvtepu8_epi16(_mm512_castsi512_si128(places));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + done), _mm256_add_epi16(some, base));
      places = _mm512_alignr_epi64(places, places, 2);
      done += 16;
    } while (done < here);
#else
    for (uint16_t* next = to; word != 0; word &= word - 1) {
      *next++ = static_cast<uint16_t>(at * 8 + std::countr_zero(word));
    }
#endif
    to += here;
  }
  return to - columns;
}

template <class T>
void widen(const T* values, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const int64_t here = std::min<int64_t>(Vec::kLanes, count - i);
    store(to + i, load(values + i, here), here);
  }
}

// How a kept value is broadcast: as it is stored where that takes one instruction, else from a copy as floats.
template <class T>
struct Stored {
  using Type = float;
};
BURNISH_INLINE Vec spread(const float* value) { return Vec(*value); }
#if defined(__AVX512BF16__)
template <>
struct Stored<bf16> {
  using Type = bf16;
};
BURNISH_INLINE Vec spread(const bf16* value) {
  short word;
  memcpy(&word, value, 2);
  return Vec(_mm512_castsi512_ps(_mm512_maskz_set1_epi16(0xaaaaaaaa, word)));  // the upper half of each float
}
#endif

// sums [vectors] = the sum over the row's elements, in two levels; VR: vectors of rows of x.
template <class T, int VR>
void add_row(const T* values, const uint16_t* columns, int64_t count, const float* x, float* sums) {
  constexpr int kApart = VR >= kChains ? 1 : kChains / VR;
  Vec total[VR];
  BURNISH_UNROLL for (int v = 0; v < VR; ++v) total[v] = Vec(0.0f);
  for (int64_t i = 0; i < count;) {
    Vec sum[kApart][VR];
    BURNISH_UNROLL for (int c = 0; c < kApart; ++c) {
      BURNISH_UNROLL for (int v = 0; v < VR; ++v) sum[c][v] = Vec(0.0f);
    }
    const auto add = [&](int64_t at, Vec(&to)[VR]) {
      const Vec value = spread(values + at);
      const float* row = x + columns[at] * int64_t{VR * Vec::kLanes};
      BURNISH_UNROLL for (int v = 0; v < VR; ++v) to[v] = fma(value, load(row + v * Vec::kLanes, Vec::kLanes), to[v]);
    };
    const int64_t end = std::min(count, i + kApart * kLongestSum);
    for (; i + kApart <= end; i += kApart) {
      BURNISH_UNROLL for (int c = 0; c < kApart; ++c) add(i + c, sum[c]);
    }
    for (; i < end; ++i) add(i, sum[0]);
    BURNISH_UNROLL for (int v = 0; v < VR; ++v) {
      BURNISH_UNROLL for (int c = 1; c < kApart; ++c) sum[0][v] = sum[0][v] + sum[c][v];
      total[v] = total[v] + sum[0][v];
    }
  }
  BURNISH_UNROLL for (int v = 0; v < VR; ++v) store(sums + v * Vec::kLanes, total[v], Vec::kLanes);
}

// The lines of [begin, begin + bytes): while a row is multiplied, one after it comes from memory.
void prefetch(const void* begin, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(begin) + at, 0, 2);
}

template <class T>
constexpr void (*kAddRow[kKeptVectors])(const T*, const uint16_t*, int64_t, const float*, float*) = {
    add_row<T, 1>, add_row<T, 2>, add_row<T, 3>, add_row<T, 4>};

}  // namespace

int64_t sparse_kept(const BitmapWeight& weight, Format format, const float* x, int64_t vectors, int64_t rows,
                    int64_t width, int64_t begin, int64_t end, void* spare, const Sink& y) {
  const int64_t columns = vectors * Vec::kLanes;
  auto* values = static_cast<float*>(spare);
  auto* places = reinterpret_cast<uint16_t*>(values + weight.row_bytes * 8);
  alignas(64) float sums[kFinished * kKeptVectors * Vec::kLanes], finished[kKeptVectors * Vec::kLanes * kFinished];
  for (int64_t block = begin; block < end; block += kFinished) {
    const int64_t count = std::min(kFinished, end - block);
    if (!in_order(weight, block, count)) return block;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = block + i, start = weight.starts[row], size = weight.starts[row + 1] - start;
      const uint8_t* bits = weight.bitmap + row * weight.row_bytes;
      if (beyond(bits, weight.row_bytes, width)) return row;
      if (decode(bits, weight.row_bytes, places) != size) return row;
      if (const int64_t later = row + kRowsAhead; later < end && in_order(weight, later, 1)) {
        prefetch(static_cast<const char*>(weight.values) + weight.starts[later] * size_of(format),
                 (weight.starts[later + 1] - weight.starts[later]) * size_of(format));
        prefetch(weight.bitmap + later * weight.row_bytes, weight.row_bytes);
      }
      float* sum = sums + i * columns;
      with_type(format, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto* stored = static_cast<const T*>(weight.values) + start;
        if constexpr (std::is_same_v<T, typename Stored<T>::Type>) {
          kAddRow<T>[vectors - 1](stored, places, size, x, sum);
        } else {
          widen(stored, size, values);
          kAddRow<float>[vectors - 1](values, places, size, x, sum);
        }
      });
    }
    store_transposed(sums, columns, count, columns, into(finished, kFinished, Format::kFloat));
    for (int64_t m = 0; m < rows; ++m) finish_row(finished + m * kFinished, count, y.at(m, block));
  }
  return -1;
}

}  // namespace burnish::BURNISH_ISA
