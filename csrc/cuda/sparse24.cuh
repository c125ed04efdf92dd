// What the kernels of sparse24_linear share: a weight of which two of every four values along K are kept, its operands
// as bytes, its stages in shared memory, and the products of the sparse tensor cores.
//
// The weight is the instruction's sparse operand: 16 channels are its rows, 8 rows of x its columns. A step is one
// instruction deep: 32 bytes of values and 64 of x in each row, which is 32 columns of bf16 or fp16 and 64 of int8. The
// metadata of a row is in the instruction's own order: one word of it for a step of 16-bit values, two for int8.
#pragma once

#include <type_traits>

#include "cuda/format.cuh"
#include "cuda/gather.cuh"
#include "cuda/launch.cuh"
#include "cuda/operand.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tile_of.cuh"

namespace burnish {

struct Sparse24Problem {
  Operand x;  // or x quantised
  Operand values, metadata;
  const float* row_scale;  // [rows], where x is quantised
  const float* scale;      // [channels], likewise
  const void* bias;        // [channels], or null
  void* y;                 // [rows, channels]
  int32_t* special;        // [rows / special_rows, special_parts], whether x has an infinity or a NaN there; or null
  int special_rows, special_parts;
  Format bias_format;
  Format y_format;
};

template <class T>
constexpr bool kQuantised24 = std::is_same_v<T, int8_t>;
template <class T>
using Sum24 = std::conditional_t<kQuantised24<T>, int32_t, float>;
// Bytes of metadata for 128 bytes of values.
template <class T>
constexpr int kMetadataBytes = kQuantised24<T> ? 32 : 16;

// Where a unit of a row lies among rows of kUnits, 4, 8 or 16: one unit of eight rows is then in 32 different banks.
template <int kUnits>
__device__ inline int place(int row, int unit) {
  return row * kUnits + (unit ^ (kUnits == 4 ? row / 2 % 4 : row % 8));
}

// Starts the copy of a unit into shared memory, or copies it by elements; zeros beyond the rows and their width.
template <class Element, class... Policy>
__device__ inline void fetch_unit(Bytes16* slot, const Operand& from, int row, int byte, Policy... policy) {
  if (from.aligned) {
    copy_async16(slot, from.data + row * from.stride + byte, row < from.rows && byte < from.width, policy...);
  } else {
    store(slot, by_elements<Element>(from, row, byte, from.width));
  }
}

// The last unit of a row whose K is no multiple of 8, of 16-bit values: with zeros for those that stand beyond K.
__device__ inline Bytes16 last_values(const Sparse24Problem& p, int row, int byte) {
  Bytes16 unit = by_elements<uint32_t>(p.values, row, byte, p.values.width);
  const int last = p.metadata.width - 1;
  const uint32_t places = load(p.metadata.data + row * p.metadata.stride + last);
  uint32_t mask[2] = {};  // for the row's last 8 bytes
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = 8 * last + i / 2 * 4 + static_cast<int>(places >> 2 * i & 3);
    if (column < p.x.width / 2) mask[i / 2] |= 0xffffu << i % 2 * 16;
  }
  const bool upper = p.values.width - byte == 16;
  unit.word[0] &= upper ? ~0u : mask[0];
  unit.word[1] &= upper ? ~0u : mask[1];
  unit.word[2] &= mask[0];
  unit.word[3] &= mask[1];
  return unit;
}

// The weight comes from aligned memory: its rows have K rounded up to 8, so that values are whole words.
template <class T, class... Policy>
__device__ inline void fetch_values(Bytes16* slot, const Sparse24Problem& p, int row, int byte, Policy... policy) {
  const bool ragged = !kQuantised24<T> && p.x.width % 16 != 0;
  if (ragged && row < p.values.rows && byte < p.values.width && byte + 16 >= p.values.width) {
    store(slot, last_values(p, row, byte));
  } else {
    fetch_unit<uint32_t>(slot, p.values, row, byte, policy...);
  }
}

template <class... Policy>
__device__ inline void fetch_metadata(Bytes16* slot, const Operand& metadata, int row, int byte, Policy... policy) {
  if (metadata.width % 4 == 0) {
    fetch_unit<uint32_t>(slot, metadata, row, byte, policy...);
  } else {
    fetch_unit<uint8_t>(slot, metadata, row, byte, policy...);
  }
}

// A word of metadata whose zeros, which stand for what lies beyond the weight, name two places as the instruction asks:
// the first and the second.
__device__ inline uint32_t with_places(uint32_t word) {
  const uint32_t pairs = word | word >> 1;
  return word | (~(pairs | pairs >> 2) & 0x11111111u) << 2;
}

// The other two places of each four.
__device__ inline uint32_t other_places(uint32_t word) {
  const uint32_t even = (word >> 1 | ~(word >> 3)) & 0x11111111u;  // for 0, 1 and 2, 3: their digits are 4 and 14
  return word ^ 0x55555555u ^ ((even << 4) - even);
}

// Bits 15 and 31 where a word of x has an infinity or a NaN: their exponent's ones carry over.
template <class T>
__device__ inline uint32_t without_end(uint32_t word) {
  constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f807f80u : 0x7c007c00u;
  constexpr uint32_t kLowest = std::is_same_v<T, bf16> ? 0x00800080u : 0x04000400u;
  return (word & kExponent) + kLowest;
}
constexpr uint32_t kWithoutEnd = 0x80008000u;

// What a product with x takes of the weight. The instruction leaves out what is not kept, but a zero times an infinity
// is no zero: where x has one, a second product takes zeros in the places that the first left out.
enum class Places { kKept, kOthers };

// Stages in shared memory as a warp reads them, from its first channel and its first row of x on. kUnits: of values in
// a row; two are a step.
template <class T, int kUnits>
struct Stage24 {
  const Bytes16* values;     // kUnits in a row, by place()
  const Bytes16* x;          // 2 kUnits in a row, likewise
  const uint32_t* metadata;  // the stage's first word of the first channel
  int pitch;                 // words from a channel's to the next one's

  // The lane's word for 16 channels. Of 16-bit values, one for an even step and the one after it.
  __device__ uint32_t kept(int tile, int step) const {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    if constexpr (kQuantised24<T>) {
      return with_places(load(metadata + (tile * 16 + g + t % 2 * 8) * pitch + 2 * step + t / 2));
    } else {
      const uint32_t* word = metadata + (tile * 16 + g) * pitch + step / 2 * 2 + t / 2;
      return with_places(prmt(load(word), load(word + 8 * pitch), t % 2 == 0 ? 0x5410 : 0x7632));
    }
  }

  // sum[channel tile][row tile] += weight * x. Where kWatch, `seen` gets the bits of without_end.
  template <Places kPlaces, bool kWatch, int kChannelTiles, int kRowTiles>
  __device__ void multiply(Sum24<T> (&sum)[kChannelTiles][kRowTiles][4], uint32_t& seen) const {
    uint32_t words[kChannelTiles] = {};
#pragma unroll
    for (int step = 0; step < kUnits / 2; ++step) {
#pragma unroll
      for (int j = 0; j < kChannelTiles; ++j) {
        if (kQuantised24<T> || step % 2 == 0) words[j] = kept(j, step);
        if (kPlaces == Places::kOthers && step % 2 == 0) words[j] = other_places(words[j]);
      }
      if (kQuantised24<T> || step % 2 == 0) {
        multiply_step<0, kPlaces, kWatch>(sum, words, step, seen);
      } else {
        multiply_step<kQuantised24<T> ? 0 : 1, kPlaces, kWatch>(sum, words, step, seen);
      }
    }
  }

  template <int kSelector, Places kPlaces, bool kWatch, int kChannelTiles, int kRowTiles>
  __device__ void multiply_step(Sum24<T> (&sum)[kChannelTiles][kRowTiles][4], const uint32_t (&words)[kChannelTiles],
                                int step, uint32_t& seen) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    uint32_t a[kChannelTiles][4] = {};
    if constexpr (kPlaces == Places::kKept) {
#pragma unroll
      for (int j = 0; j < kChannelTiles; ++j) {
        load_matrix(a[j], values + place<kUnits>(j * 16 + lane % 16, step * 2 + lane / 16));
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t b[4];
      load_matrix(b, x + place<2 * kUnits>(i * 8 + lane % 8, step * 4 + lane / 8));
      if constexpr (kWatch) {
#pragma unroll
        for (int word = 0; word < 4; ++word) seen |= without_end<T>(b[word]);
      }
#pragma unroll
      for (int j = 0; j < kChannelTiles; ++j) mma_sparse<T, kSelector>(sum[j][i], a[j], b, words[j]);
    }
  }
};

// An element of y before it is rounded.
template <class T>
__device__ inline float finished(const Sparse24Problem& p, Sum24<T> total, float row_scale, float scale, float bias) {
  float z = static_cast<float>(total);
  if constexpr (kQuantised24<T>) z = z * (row_scale * scale);
  return p.bias != nullptr ? z + bias : z;
}

// Stores four neighbours of a row of y, which are whole fours.
__device__ inline void store_four(void* y, int64_t first, Format format, const float (&z)[4]) {
  if (format == Format::kFloat) {
    store(reinterpret_cast<Bytes16*>(static_cast<float*>(y) + first),
          Bytes16{{float_bits(z[0]), float_bits(z[1]), float_bits(z[2]), float_bits(z[3])}});
    return;
  }
  const auto half = [&](int i) -> uint64_t {
    return format == Format::kBf16 ? from_float<bf16>(z[i]).bits : from_float<fp16>(z[i]).bits;
  };
  store(reinterpret_cast<uint64_t*>(static_cast<uint16_t*>(y) + first),
        half(0) | half(1) << 16 | half(2) << 32 | half(3) << 48);
}

// Stores a block's share of a tile's rows from sums in shared memory, by 256 threads; each takes four channels of the
// rows that are its turn. Where the tile is the block's alone they are neighbours; where lanes read words of other
// blocks, they are neighbours of one another, for 32 different banks.
template <class S, bool kAlone>
__device__ void finish_tile(const Sparse24Problem& p, const Sum24<typename S::T>* sums, int first_channel,
                            int first_row, int splits, int thread) {
  using T = typename S::T;
  const int channels = p.values.rows, rank = static_cast<int>(blockIdx.x) % splits, share = S::kRows / splits;
  constexpr int kAcross = S::kChannels / 4, kTogether = 256 / kAcross;
  const int across = thread % kAcross, apart = kAlone ? 1 : kAcross;
  const int column = kAlone ? across * 4 : across, channel = first_channel + column;
  float bias[4] = {}, scale[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (channel + i * apart >= channels) continue;
    if (p.bias != nullptr) bias[i] = load_as_float(p.bias, channel + i * apart, p.bias_format);
    if (kQuantised24<T>) scale[i] = load(p.scale + channel + i * apart);
  }
#pragma unroll 1
  for (int at = thread / kAcross; at < share; at += kTogether) {
    const int in_tile = rank * share + at, row = first_row + in_tile;
    if (row >= p.x.rows || channel >= channels) continue;
    const Sum24<T>* from = sums + in_tile * S::kPitch + column;
    Sum24<T> total[4] = {};
    if (kAlone) {
      const Bytes16 own = load(reinterpret_cast<const Bytes16*>(from));
      memcpy(total, own.word, sizeof total);
    }
#pragma unroll 1
    for (int other = 0; !kAlone && other < splits; ++other) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += load_remote(from + i * apart, static_cast<unsigned>(other));
    }
    const float row_scale = kQuantised24<T> ? load(p.row_scale + row) : 1.0f;
    float z[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) z[i] = finished<T>(p, total[i], row_scale, scale[i], bias[i]);
    const int64_t first = static_cast<int64_t>(row) * channels + channel;
    if (kAlone && channels % 4 == 0) {
      store_four(p.y, first, p.y_format, z);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (channel + i * apart < channels) store_from_float(p.y, first + i * apart, p.y_format, z[i]);
      }
    }
  }
}

}  // namespace burnish
