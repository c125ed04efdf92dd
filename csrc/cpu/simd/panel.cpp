// W's panels, as product.cpp multiplies them, and the transposition of results: matrices that change their layout.
#include <utility>

#include "cpu/simd/element.h"
#include "cpu/simd/level.h"
#include "cpu/simd/transpose.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int64_t kReadAhead = 512;  // bytes of a row that packing prefetches
constexpr int64_t kTurned = 32;      // rows that turning prefetches ahead
constexpr int64_t kShallow = 8;      // depth of which loading parts of vectors costs more than element by element

// At most a square of kLanes, turned, with zeros for the rows that it lacks.
template <class T>
BURNISH_INLINE void load_turned(const T* from, int64_t stride, int64_t rows, int64_t columns,
                                Vec (&square)[Vec::kLanes]) {
  BURNISH_UNROLL for (int i = 0; i < Vec::kLanes; ++i) {
    square[i] = i < rows ? load(from + i * stride, columns) : Vec(0.0f);
  }
  transpose(square);
}

// The same from memory to memory, `written` elements of each row.
template <class T, class U>
BURNISH_INLINE void turn_square(const T* from, int64_t stride, int64_t rows, int64_t columns, U* to, int64_t to_stride,
                                int64_t written) {
  Vec square[Vec::kLanes];
  load_turned(from, stride, rows, columns, square);
  BURNISH_UNROLL for (int i = 0; i < Vec::kLanes; ++i) {
    if (i < columns) store(to + i * to_stride, square[i], written);
  }
}

#if defined(__AVX512F__)

// 16 rows of 8 words of 32 bits, turned: r[i] holds row i and, above it, row i + 8.
BURNISH_INLINE void transpose_half(__m512i (&r)[8]) {
  __m512i t[8];
  BURNISH_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  BURNISH_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // lanes of r[i]: words i of rows 0-3, i + 4 of 0-3, i of 8-11, i + 4 of 8-11; those of r[i + 4]: rows 4-7 and 12-15
  BURNISH_UNROLL for (int i = 0; i < 4; ++i) {
    const __m512i even = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), odd = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i] = _mm512_shuffle_i32x4(even, even, 0xd8);
    t[i + 4] = _mm512_shuffle_i32x4(odd, odd, 0xd8);
  }
  BURNISH_UNROLL for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// 16 columns of a panel from rows of `bytes` bytes, a word of 32 bits a step: one float, or two of bf16.
void pack_words(const char* w, int64_t stride, int64_t rows, int64_t bytes, char* panel, int64_t step_bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    const int64_t here = bytes - at < 64 ? bytes - at : 64;
    __m512i r[16];
    if (here == 64 && rows == 16) [[likely]] {
      if (bytes >= 2 * kReadAhead) {  // 16 streams are more than the processor follows by itself
        const char* next = w + (at + kReadAhead < bytes ? at + kReadAhead : 16 * stride + at + kReadAhead - bytes);
        BURNISH_UNROLL for (int i = 0; i < 16; ++i) _mm_prefetch(next + i * stride, _MM_HINT_T0);
      }
      BURNISH_UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(w + i * stride + at);
      transpose(r);
      BURNISH_UNROLL for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + (at / 4 + i) * step_bytes, r[i]);
      continue;
    }
    if (here == 32 && rows == 16) {  // a rank of 16 in bf16
      __m512i half[8];
      BURNISH_UNROLL for (int i = 0; i < 8; ++i) {
        const auto* low = reinterpret_cast<const __m256i*>(w + i * stride + at);
        const auto* high = reinterpret_cast<const __m256i*>(w + (i + 8) * stride + at);
        half[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(low)), _mm256_loadu_si256(high), 1);
      }
      transpose_half(half);
      BURNISH_UNROLL for (int i = 0; i < 8; ++i) _mm512_storeu_si512(panel + (at / 4 + i) * step_bytes, half[i]);
      continue;
    }
    const __mmask64 mask = here == 64 ? ~__mmask64{0} : (__mmask64{1} << here) - 1;
    BURNISH_UNROLL for (int i = 0; i < 16; ++i) {
      r[i] = i < rows ? _mm512_maskz_loadu_epi8(mask, w + i * stride + at) : _mm512_setzero_si512();
    }
    transpose(r);
    const int64_t steps = (here + 3) / 4;
    BURNISH_UNROLL for (int i = 0; i < 16; ++i) {
      if (i < steps) _mm512_storeu_si512(panel + (at / 4 + i) * step_bytes, r[i]);
    }
  }
}

// Which elements of 16 bits of two vectors a, b make a[0], b[0], a[1], b[1], ..: the first half of that, and the
// second.
alignas(64) constexpr struct Interleaved {
  uint16_t low[32], high[32];
  constexpr Interleaved() : low(), high() {
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      high[i] = static_cast<uint16_t>(low[i] + 16);
    }
  }
} kInterleaved;

// Pairs of rows, interleaved: (w[k][n], w[k + 1][n]) for 32 columns a step.
void pack_pairs(const Matrix& w, int64_t columns, int64_t depth, char* panel, int64_t step_bytes) {
  const __m512i low = _mm512_load_si512(kInterleaved.low), high = _mm512_load_si512(kInterleaved.high);
  for (int64_t k = 0; k < depth; k += 2) {
    const char* first = static_cast<const char*>(w.data) + k * w.stride;
    char* to = panel + k / 2 * step_bytes;
    for (int64_t n = 0; n < columns; n += 32) {
      const int64_t count = columns - n;
      const __mmask32 mask = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
      const __m512i a = _mm512_maskz_loadu_epi16(mask, first + n * 2);
      const __m512i b =
          k + 1 < depth ? _mm512_maskz_loadu_epi16(mask, first + w.stride + n * 2) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + n * 4, _mm512_permutex2var_epi16(a, low, b));
      if (count > 16) _mm512_storeu_si512(to + n * 4 + 64, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// A block of up to 16 words of rows and 16 columns, turned: a word is one element, or two of 16 bits.
template <class T>
void turn_block(const Matrix& from, int64_t rows, int64_t columns, const Matrix& to) {
  constexpr int64_t kDepth = 4 / sizeof(T);  // rows of a word
  const __m512i interleaved = _mm512_load_si512(kInterleaved.low);
  const auto mask = static_cast<__mmask16>((1 << columns) - 1);
  const auto row = [&](int64_t r) __attribute__((always_inline)) {
    const void* at = from.at(r, 0).data;
    __builtin_prefetch(static_cast<const char*>(at) + kTurned * from.stride, 0, 2);
    if (r >= rows) return _mm512_setzero_si512();
    if constexpr (kDepth == 1) return _mm512_maskz_loadu_epi32(mask, at);
    return _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, at));
  };
  __m512i block[16];
  BURNISH_UNROLL for (int64_t i = 0; i < 16; ++i) {
    block[i] = row(i * kDepth);
    if constexpr (kDepth == 2) block[i] = _mm512_permutex2var_epi16(block[i], interleaved, row(i * kDepth + 1));
  }
  transpose(block);
  const auto bytes = rows * sizeof(T);
  const __mmask64 written = bytes < 64 ? (__mmask64{1} << bytes) - 1 : ~__mmask64{0};
  BURNISH_UNROLL for (int64_t i = 0; i < 16; ++i) {
    if (i < columns) _mm512_mask_storeu_epi8(const_cast<void*>(to.at(i, 0).data), written, block[i]);
  }
}

#else

#if defined(__AVX2__)
// 8 x 8 elements, turned.
template <class T>
BURNISH_INLINE void turn_whole(const T* from, int64_t stride, T* to, int64_t to_stride) {
  BURNISH_UNROLL for (int i = 0; i < 8; ++i) __builtin_prefetch(from + (i + kTurned) * stride, 0, 2);
  if constexpr (sizeof(T) == sizeof(float)) {
    turn_square(from, stride, 8, 8, to, to_stride, 8);
  } else {
    __m128i square[8];
    BURNISH_UNROLL for (int i = 0; i < 8; ++i) {
      square[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
    }
    transpose(square);
    BURNISH_UNROLL for (int i = 0; i < 8; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), square[i]);
    }
  }
}
#endif

template <class T>
void turn_block(const Matrix& from, int64_t rows, int64_t columns, const Matrix& to) {
  constexpr int64_t kSide = 8;
  const int64_t stride = from.stride / size_of(from.format), to_stride = to.stride / size_of(to.format);
  for (int64_t r = 0; r < rows; r += kSide) {
    for (int64_t n = 0; n < columns; n += kSide) {
      const auto* in = static_cast<const T*>(from.at(r, n).data);
      auto* out = static_cast<T*>(const_cast<void*>(to.at(n, r).data));
      const int64_t deep = rows - r < kSide ? rows - r : kSide, wide = columns - n < kSide ? columns - n : kSide;
#if defined(__AVX2__)
      if (deep == kSide && wide == kSide) {
        turn_whole(in, stride, out, to_stride);
        continue;
      }
#endif
      for (int64_t i = 0; i < wide; ++i) {
        for (int64_t j = 0; j < deep; ++j) out[i * to_stride + j] = in[j * stride + i];
      }
    }
  }
}

#endif

// A panel of floats, element by element.
template <class T>
void pack_elements(const T* w, int64_t stride, int64_t columns, int64_t depth, float* panel, int64_t padded) {
  for (int64_t k = 0; k < depth; ++k) {
    float* to = panel + k * padded;
    for (int64_t n = 0; n < columns; ++n) to[n] = to_float(w[n * stride + k]);
    for (int64_t n = columns; n < padded; ++n) to[n] = 0.0f;
  }
}

// The same, a square of vectors at a time, the last of which overlap.
template <class T>
void pack_squares(const T* w, int64_t stride, int64_t columns, int64_t depth, float* panel, int64_t padded) {
  constexpr int64_t kLanes = Vec::kLanes;
  for (int64_t n = 0; n < columns; n += kLanes) {
    const T* from = w + n * stride;
    const int64_t rows = columns - n < kLanes ? columns - n : kLanes;
    for (int64_t done = 0; done < depth; done += kLanes) {
      const int64_t k = depth < kLanes ? 0 : done < depth - kLanes ? done : depth - kLanes;
      float* to = panel + k * padded + n;
      if (rows == kLanes && depth >= kLanes) [[likely]] {
        turn_square(from + k, stride, kLanes, kLanes, to, padded, kLanes);
      } else {
        turn_square(from + k, stride, rows, depth < kLanes ? depth : kLanes, to, padded, kLanes);
      }
    }
  }
}

}  // namespace

void pack_rows(const Matrix& w, int64_t columns, int64_t depth, void* panel) {
  const int64_t padded = padded_columns(columns);
#if defined(__AVX512F__)
  if (w.format != Format::kFp16) {
    const char* from = static_cast<const char*>(w.data);
    for (int64_t n = 0; n < columns; n += 16) {
      const int64_t rows = columns - n < 16 ? columns - n : 16;
      pack_words(from + n * w.stride, w.stride, rows, depth * size_of(w.format), static_cast<char*>(panel) + n * 4,
                 padded * 4);
    }
    return;
  }
#endif
  with_type(w.format, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(w.data);
    const int64_t stride = w.stride / size_of(w.format);
    if (Vec::kLanes == 1 || depth < kShallow) {
      pack_elements(from, stride, columns, depth, static_cast<float*>(panel), padded);
    } else {
      pack_squares(from, stride, columns, depth, static_cast<float*>(panel), padded);
    }
  });
}

void pack_columns(const Matrix& w, int64_t columns, int64_t depth, void* panel) {
  const int64_t padded = padded_columns(columns);
#if defined(__AVX512F__)
  if (w.format == Format::kBf16) return pack_pairs(w, columns, depth, static_cast<char*>(panel), padded * 4);
#endif
  with_type(w.format, [&](auto* type) {
    for (int64_t k = 0; k < depth; ++k) {
      const auto* from = static_cast<const std::remove_pointer_t<decltype(type)>*>(w.at(k, 0).data);
      float* to = static_cast<float*>(panel) + k * padded;
      for (int64_t n = 0; n < padded; n += Vec::kLanes) {
        store(to + n, load(from + n, columns - n), Vec::kLanes);
      }
    }
  });
}

void turn(const Matrix& from, int64_t rows, int64_t columns, const Matrix& to) {
  with_type(from.format, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kBlock = 64 / sizeof(T);
    for (int64_t r = 0; r < rows; r += kBlock) {
      for (int64_t n = 0; n < columns; n += 16) {
        turn_block<T>(from.at(r, n), rows - r < kBlock ? rows - r : kBlock, columns - n < 16 ? columns - n : 16,
                      to.at(n, r));
      }
    }
  });
}

void store_transposed(const float* from, int64_t stride, int64_t rows, int64_t columns, const Sink& to) {
  with_type(to.y_format, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* out = static_cast<T*>(to.y);
    int64_t r = 0;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bf16>) {
      for (; to.stream && r + 32 <= rows; r += 32) {
        for (int64_t c = 0; c < columns; c += 16) {
          const int64_t width = columns - c < 16 ? columns - c : 16;
          Vec low[16], high[16];
          load_turned(from + r * stride + c, stride, 16, width, low);
          load_turned(from + (r + 16) * stride + c, stride, 16, width, high);
          BURNISH_UNROLL for (int i = 0; i < 16; ++i) {
            if (i < width) stream(out + (c + i) * to.y_stride + r, low[i], high[i]);
          }
        }
      }
      if (r > 0) end_stream();
    }
#endif
    for (; r < rows; r += Vec::kLanes) {
      const int64_t count = rows - r < Vec::kLanes ? rows - r : Vec::kLanes;
      for (int64_t c = 0; c < columns; c += Vec::kLanes) {
        const int64_t width = columns - c < Vec::kLanes ? columns - c : Vec::kLanes;
        const float* square = from + r * stride + c;
        T* turned = out + c * to.y_stride + r;
        if (count == Vec::kLanes && width == Vec::kLanes) [[likely]] {
          turn_square(square, stride, Vec::kLanes, Vec::kLanes, turned, to.y_stride, Vec::kLanes);
        } else {
          turn_square(square, stride, count, width, turned, to.y_stride, count);
        }
      }
    }
  });
}

}  // namespace burnish::BURNISH_ISA
