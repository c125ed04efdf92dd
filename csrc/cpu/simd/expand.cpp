// Sparse rows made dense and back. A row is a bitmap and its set elements, one after the other.
//
// AVX-512 expands a vector in a register: the memory form of the instruction is microcode on some processors. AVX2
// shuffles the next 8 elements by a table of bytes of the bitmap.
#include <bit>

#include "cpu/simd/level.h"
#include "math/sparse24.h"

namespace burnish::BURNISH_ISA {
namespace {

#if defined(__AVX512F__)

// As many elements as bits are set, the others zero; nothing else is read.
BURNISH_INLINE __m512i spread_words(const uint16_t* values, uint64_t bits, int64_t count) {
  const auto there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  return _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), _mm512_maskz_loadu_epi16(there, values));
}
BURNISH_INLINE __m512i spread_words(const uint32_t* values, uint64_t bits, int64_t count) {
  const auto there = static_cast<__mmask16>((uint32_t{1} << count) - 1);
  return _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), _mm512_maskz_loadu_epi32(there, values));
}
BURNISH_INLINE __m512i spread_words(const uint8_t* values, uint64_t bits, int64_t count) {
  const __mmask64 there = count == 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  return _mm512_maskz_expand_epi8(bits, _mm512_maskz_loadu_epi8(there, values));
}

template <class T>
void expand_elements(const T* values, const uint8_t* bits, int64_t count, T* out) {
  constexpr int64_t kStep = 64 / sizeof(T);
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    uint64_t word = 0;
    memcpy(&word, bits + k / 8, kStep / 8);
    const int64_t here = std::popcount(word);
    _mm512_storeu_si512(out + k, spread_words(values, word, here));
    values += here;
  }
  for (; k < count; ++k) out[k] = bits[k / 8] >> (k % 8) & 1 ? *values++ : T(0);
}

#else

template <class T>
void expand_scalar(const T* values, const uint8_t* bits, int64_t count, T* out) {
  for (int64_t k = 0; k < count; ++k) out[k] = bits[k / 8] >> (k % 8) & 1 ? *values++ : T(0);
}

#if defined(__AVX2__)

// For a byte of the bitmap: which of the next elements goes to each of 8 places, or 0x80 for none.
struct Ranks {
  uint8_t of[256][8];
  constexpr Ranks() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      uint8_t rank = 0;
      for (int i = 0; i < 8; ++i) of[byte][i] = byte >> i & 1 ? rank++ : uint8_t{0x80};
    }
  }
};
alignas(64) constexpr Ranks kRanks;

BURNISH_INLINE __m128i ranks(uint8_t byte) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kRanks.of[byte]));
}
BURNISH_INLINE void spread_eight(const uint8_t* values, uint8_t byte, uint8_t* out) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(eight, ranks(byte)));
}
BURNISH_INLINE void spread_eight(const uint16_t* values, uint8_t byte, uint16_t* out) {
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const __m128i twice = _mm_adds_epi8(ranks(byte), ranks(byte));  // saturates: 0x80 stays
  const __m128i order = _mm_or_si128(_mm_unpacklo_epi8(twice, twice), _mm_set1_epi16(0x0100));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(eight, order));
}
BURNISH_INLINE void spread_eight(const uint32_t* values, uint8_t byte, uint32_t* out) {
  const __m256i order = _mm256_cvtepi8_epi32(ranks(byte));
  const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i spread = _mm256_andnot_si256(_mm256_srai_epi32(order, 31), _mm256_permutevar8x32_epi32(eight, order));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), spread);
}

template <class T>
void expand_elements(const T* values, const uint8_t* bits, int64_t count, T* out) {
  int64_t left = count_bits(bits, count / 8), k = 0;  // of the values: 8 are read at a time
  for (; k + 8 <= count && left >= 8; k += 8) {
    const uint8_t byte = bits[k / 8];
    spread_eight(values, byte, out + k);
    values += std::popcount(byte);
    left -= std::popcount(byte);
  }
  expand_scalar(values, bits + k / 8, count - k, out + k);
}

#else

template <class T>
void expand_elements(const T* values, const uint8_t* bits, int64_t count, T* out) {
  expand_scalar(values, bits, count, out);
}

#endif
#endif

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

void bits_of_metadata(const uint8_t* metadata, int64_t bytes, uint8_t* bits) {
  int64_t i = 0;
#if defined(__AVX2__)
  // the bits of a group by its four bits of metadata
  const __m256i of_group =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  const __m256i low = _mm256_set1_epi8(15);
  for (; i + 32 <= bytes; i += 32) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(metadata + i));
    const __m256i first = _mm256_shuffle_epi8(of_group, _mm256_and_si256(both, low));
    const __m256i second = _mm256_shuffle_epi8(of_group, _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits + i), _mm256_or_si256(first, _mm256_slli_epi16(second, 4)));
  }
#endif
  for (; i < bytes; ++i) bits[i] = stored_bits(metadata[i]);
}

void expand(const void* values, int64_t size, const uint8_t* bits, int64_t count, void* out) {
  if (size == 1) {
    expand_elements(static_cast<const uint8_t*>(values), bits, count, static_cast<uint8_t*>(out));
  } else if (size == 2) {
    expand_elements(static_cast<const uint16_t*>(values), bits, count, static_cast<uint16_t*>(out));
  } else {
    expand_elements(static_cast<const uint32_t*>(values), bits, count, static_cast<uint32_t*>(out));
  }
}

void compress(const float* dense, const uint8_t* bits, int64_t count, void* out, Format format) {
  with_type(format, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(out);
    int64_t k = 0;
#if defined(__AVX512F__)
    for (; k + 16 <= count; k += 16) {
      uint16_t mask;
      memcpy(&mask, bits + k / 8, 2);
      const int64_t here = std::popcount(mask);
      if (here > 0) store(to, Vec(_mm512_maskz_compress_ps(mask, load(dense + k, 16).v)), here);
      to += here;
    }
#endif
    for (; k < count; ++k) {
      if (bits[k / 8] >> (k % 8) & 1) *to++ = from_float<std::remove_pointer_t<decltype(type)>>(dense[k]);
    }
  });
}

}  // namespace burnish::BURNISH_ISA
