// The gradient of int8_linear's input: dx = dz @ w with dz in fp32 and w in int8, summed in fp32 over n in order.
//
// A block of 64 columns of dx is the unit of parallel work. For each panel of 64 channels the block's weights are
// unpacked to a 64 x 64 fp32 tile, which lives in L1, and every row of dz passes over it. A panel's sum is formed apart
// and then added to the total in scratch: two levels keep the rounding error near that of a blocked matrix product.
#include "cpu/simd/level.h"
#include "math/pack.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kTile = 64;
constexpr int kVectors = Vec::kLanes == 1 ? 8 : 4;  // vectors of columns that a microkernel holds
constexpr int kRows = Vec::kLanes == 16 ? 6 : 2;
constexpr int kColumns = kVectors * Vec::kLanes;

// tile[n][k] for channels of one panel and columns [column, column + 64), zero beyond the packed width.
void unpack_tile(const uint8_t* panel, int64_t channels, int64_t depth, int64_t column, float* tile) {
  for (int64_t k4 = 0; k4 < kTile / kDepth; ++k4) {
    const int64_t from = column / kDepth + k4;
    for (int64_t n = 0; n < channels; ++n) {
      float* out = tile + n * kTile + k4 * kDepth;
      const uint8_t* four = panel + (from * channels + n) * kDepth;
      for (int64_t i = 0; i < kDepth; ++i) {
        out[i] = from < depth ? static_cast<float>(static_cast<int32_t>(four[i]) - 128) : 0.0f;
      }
    }
  }
}

template <int MR>
void accumulate(const float* dz, int64_t dz_stride, const float* tile, int64_t channels, float* sums) {
  Vec sum[MR][kVectors];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int v = 0; v < kVectors; ++v) sum[m][v] = Vec(0.0f);
  }
  for (int64_t n = 0; n < channels; ++n) {
    Vec weight[kVectors];
    BURNISH_UNROLL for (int v = 0; v < kVectors; ++v) {
      weight[v] = load(tile + n * kTile + v * Vec::kLanes, Vec::kLanes);
    }
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      const Vec factor(dz[m * dz_stride + n]);
      BURNISH_UNROLL for (int v = 0; v < kVectors; ++v) sum[m][v] = fma(factor, weight[v], sum[m][v]);
    }
  }
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    BURNISH_UNROLL for (int v = 0; v < kVectors; ++v) {
      float* total = sums + m * kTile + v * Vec::kLanes;
      store(total, load(total, Vec::kLanes) + sum[m][v], Vec::kLanes);
    }
  }
}

}  // namespace

void int8_dx(const Int8Dx& args, int64_t block_begin, int64_t block_end, float* scratch) {
  float* tile = scratch;
  float* sums = scratch + kTile * kTile;
  const int64_t depth = round_up(args.width, kDepth) / kDepth;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t column = block * kTile;
    memset(sums, 0, static_cast<size_t>(args.rows * kTile) * sizeof(float));
    const int64_t count = args.width - column < kTile ? args.width - column : kTile;
    if (args.addend != nullptr) {
      const float* addend = args.addend + (block - block_begin) * kTile;
      for (int64_t row = 0; row < args.rows; ++row) {
        memcpy(sums + row * kTile, addend + row * args.addend_stride, static_cast<size_t>(count) * sizeof(float));
      }
    }
    for (int64_t p = 0; p * kPanel < args.channels; ++p) {
      const int64_t channels = panel_width(args.channels, p);
      unpack_tile(args.weight + p * kPanel * depth * kDepth, channels, depth, column, tile);
      const float* dz = args.dz + p * kPanel;
      for (int64_t c = 0; c < kTile; c += kColumns) {
        int64_t row = 0;
        for (; row + kRows <= args.rows; row += kRows) {
          accumulate<kRows>(dz + row * args.dz_stride, args.dz_stride, tile + c, channels, sums + row * kTile + c);
        }
        for (; row < args.rows; ++row) {
          accumulate<1>(dz + row * args.dz_stride, args.dz_stride, tile + c, channels, sums + row * kTile + c);
        }
      }
    }
    with_type(args.dx_format, [&](auto* type) {
      auto* dx = static_cast<decltype(type)>(args.dx) + column;
      for (int64_t row = 0; row < args.rows; ++row) {
        for (int64_t k = 0; k < count; k += Vec::kLanes) {
          store(dx + row * args.width + k, load(sums + row * kTile + k, count - k), count - k);
        }
      }
    });
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
