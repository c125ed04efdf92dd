// W's panels, as product.cpp multiplies them, and the transposition of results: matrices that change their layout.
#include <utility>

#include "cpu/simd/element.h"
#include "cpu/simd/level.h"
#include "cpu/simd/transpose.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int64_t kReadAhead = 512;  // bytes of a row that packing prefetches
constexpr int64_t kTurned = 32;      // rows that turning prefetches ahead

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

template <class T>
void turn_block(const Matrix& from, int64_t rows, int64_t columns, const Matrix& to) {
  for (int64_t i = 0; i < columns; ++i) {
    auto* out = static_cast<T*>(const_cast<void*>(to.at(i, 0).data));
    for (int64_t r = 0; r < rows; ++r) out[r] = static_cast<const T*>(from.at(r, 0).data)[i];
  }
}

#endif

// A panel of floats, element by element.
template <class T>
void pack_floats(const T* w, int64_t along, int64_t across, int64_t columns, int64_t depth, float* panel,
                 int64_t padded) {
  for (int64_t k = 0; k < depth; ++k) {
    float* to = panel + k * padded;
    for (int64_t n = 0; n < columns; ++n) to[n] = to_float(w[k * along + n * across]);
    for (int64_t n = columns; n < padded; ++n) to[n] = 0.0f;
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
    const auto* from = static_cast<const std::remove_pointer_t<decltype(type)>*>(w.data);
    pack_floats(from, 1, w.stride / size_of(w.format), columns, depth, static_cast<float*>(panel), padded);
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
    struct Turned {
      __m512i of[16];
      BURNISH_INLINE Turned(const float* from, int64_t stride, int64_t rows, int64_t columns) {
        BURNISH_UNROLL for (int i = 0; i < 16; ++i) {
          of[i] = i < rows ? _mm512_castps_si512(load(from + i * stride, columns).v) : _mm512_setzero_si512();
        }
        transpose(of);
      }
      BURNISH_INLINE Vec operator[](int i) const { return Vec(_mm512_castsi512_ps(of[i])); }
    };
    if constexpr (std::is_same_v<T, bf16>) {
      for (; to.stream && r + 32 <= rows; r += 32) {
        for (int64_t c = 0; c < columns; c += 16) {
          const int64_t width = columns - c < 16 ? columns - c : 16;
          const Turned low(from + r * stride + c, stride, 16, width);
          const Turned high(from + (r + 16) * stride + c, stride, 16, width);
          BURNISH_UNROLL for (int i = 0; i < 16; ++i) {
            if (i < width) stream(out + (c + i) * to.y_stride + r, low[i], high[i]);
          }
        }
      }
      if (r > 0) end_stream();
    }
    for (; r < rows; r += 16) {
      const int64_t count = rows - r < 16 ? rows - r : 16;
      for (int64_t c = 0; c < columns; c += 16) {
        const int64_t width = columns - c < 16 ? columns - c : 16;
        const Turned block(from + r * stride + c, stride, count, width);
        BURNISH_UNROLL for (int i = 0; i < 16; ++i) {
          if (i < width) store(out + (c + i) * to.y_stride + r, block[i], count);
        }
      }
    }
#endif
    for (; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) out[c * to.y_stride + r] = from_float<T>(from[r * stride + c]);
    }
  });
}

}  // namespace burnish::BURNISH_ISA
