// Sparse rows made dense and back. A row is a bitmap and its set elements, one after the other.
#include <bit>

#include "cpu/simd/level.h"
#include "math/sparse24.h"

namespace burnish::BURNISH_ISA {
namespace {

template <class T>
void expand_elements(const T* values, const uint8_t* bits, int64_t count, T* out) {
  for (int64_t k = 0; k < count; ++k) out[k] = bits[k / 8] >> (k % 8) & 1 ? *values++ : T(0);
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

void bits_of_metadata(const uint8_t* metadata, int64_t bytes, uint8_t* bits) {
  for (int64_t i = 0; i < bytes; ++i) bits[i] = stored_bits(metadata[i]);
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
    for (int64_t k = 0; k < count; ++k) {
      if (bits[k / 8] >> (k % 8) & 1) *to++ = from_float<std::remove_pointer_t<decltype(type)>>(dense[k]);
    }
  });
}

}  // namespace burnish::BURNISH_ISA
