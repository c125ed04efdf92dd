// int8_quantize_rows in CUDA C++: one read of x, one write of q.
//
// A row belongs to kThreads threads. Each starts all reads of its share at once, 16 bytes a read, keeps the raw bytes
// in registers, finds the row's largest magnitude together with the others and rounds from the registers. What 512
// threads cannot hold (beyond 8192 fp32 or 16384 16-bit elements) is read a second time, from L2. Rows that are not
// 16-byte aligned take the same kernel with reads of one element.
//
// Memory-bound by count: an H100 multiprocessor's share of the bandwidth, 15 bytes a cycle, brings 5 bf16 elements,
// with their q counted; its 128 lanes have 25 instructions for each, and about 12 are needed.
#include "cuda/int8_quantize_rows.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "check.h"
#include "cuda/ptx.cuh"
#include "cuda/word.cuh"
#include "math/half.h"
#include "math/int8.h"

namespace burnish {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A block has at least 4 warps, one for each scheduler of a multiprocessor.
constexpr int kMinBlock = 128;
// Resident threads that the registers must allow: with 64 bytes under way in each, four times what bandwidth asks for.
// Asked for less, ptxas spills to fit 1536 of them.
constexpr int kResident = 1024;

// 16 bytes of a row, the unit of aligned rows. kHeld units a thread are 64 bytes in flight: a full multiprocessor has
// 128 KB, where 3.35 TB/s x 600 ns / 132 = 15 KB would do, so that few resident rows are enough as well.
template <class T>
struct Wide {
  static constexpr int kElements = 4 * Word<T>::kElements;
  static constexpr int kHeld = 4;
  Bytes16 bytes{};

  __device__ void load(const T* row, int64_t unit) { bytes = load_streaming(row + unit * kElements); }
  __device__ float element(int i) const {
    constexpr int kPerWord = Word<T>::kElements;
    return Word<T>::element(bytes.word[i / kPerWord], i % kPerWord);
  }
  // lanes store 8 (4) bytes each, a warp 256 (128) consecutive ones: full lines, though not 16 bytes a lane
  static __device__ void store(int8_t* row, int64_t unit, const int32_t (&q)[kElements]) {
    struct alignas(kElements) {
      uint32_t word[kElements / 4];
    } packed{};
    for (int i = 0; i < kElements; ++i) packed.word[i / 4] |= (static_cast<uint32_t>(q[i]) & 0xffu) << (i % 4 * 8);
    burnish::store(reinterpret_cast<decltype(packed)*>(row + unit * kElements), packed);
  }
};

// One element of a row, the unit of rows without alignment; 8 of them a thread are 16 KB in flight on a multiprocessor.
template <class T>
struct Narrow {
  static constexpr int kElements = 1;
  static constexpr int kHeld = 8;
  T value{};

  __device__ void load(const T* row, int64_t unit) { value = burnish::load(row + unit); }
  __device__ float element(int) const { return to_float(value); }
  static __device__ void store(int8_t* row, int64_t unit, const int32_t (&q)[1]) {
    burnish::store(row + unit, static_cast<int8_t>(q[0]));
  }
};

// The maximum over the threads of a row.
template <int kThreads>
__device__ uint32_t row_max(uint32_t value) {
  value = reduce_max(kFullWarp, value);
  if constexpr (kThreads > 32) {
    uint32_t* of_warps = shared_memory<uint32_t>();  // [kThreads / 32]
    if (threadIdx.x % 32 == 0) store(of_warps + threadIdx.x / 32, value);
    __syncthreads();
    for (int i = 0; i < kThreads / 32; ++i) {
      const uint32_t other = load(of_warps + i);
      value = other > value ? other : value;
    }
  }
  return value;
}

template <class Unit, int kThreads, class T>
__global__ void __launch_bounds__(kThreads < kMinBlock ? kMinBlock : kThreads,
                                  kResident / (kThreads < kMinBlock ? kMinBlock : kThreads))
    int8_quantize_rows_fwd_kernel(const T* x, int64_t stride, int64_t count, int64_t width, int64_t padded, int8_t* q,
                                  float* scale) {
  dependents_start();
  constexpr int kRowsPerBlock = kThreads < kMinBlock ? kMinBlock / kThreads : 1;
  constexpr int64_t kStep = static_cast<int64_t>(kThreads) * Unit::kHeld;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
  if (row >= count) return;  // whole warps: with more than one warp a row there is one row a block
  const int lane = static_cast<int>(threadIdx.x % kThreads);
  const int64_t inputs = width / Unit::kElements;    // units of x
  const int64_t outputs = padded / Unit::kElements;  // units of q, the last ones zero
  const T* x_row = x + row * stride;
  int8_t* q_row = q + row * padded;

  const auto load = [&](Unit(&units)[Unit::kHeld], int64_t start) {
#pragma unroll
    for (int i = 0; i < Unit::kHeld; ++i) {
      const int64_t unit = start + i * kThreads + lane;
      units[i] = Unit{};
      if (unit < inputs) units[i].load(x_row, unit);
    }
  };
  uint32_t largest = 0;
  const auto measure = [&](const Unit(&units)[Unit::kHeld]) {
#pragma unroll
    for (int i = 0; i < Unit::kHeld * Unit::kElements; ++i) {
      const uint32_t bits = magnitude_bits(units[i / Unit::kElements].element(i % Unit::kElements));
      largest = bits > largest ? bits : largest;
    }
  };

  Unit held[Unit::kHeld];
  load(held, 0);
  measure(held);
  for (int64_t start = kStep; start < inputs; start += kStep) {
    Unit more[Unit::kHeld];
    load(more, start);
    measure(more);
  }
  const RowScale rule = row_scale(row_max<kThreads>(largest));

  const auto store = [&](const Unit(&units)[Unit::kHeld], int64_t start) {
#pragma unroll
    for (int i = 0; i < Unit::kHeld; ++i) {
      const int64_t unit = start + i * kThreads + lane;
      int32_t rounded[Unit::kElements];
#pragma unroll
      for (int j = 0; j < Unit::kElements; ++j) rounded[j] = quantize(units[i].element(j), rule.amax, rule.inverse);
      if (unit < outputs) Unit::store(q_row, unit, rounded);
    }
  };
  store(held, 0);
  for (int64_t start = kStep; start < outputs; start += kStep) {
    Unit more[Unit::kHeld];
    load(more, start);
    store(more, start);
  }
  if (lane == 0) burnish::store(scale + row, rule.scale);
}

template <class Unit, int kThreads, class T>
void start(const Rows& x, int8_t* q, int64_t padded, float* scale, cudaStream_t stream) {
  constexpr int kBlock = kThreads < kMinBlock ? kMinBlock : kThreads;
  constexpr int64_t kRowsPerBlock = kBlock / kThreads;
  const int64_t blocks = (x.count + kRowsPerBlock - 1) / kRowsPerBlock;
  BURNISH_CHECK(blocks < (int64_t{1} << 31), "int8_quantize_rows.native: x has ", x.count,
                " rows, more than a grid holds");
  launch(int8_quantize_rows_fwd_kernel<Unit, kThreads, T>, dim3(static_cast<unsigned>(blocks)), dim3(kBlock),
         kThreads / 32 * sizeof(uint32_t), stream, static_cast<const T*>(x.tensor.const_data_ptr()), x.stride, x.count,
         x.width, padded, q, scale);
}

// The fewest threads that hold a row in registers: small rows then share a block and nothing waits on a barrier.
template <class Unit, class T>
void start(const Rows& x, int8_t* q, int64_t padded, float* scale, cudaStream_t stream) {
  const int64_t threads = (padded + Unit::kElements * Unit::kHeld - 1) / (Unit::kElements * Unit::kHeld);
  if (threads <= 32) {
    start<Unit, 32, T>(x, q, padded, scale, stream);
  } else if (threads <= 128) {
    start<Unit, 128, T>(x, q, padded, scale, stream);
  } else {
    start<Unit, 512, T>(x, q, padded, scale, stream);
  }
}

template <class T>
void start(const Rows& x, int8_t* q, int64_t padded, float* scale, cudaStream_t stream) {
  constexpr int64_t kElements = Wide<T>::kElements;
  const auto address = reinterpret_cast<uintptr_t>(x.tensor.const_data_ptr());
  // q itself comes from PyTorch's allocator, which aligns to more than 16 bytes
  const bool wide = address % 16 == 0 && x.width % kElements == 0 && padded % kElements == 0 &&
                    (x.count == 1 || x.stride % kElements == 0);
  if (wide) {
    start<Wide<T>, T>(x, q, padded, scale, stream);
  } else {
    start<Narrow<T>, T>(x, q, padded, scale, stream);
  }
}

std::tuple<Tensor, Tensor> int8_quantize_rows(const Tensor& x) {
  BURNISH_CHECK(x.dim() >= 1, "int8_quantize_rows.native: x is a scalar, expected [..., K]");
  const DeviceGuard guard(x.get_device_index());
  const Rows rows = as_rows(x);
  Tensor q = torch::stable::new_empty(x, sizes_with_last(x, rows.width), ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, sizes_with_last(x, -1), ScalarType::Float);
  quantize_rows(rows, q.mutable_data_ptr<int8_t>(), rows.width, scale.mutable_data_ptr<float>(),
                current_stream(x.get_device_index()));
  return {q, scale};
}

}  // namespace

void quantize_rows(const Rows& x, int8_t* q, int64_t padded, float* scale, cudaStream_t stream) {
  if (x.count == 0) return;
  switch (x.tensor.scalar_type()) {
    case ScalarType::Float:
      return start<float>(x, q, padded, scale, stream);
    case ScalarType::BFloat16:
      return start<bf16>(x, q, padded, scale, stream);
    case ScalarType::Half:
      return start<fp16>(x, q, padded, scale, stream);
    default:
      BURNISH_CHECK(false, "int8_quantize_rows.native: x is not fp32, bf16 or fp16");
  }
}

}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("int8_quantize_rows.native", TORCH_BOX(&burnish::int8_quantize_rows));
}
