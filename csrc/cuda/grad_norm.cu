// grad_norm in CUDA C++: one launch that reads every gradient once.
//
// A block sums the squares of a chunk in double, where none overflows and each is exact, and stores its sum; the block
// that draws the last ticket adds those of all blocks. Who sums what depends on the tensors' sizes alone, so the result
// is the same in every run.
//
// A thread converts and adds 4 or 8 elements for each 16 bytes that it reads: half a double operation for a byte of
// bf16. An H100 multiprocessor's share of the bandwidth, 15 bytes a cycle, asks 8 of its 64 lanes for double.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/device_scalar.cuh"
#include "cuda/tensor_table.cuh"
#include "cuda/word.cuh"
#include "step_arguments.h"

namespace burnish {
namespace {

constexpr const char* kOp = "grad_norm";
constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;

struct alignas(16) NormTensor {
  const void* data;
  int64_t count;
  uint64_t format, aligned;
};

// The sum over the threads of a block, in every one of them; always in the same order.
__device__ double sum_block(double sum) {
  double* of_warps = shared_memory<double>();  // [kNormWarps]
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) sum += shuffle_xor(kFullWarp, sum, bits);
  if (threadIdx.x % 32 == 0) store(of_warps + threadIdx.x / 32, sum);
  __syncthreads();
  double all = 0;
#pragma unroll
  for (int i = 0; i < kNormWarps; ++i) all += load(of_warps + i);
  __syncthreads();
  return all;
}

__device__ double with_square(double sum, float value) {
  return std::fma(static_cast<double>(value), static_cast<double>(value), sum);
}

// This thread's part of the squares of elements [begin, end).
template <class T>
__device__ double sum_squares(const T* data, bool aligned, int64_t begin, int64_t end) {
  constexpr int kPerWord = Word<T>::kElements, kPerUnit = 4 * kPerWord;
  const auto thread = static_cast<int64_t>(threadIdx.x);
  const int64_t units = aligned ? (end - begin) / kPerUnit : 0;
  double sum = 0;
#pragma unroll 4
  for (int64_t unit = thread; unit < units; unit += kNormThreads) {
    const Bytes16 bytes = load_streaming(data + begin + unit * kPerUnit);
#pragma unroll
    for (int i = 0; i < kPerUnit; ++i) sum = with_square(sum, Word<T>::element(bytes.word[i / kPerWord], i % kPerWord));
  }
  for (int64_t i = begin + units * kPerUnit + thread; i < end; i += kNormThreads) {
    sum = with_square(sum, to_float(load(data + i)));
  }
  return sum;
}

__device__ double sum_chunk(const NormTensor& tensor, uint32_t number) {
  const int64_t begin = number * kChunk, end = begin + kChunk < tensor.count ? begin + kChunk : tensor.count;
  const auto sum = [&]<class T>(T) {
    return sum_squares(static_cast<const T*>(tensor.data), tensor.aligned != 0, begin, end);
  };
  switch (static_cast<Format>(tensor.format)) {
    case Format::kBf16:
      return sum(bf16());
    case Format::kFp16:
      return sum(fp16());
    default:
      return sum(float());
  }
}

// `sums` has a double for each block, and is even in number: the last block fills what is left.
__global__ void __launch_bounds__(kNormThreads, 4)
    grad_norm_fwd_kernel(TensorTable<NormTensor> table, DeviceScalar grad_scale, double* sums, float* norm,
                         float* found) {
  const Chunk chunk = load(table.chunks + blockIdx.x);
  const double own = sum_block(sum_chunk(table.entry(chunk.tensor), chunk.number));
  uint32_t* last = shared_memory<uint32_t>();
  if (threadIdx.x == 0) {
    store(sums + blockIdx.x, own);
    if (blockIdx.x == gridDim.x - 1 && gridDim.x % 2 != 0) store(sums + gridDim.x, 0.0);
    store(last, draw_ticket(table.tickets) == gridDim.x - 1 ? 1u : 0u);
  }
  __syncthreads();
  if (load(last) == 0) return;
  __syncthreads();

  double total = 0;
  for (unsigned i = 2 * threadIdx.x; i < gridDim.x; i += 2 * kNormThreads) {
    const Bytes16 bytes = load_coherent(reinterpret_cast<const Bytes16*>(sums + i));
    double pair[2];
    memcpy(pair, &bytes, sizeof bytes);
    total += pair[0];
    total += pair[1];
  }
  total = sum_block(total);
  if (threadIdx.x != 0) return;
  store(norm, static_cast<float>(std::sqrt(total) / grad_scale.value(1)));
  store(found, std::isfinite(total) ? 0.0f : 1.0f);
  store(table.tickets, 0u);
}

std::tuple<Tensor, Tensor> grad_norm(const Tensors& grads, const std::optional<Tensor>& grad_scale) {
  BURNISH_CHECK(!grads.empty(), kOp, ": grads is empty, expected at least one tensor");
  const Tensor first = grads.front();
  check_scalar(kOp, "grad_scale", grad_scale, first);
  for (size_t i = 0; i < grads.size(); ++i) check_floating(kOp, {"grads", i}, grads[i], first);
  const DeviceGuard guard(first.get_device_index());
  std::vector<TensorView> flat(grads.begin(), grads.end());
  std::vector<Tensor> copies;  // of those with gaps
  std::vector<int64_t> counts;
  for (TensorView& grad : flat) {
    if (!is_dense(grad)) grad = copies.emplace_back(torch::stable::contiguous(grad));
    counts.push_back(grad.numel());
  }
  TableWriter<NormTensor> table(counts);
  for (size_t i = 0; i < flat.size(); ++i) {
    const void* data = flat[i].const_data_ptr();
    table.set(i, {data, counts[i], static_cast<uint64_t>(format_of(flat[i].scalar_type())),
                  reinterpret_cast<uintptr_t>(data) % sizeof(Bytes16) == 0});
  }
  const Tensor sums = torch::stable::new_empty(first, {(table.blocks() + 1) / 2 * 2}, ScalarType::Double);
  Tensor norm = torch::stable::new_empty(first, {}, ScalarType::Float);
  Tensor found = torch::stable::new_empty(first, {}, ScalarType::Float);
  launch(grad_norm_fwd_kernel, dim3(static_cast<unsigned>(table.blocks())), dim3(kNormThreads),
         kNormWarps * sizeof(double), current_stream(first.get_device_index()), table.upload(first),
         device_scalar(grad_scale), static_cast<double*>(sums.mutable_data_ptr()), norm.mutable_data_ptr<float>(),
         found.mutable_data_ptr<float>());
  return {norm, found};
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("grad_norm.native", TORCH_BOX(&burnish::grad_norm));
}
