// Sparse rows made dense and back. A row is its stored elements, one after the other, and what says where they go: a
// bit for each place of a bitmap, or the metadata of 2:4 groups.
//
// AVX-512 spreads the stored elements of a vector in a register. AVX2 shuffles the next 8 by a table of what a byte of
// the bitmap, or of the metadata, says.
#include <algorithm>
#include <bit>

#include "cpu/simd/level.h"
#include "cpu/simd/spread.h"
#include "math/pack.h"
#include "math/sparse24.h"

namespace burnish::BURNISH_ISA {

#if defined(__AVX512VBMI2__)

BURNISH_INLINE Vec load(const int8_t* values, int64_t count) {
  return Vec(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), values))));
}

#elif defined(__AVX2__)

BURNISH_INLINE Vec load_all(const int8_t* values) {
  return Vec(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)))));
}

#endif

namespace {

constexpr int64_t kRowsAhead = 16;  // from a row to the one that is prefetched meanwhile
constexpr int64_t kLinesAhead = 2;  // of its values: the processor then follows by itself

// What a byte says of 8 places: which of them are stored, a bit each.
struct Bitmap {
  static constexpr bool kHalf = false;  // whether half of each group is stored
  static constexpr uint8_t stored(uint8_t byte) { return byte; }
};
struct Grouped {
  static constexpr bool kHalf = true;
  static constexpr uint8_t stored(uint8_t byte) { return stored_bits(byte); }
};

// `count` places of a row: what says which are stored, the first of those, and where the values of all rows end.
template <class T>
struct Part {
  const uint8_t* bytes;
  T* values;
  T* end;
  int64_t count;
};

#if defined(__AVX512VBMI2__)

constexpr int64_t kChunk = 64;  // places that are filled together

// A bit for each place of a chunk.
BURNISH_INLINE uint64_t chunk_bits(const uint8_t* bytes, Bitmap) {
  uint64_t word;
  memcpy(&word, bytes, 8);
  return word;
}
BURNISH_INLINE uint64_t chunk_bits(const uint8_t* bytes, Grouped) {
  alignas(64) static constexpr struct Shifts {
    uint8_t of[kChunk];
    constexpr Shifts() : of() {
      for (int i = 0; i < kChunk; ++i) of[i] = static_cast<uint8_t>(i / kGroup24 * 4);
    }
  } kShifts;
  const __m512i stored = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  long long word;
  memcpy(&word, bytes, 8);
  const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(kShifts.of), _mm512_set1_epi64(word));
  const __m512i group = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
  return _mm512_test_epi8_mask(_mm512_shuffle_epi8(stored, group), _mm512_set1_epi32(0x08040201));
}

// How many of the next kStep places are stored.
template <class Kind, int64_t kStep>
BURNISH_INLINE int64_t count_stored(uint64_t bits) {
  return Kind::kHalf ? kStep / 2 : std::popcount(bits & ((uint64_t{1} << kStep) - 1));
}

// As many places of Out as a register has, filled with the next `count` values.
template <class Out, class T>
BURNISH_INLINE __m512i fill(const T* values, int64_t count, uint64_t bits) {
  if constexpr (sizeof(Out) == 4) {
    return spread_dwords(_mm512_castps_si512(load(values, count).v), static_cast<__mmask16>(bits));
  } else if constexpr (sizeof(T) == 2) {
    const auto there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return spread_words(_mm512_maskz_loadu_epi16(there, values), static_cast<__mmask32>(bits));
  } else {
    const __m256i words = normal_to_bf16(load(values, count));  // exact
    return spread_words(_mm512_castsi256_si512(words), static_cast<__mmask32>(bits));
  }
}

// Returns what follows the values that a chunk takes.
template <class Kind, class T, class Out>
BURNISH_INLINE const T* fill_chunk(const uint8_t* bytes, const T* values, Out* out) {
  constexpr int64_t kStep = 64 / sizeof(Out);
  uint64_t bits = chunk_bits(bytes, Kind());
  BURNISH_UNROLL for (int64_t i = 0; i < kChunk; i += kStep, bits >>= kStep) {
    const int64_t here = count_stored<Kind, kStep>(bits);
    _mm512_storeu_si512(out + i, fill<Out>(values, here, bits));
    values += here;
  }
  return values;
}

template <class Kind, class T, class Out>
void fill_row(const Part<const T>& part, Out* out) {
  const T* values = part.values;
  int64_t k = 0;
  for (; k + kChunk <= part.count; k += kChunk) values = fill_chunk<Kind>(part.bytes + k / 8, values, out + k);
  if (k == part.count) return;
  uint8_t bytes[kChunk / 8] = {};
  T few[kChunk] = {};
  Out chunk[kChunk];
  std::copy(part.bytes + k / 8, part.bytes + (part.count + 7) / 8, bytes);
  std::copy_n(values, std::min(kChunk, part.end - values), few);
  fill_chunk<Kind>(bytes, few, chunk);
  std::copy_n(chunk, part.count - k, out + k);
}

// The stored ones of 64 floats become values; of those before `last`, more than these may be written.
template <class Kind, class T>
BURNISH_INLINE T* take_chunk(const uint8_t* bytes, const float* dense, T* values, const T* last) {
  uint64_t bits = chunk_bits(bytes, Kind());
  if constexpr (Kind::kHalf) {
    BURNISH_UNROLL for (int64_t i = 0; i < kChunk; i += 32, bits >>= 32, values += 16) {
      const __m512 low = _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), load(dense + i, 16).v);
      const __m512 high = _mm512_maskz_compress_ps(static_cast<__mmask16>(bits >> 16), load(dense + i + 16, 16).v);
      store(values, Vec(_mm512_insertf32x8(low, _mm512_castps512_ps256(high), 1)), 16);
    }
  } else {
    BURNISH_UNROLL for (int64_t i = 0; i < kChunk; i += 16, bits >>= 16) {
      const int64_t here = count_stored<Kind, 16>(bits);
      const Vec stored(_mm512_maskz_compress_ps(static_cast<__mmask16>(bits), load(dense + i, 16).v));
      store(values, stored, last - values >= 16 ? 16 : here);
      values += here;
    }
  }
  return values;
}

template <class Kind, class T>
void take_row(const float* dense, const Part<T>& part) {
  T* values = part.values;
  int64_t k = 0;
  const T* last = values;
  if constexpr (!Kind::kHalf) last += count_bits(part.bytes, part.count / 8);
  for (; k + kChunk <= part.count; k += kChunk) values = take_chunk<Kind>(part.bytes + k / 8, dense + k, values, last);
  for (; k < part.count; ++k) {
    if (Kind::stored(part.bytes[k / 8]) >> (k % 8) & 1) *values++ = from_float<T>(dense[k]);
  }
}

#else

template <class Out, class T>
Out converted(T value) {
  if constexpr (std::is_same_v<T, Out>) {
    return value;
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return from_float<Out>(static_cast<float>(value));
  } else {
    return from_float<Out>(to_float(value));
  }
}

template <class Kind, class T, class Out>
void fill_places(const uint8_t* bytes, const T* values, int64_t count, Out* out) {
  for (int64_t k = 0; k < count; ++k) {
    out[k] = Kind::stored(bytes[k / 8]) >> (k % 8) & 1 ? converted<Out>(*values++) : Out{};
  }
}

template <class Kind, class T>
void take_row(const float* dense, const Part<T>& part) {
  T* values = part.values;
  for (int64_t k = 0; k < part.count; ++k) {
    if (Kind::stored(part.bytes[k / 8]) >> (k % 8) & 1) *values++ = from_float<T>(dense[k]);
  }
}

#if defined(__AVX2__)

// For a byte: which of the next values goes to each of 8 places, or 0x80 for none.
template <class Kind>
struct Ranks {
  uint8_t of[256][8];
  constexpr Ranks() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      const uint8_t stored = Kind::stored(static_cast<uint8_t>(byte));
      uint8_t rank = 0;
      for (int i = 0; i < 8; ++i) of[byte][i] = stored >> i & 1 ? rank++ : uint8_t{0x80};
    }
  }
};
template <class Kind>
alignas(64) constexpr Ranks<Kind> kRanks;

// 8 places from the next 8 values.
template <class Out, class T>
BURNISH_INLINE void fill_eight(const T* values, __m128i ranks, Out* out) {
  if constexpr (sizeof(Out) == 1) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(eight, ranks));
  } else if constexpr (std::is_same_v<T, Out> && sizeof(Out) == 2) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m128i twice = _mm_adds_epi8(ranks, ranks);  // saturates: 0x80 stays
    const __m128i order = _mm_or_si128(_mm_unpacklo_epi8(twice, twice), _mm_set1_epi16(0x0100));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(eight, order));
  } else {
    const __m256i order = _mm256_cvtepi8_epi32(ranks);
    const __m256 placed = _mm256_permutevar8x32_ps(load_all(values).v, order);
    store_all(out, Vec(_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(order, 31)), placed)));
  }
}

template <class Kind, class T, class Out>
void fill_row(const Part<const T>& part, Out* out) {
  const T* values = part.values;
  int64_t k = 0;
  for (; k + 8 <= part.count && part.end - values >= 8; k += 8) {
    const uint8_t byte = part.bytes[k / 8];
    fill_eight(values, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kRanks<Kind>.of[byte])), out + k);
    values += Kind::kHalf ? kStep24 / 2 : std::popcount(byte);
  }
  fill_places<Kind>(part.bytes + k / 8, values, part.count - k, out + k);
}

#else

template <class Kind, class T, class Out>
void fill_row(const Part<const T>& part, Out* out) {
  fill_places<Kind>(part.bytes, part.values, part.count, out);
}

#endif
#endif

// Rows of a weight from `row` on, their columns from `column` on; `values` are the weight's or, of its shape, others.
template <class T>
struct GroupedRows {
  using Kind = Grouped;
  const Sparse24Weight& weight;
  T* values;
  int64_t row, column, width;

  const uint8_t* bytes(int64_t i) const { return weight.metadata + (row + i) * weight.row_bytes + column / kStep24; }
  Part<T> part(int64_t i) const {
    constexpr int64_t kStored = kStep24 / 2;
    return {bytes(i), values + (bytes(i) - weight.metadata) * kStored,
            values + weight.rows * weight.row_bytes * kStored, width};
  }
};

template <class T>
struct BitmapRows {
  using Kind = Bitmap;
  const BitmapWeight& weight;
  T* values;
  int64_t row, column, width;

  const uint8_t* bytes(int64_t i) const { return weight.bitmap + (row + i) * weight.row_bytes + column / 8; }
  Part<T> part(int64_t i) const {
    const int64_t line = column / kLineBits, lines = ceil_div(weight.row_bytes * 8, kLineBits);
    const uint8_t* from = weight.bitmap + (row + i) * weight.row_bytes + line * kLineBits / 8;
    const int64_t before = weight.starts[row + i] + weight.before[(row + i) * lines + line];
    return {bytes(i), values + before + count_bits(from, column % kLineBits / 8), values + weight.count, width};
  }
};

template <class Out, class Rows>
void fill_rows(const Rows& from, int64_t rows, const Matrix& out) {
  if (from.width == 0) return;  // a weight of no columns has no places to look up
  for (int64_t i = 0; i < rows; ++i) {
    if (i + 2 * kRowsAhead < rows) __builtin_prefetch(from.bytes(i + 2 * kRowsAhead), 0, 2);
    if (i + kRowsAhead < rows) {
      const auto* next = reinterpret_cast<const char*>(from.part(i + kRowsAhead).values);
      for (int64_t line = 0; line < kLinesAhead; ++line) __builtin_prefetch(next + line * 64, 0, 2);
    }
    fill_row<typename Rows::Kind>(from.part(i), static_cast<Out*>(const_cast<void*>(out.at(i, 0).data)));
  }
}

// In the values' own format, or fp32, or of int8 bf16.
template <template <class> class Rows, class T, class Weight>
void expand(const Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t width, const Matrix& out) {
  const Rows<const T> from{weight, static_cast<const T*>(weight.values), row, column, width};
  if (out.format == Format::kFloat) return fill_rows<float>(from, rows, out);
  fill_rows<std::conditional_t<std::is_same_v<T, int8_t>, bf16, T>>(from, rows, out);
}

template <template <class> class Rows, class Weight>
void compress(const Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t width, const Matrix& dense,
              void* values, Format format) {
  with_type(format, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Rows<T> to{weight, static_cast<T*>(values), row, column, width};
    for (int64_t i = 0; i < rows; ++i) {
      take_row<typename Rows<T>::Kind>(static_cast<const float*>(dense.at(i, 0).data), to.part(i));
    }
  });
}

}  // namespace

int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0, at = 0;
  for (; at + 8 <= bytes; at += 8) {
    uint64_t word;
    memcpy(&word, bits + at, 8);
    count += std::popcount(word);
  }
  for (; at < bytes; ++at) count += std::popcount(bits[at]);
  return count;
}

void expand_sparse24(const Sparse24Weight& weight, Stored stored, int64_t row, int64_t rows, int64_t column,
                     int64_t width, const Matrix& out) {
  if (stored == Stored::kInt8) return expand<GroupedRows, int8_t>(weight, row, rows, column, width, out);
  with_type(static_cast<Format>(stored), [&](auto* type) {
    expand<GroupedRows, std::remove_pointer_t<decltype(type)>>(weight, row, rows, column, width, out);
  });
}

void compress_sparse24(const Sparse24Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t width,
                       const Matrix& dense, void* values, Format format) {
  compress<GroupedRows>(weight, row, rows, column, width, dense, values, format);
}

void expand_bitmap(const BitmapWeight& weight, Format stored, int64_t row, int64_t rows, int64_t column, int64_t width,
                   const Matrix& out) {
  with_type(stored, [&](auto* type) {
    expand<BitmapRows, std::remove_pointer_t<decltype(type)>>(weight, row, rows, column, width, out);
  });
}

void compress_bitmap(const BitmapWeight& weight, int64_t row, int64_t rows, int64_t column, int64_t width,
                     const Matrix& dense, void* values, Format format) {
  compress<BitmapRows>(weight, row, rows, column, width, dense, values, format);
}

#if !defined(__AVX512BF16__)

void expand_bytes(const Sparse24Weight& weight, int64_t row, int8_t* out) {
  const auto* values = static_cast<const int8_t*>(weight.values);
  fill_row<Grouped>(GroupedRows<const int8_t>{weight, values, row, 0, weight.row_bytes * kStep24}.part(0), out);
}

#endif

}  // namespace burnish::BURNISH_ISA
