// lamb_squares in CUDA C++, which lamb_step begins with: one launch that reads everything once.
//
// The sums have the bits of those on the CPU, which adds 256 elements, then the sums of 64 such, then those, each in
// its order; and of 256 elements element i to sum i % 32 of 32, which are added last. So a warp trades its lanes'
// elements, the neighbours that an access brings, for those of a sum, through shared memory. The sums of lanes stay
// there until the block has its 16384 elements, when each of its threads adds 32 of them, and one thread those of 64
// blocks: 96 additions one after another where the block has read 256 KB of fp32, and other blocks read on. The block
// that draws the last ticket of a tensor adds the sums of its chunks.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/lamb.cuh"

namespace burnish {
namespace {

constexpr const char* kOp = "lamb_squares";
constexpr int kLanes = 32, kWarps = kStepThreads / kLanes;
constexpr int kBlocks = static_cast<int>(kChunk / kStateBlock);
constexpr int kPitch =
    kLanes + 1;  // doubles from a block's sums to the next's: threads beside each other in other banks
static_assert(kStepThreads == 2 * kBlocks, "a thread for each of a chunk's sums");

// Shared memory, after what begin_chunk has there.
constexpr size_t kTrading = kWarps * kStateBlock * sizeof(float), kSums = 2 * kBlocks * kPitch * sizeof(double);
constexpr size_t kShared = kStepShared + kTrading + kSums;
static_assert(kTrading >= kStepThreads * sizeof(Bytes16) && kTrading >= 2 * kBlocks * sizeof(double));

template <class T>
__device__ T* trading_place() {
  return reinterpret_cast<T*>(shared_memory<unsigned char>() + kStepShared);
}

// [2, kBlocks, kPitch]: of parameters, then of updates.
__device__ double* sums_of_lanes() {
  return reinterpret_cast<double*>(shared_memory<unsigned char>() + kStepShared + kTrading);
}

// This lane's sum of the 32 of a warp's elements.
template <int kRun>
__device__ double sum_lane(const float (&values)[kShare]) {
  constexpr int kUnit = sizeof(Bytes16) / sizeof(float);
  const auto warp = static_cast<int>(threadIdx.x / kLanes), lane = static_cast<int>(threadIdx.x % kLanes);
  float* traded = trading_place<float>() + warp * kStateBlock;
#pragma unroll
  for (int i = 0; i < kShare; i += kUnit) {
    Bytes16 bytes;
    memcpy(&bytes, values + i, sizeof bytes);
    store(reinterpret_cast<Bytes16*>(traded + lane * kRun + i / kRun * Share<kRun>::kPitch + i % kRun), bytes);
  }
  __syncwarp();
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const double value = load(traded + lane + i * kLanes);
    sum = std::fma(value, value, sum);
  }
  __syncwarp();
  return sum;
}

template <int kRun>
__device__ void sum_share(const Share<kRun>& share, const StepTensor& tensor, const LambScalars& scalars,
                          const OptimizerRule& rule) {
  float parameter[kShare], update[kShare], moments[kHeld<LambElement>][kShare];
  take_elements<LambElement>(share, tensor, rule, parameter, update, moments);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    float held[] = {moments[0][i], moments[1][i]};
    const float moved = LambElement::update(scalars, parameter[i], update[i], held);
    update[i] = share.has(i) ? moved : 0.0f;
  }
  if (tensor.mask != nullptr) {
    uint8_t mask[kShare];
    share.load(tensor.mask, mask);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      parameter[i] = mask[i] != 0 ? parameter[i] : 0.0f;
      update[i] = mask[i] != 0 ? update[i] : 0.0f;
    }
  }
  const auto block = static_cast<int>(share.first % kChunk / kStateBlock);
  double* sums = sums_of_lanes() + block * kPitch + threadIdx.x % kLanes;
  store(sums, sum_lane<kRun>(parameter));
  store(sums + kBlocks * kPitch, sum_lane<kRun>(update));
}

// The chunk's two sums, in thread 0, of the sums of lanes of its first blocks.
__device__ void sum_chunk(int blocks, double (&sums)[2]) {
  const auto thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  double sum = 0;
  if (thread % kBlocks < blocks) {
#pragma unroll 8
    for (int lane = 0; lane < kLanes; ++lane) sum += load(sums_of_lanes() + thread * kPitch + lane);
  }
  store(trading_place<double>() + thread, sum);
  __syncthreads();
  if (thread != 0) return;
  sums[0] = sums[1] = 0;
#pragma unroll 8
  for (int block = 0; block < kBlocks; ++block) {
    sums[0] += load(trading_place<double>() + block);
    sums[1] += load(trading_place<double>() + kBlocks + block);
  }
}

// The sums of a tensor's chunks, in thread 0.
__device__ void sum_chunks(const Bytes16* parts, int64_t chunks, double (&sums)[2]) {
  const auto thread = static_cast<int64_t>(threadIdx.x);
  Bytes16* read = trading_place<Bytes16>();
  sums[0] = sums[1] = 0;
  for (int64_t from = 0; from < chunks; from += kStepThreads) {
    const int64_t count = chunks - from < kStepThreads ? chunks - from : kStepThreads;
    if (thread < count) store(read + thread, load_coherent(parts + from + thread));
    __syncthreads();
    if (thread == 0) {
#pragma unroll 4
      for (int64_t i = 0; i < count; ++i) {
        const Bytes16 bytes = load(read + i);
        double part[2];
        memcpy(part, &bytes, sizeof part);
        sums[0] += part[0];
        sums[1] += part[1];
      }
    }
    __syncthreads();
  }
}

__device__ void store_sums(double* squares, const double (&sums)[2]) {
  store(squares, sums[0]);
  store(squares + 1, sums[1]);
}

// `parts` are 16 bytes for each block.
template <int kRun>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks)
    lamb_squares_fwd_kernel(StepCall<LambRule> call, Bytes16* parts, double* squares) {
  const Chunk chunk = load(call.table.chunks + blockIdx.x);
  const StepTensor tensor = call.table.entry(chunk.tensor);
  uint32_t* ticket = call.table.tickets + chunk.tensor;
  double sums[2] = {};
  squares += 2 * chunk.tensor;
  LambScalars scalars;
  if (!begin_chunk(call, chunk.tensor, [&] { return next_step(tensor); }, scalars)) {
    if (threadIdx.x == 0 && chunk.number == 0) store_sums(squares, sums);
    return;
  }
  each_share<kRun>(tensor, chunk.number,
                   [&](const Share<kRun>& share) { sum_share(share, tensor, scalars, call.rule); });
  const int64_t chunks = chunks_of(tensor.count), begin = chunk.number * kChunk;
  const int64_t count = tensor.count - begin < kChunk ? tensor.count - begin : kChunk;
  sum_chunk(static_cast<int>((count + kStateBlock - 1) / kStateBlock), sums);
  if (chunks == 1) {
    if (threadIdx.x == 0) store_sums(squares, sums);
    return;
  }
  uint32_t* last = shared_memory<uint32_t>();
  if (threadIdx.x == 0) {
    Bytes16 bytes;
    memcpy(&bytes, sums, sizeof bytes);
    store(parts + blockIdx.x, bytes);
    store(last, draw_ticket(ticket) == static_cast<uint32_t>(chunks - 1) ? 1u : 0u);
  }
  __syncthreads();
  if (load(last) == 0) return;
  sum_chunks(parts + (blockIdx.x - chunk.number), chunks, sums);
  if (threadIdx.x != 0) return;
  store_sums(squares, sums);
  store(ticket, 0u);
}

Tensor lamb_squares(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& scales, const Tensors& masters, const Tensors& emas,
                    const Tensors& masks, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                    bool bias_correction, bool maximize, double ema_decay, double max_grad_norm,
                    const std::optional<Tensor>& grad_norm, const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf, std::optional<int64_t> seed) {
  const LambNumbers numbers{beta1, beta2, eps, weight_decay, bias_correction};
  numbers.check(kOp);
  const StepArguments given{.op = kOp,
                            .params = params,
                            .grads = grads,
                            .steps = steps,
                            .moments = {{"exp_avgs", exp_avgs, true}, {"exp_avg_sqs", exp_avg_sqs, false}},
                            .scales = scales,
                            .masters = masters,
                            .emas = emas,
                            .masks = masks,
                            .lr = lr,
                            .maximize = maximize,
                            .ema_decay = ema_decay,
                            .max_grad_norm = max_grad_norm,
                            .grad_norm = grad_norm,
                            .grad_scale = grad_scale,
                            .found_inf = found_inf,
                            .seed = seed};
  Tensor squares = torch::stable::new_empty(lr, {static_cast<int64_t>(params.size()), 2}, ScalarType::Double);
  with_step(given, LambRule{numbers, false, false, nullptr},
            [&](const StepLaunch<LambRule>& step) { sum_lamb_squares(step, lr, squares.mutable_data_ptr<double>()); });
  return squares;
}

}  // namespace

void sum_lamb_squares(const StepLaunch<LambRule>& step, const Tensor& like, double* squares) {
  const Tensor parts = torch::stable::new_empty(like, {static_cast<int64_t>(step.blocks), 2}, ScalarType::Double);
  auto* to = reinterpret_cast<Bytes16*>(parts.mutable_data_ptr<double>());
  step.start(lamb_squares_fwd_kernel<4>, lamb_squares_fwd_kernel<8>, kShared, to, squares);
}

}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("lamb_squares.native", TORCH_BOX(&burnish::lamb_squares));
}
