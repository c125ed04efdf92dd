// What int8_linear's gradient needs of its own: the slope of the activation, and int8 weights as floats for a product.
#include "cpu/simd/level.h"
#include "cpu/simd/transpose.h"
#include "math/pack.h"

namespace burnish::BURNISH_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int64_t kChannels = 16, kColumns = 64;  // of a block that is turned at once

// The first `width` of 64 signed bytes as floats, or where there is an instruction for it as bf16.
BURNISH_INLINE void widen(__m512i bytes, int64_t width, Format format, char* out) {
  const __m128i quarters[4] = {_mm512_castsi512_si128(bytes), _mm512_extracti32x4_epi32(bytes, 1),
                               _mm512_extracti32x4_epi32(bytes, 2), _mm512_extracti32x4_epi32(bytes, 3)};
  __m512 floats[4];
  BURNISH_UNROLL for (int i = 0; i < 4; ++i) floats[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarters[i]));
#if defined(__AVX512BF16__)
  if (format == Format::kBf16) {
    BURNISH_UNROLL for (int i = 0; i < 2; ++i) {
      const __m512bh pair = _mm512_cvtne2ps_pbh(floats[2 * i + 1], floats[2 * i]);
      __m512i words;
      memcpy(&words, &pair, sizeof words);
      const int64_t left = width - i * 32;
      const __mmask32 mask = left >= 32 ? ~__mmask32{0} : left <= 0 ? 0 : (__mmask32{1} << left) - 1;
      _mm512_mask_storeu_epi16(out + i * 64, mask, words);
    }
    return;
  }
#endif
  BURNISH_UNROLL for (int i = 0; i < 4; ++i) {
    if (width > i * 16) store(reinterpret_cast<float*>(out) + i * 16, Vec(floats[i]), width - i * 16);
  }
}

// Channels [first, first + count), at most 16, of one panel of the layout.
void unpack_channels(const uint8_t* panel, int64_t channels, int64_t depth, int64_t first, int64_t count,
                     int64_t column, int64_t width, const Matrix& out) {
  const auto mask = static_cast<__mmask16>((1 << count) - 1);
  for (int64_t k = 0; k < width; k += kColumns) {
    const int64_t from = (column + k) / kDepth;
    __m512i block[16];
    BURNISH_UNROLL for (int64_t i = 0; i < 16; ++i) {
      const uint8_t* at = panel + ((from + i) * channels + first) * kDepth;
      __builtin_prefetch(at + kPanel * depth * kDepth, 0, 2);  // the same of the next panel
      block[i] = from + i < depth ? _mm512_maskz_loadu_epi32(mask, at) : _mm512_setzero_si512();
    }
    transpose(block);
    for (int64_t i = 0; i < count; ++i) {
      widen(_mm512_xor_si512(block[i], _mm512_set1_epi8(-128)), width - k, out.format,
            static_cast<char*>(const_cast<void*>(out.at(i, k).data)));
    }
  }
}

#else

constexpr int64_t kChannels = kPanel;

void unpack_channels(const uint8_t* panel, int64_t channels, int64_t, int64_t first, int64_t count, int64_t column,
                     int64_t width, const Matrix& out) {
  for (int64_t k = 0; k < width; k += kDepth) {
    const uint8_t* fours = panel + ((column + k) / kDepth * channels + first) * kDepth;
    const int64_t here = width - k < kDepth ? width - k : kDepth;
    for (int64_t i = 0; i < count; ++i, fours += kDepth) {
      auto* to = static_cast<float*>(const_cast<void*>(out.at(i, k).data));
      for (int64_t j = 0; j < here; ++j) to[j] = static_cast<float>(static_cast<int32_t>(fours[j]) - 128);
    }
  }
}

#endif

}  // namespace

void unpack_int8(const Int8Weight& weight, int64_t row, int64_t rows, int64_t column, int64_t width,
                 const Matrix& out) {
  const int64_t depth = round_up(weight.width, kDepth) / kDepth;
  for (int64_t n = 0; n < rows;) {
    const int64_t p = (row + n) / kPanel, first = (row + n) % kPanel;
    int64_t count = rows - n < kPanel - first ? rows - n : kPanel - first;
    if (count > kChannels) count = kChannels;
    unpack_channels(weight.data + p * kPanel * depth * kDepth, panel_width(weight.channels, p), depth, first, count,
                    column, width, out.at(n, 0));
    n += count;
  }
}

void slope_row(const void* dy, Format format, const float* z, int activation, const float* scale, int64_t count,
               float* out) {
  with_type(format, [&](auto* type) {
    const auto* in = static_cast<decltype(type)>(const_cast<void*>(dy));
    for (int64_t i = 0; i < count; i += Vec::kLanes) {
      Vec value = load(in + i, count - i);
      if (z != nullptr) {
        value = value * activation_slope(load(z + i, count - i), static_cast<Activation>(activation));
      }
      if (scale != nullptr) value = value * load(scale + i, count - i);
      store(out + i, value, count - i);
    }
  });
}

}  // namespace burnish::BURNISH_ISA
