// A call of an optimizer's step, and what kernels read of it:
//
//   take_elements  what a lane's elements need, as floats of any format; decode: moments that are 8-bit codes
//   begin_chunk    what the step is to a tensor, by one thread of the block, in double
//   each_share     a warp's 256 elements after another
//   with_step      the host's side: the table of tensors, and launches over it
//
// Learning rate, scales and steps are read on the device. A block computes what the step is to its tensor by itself.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/device_scalar.cuh"
#include "cuda/step_share.cuh"
#include "cuda/tensor_table.cuh"
#include "math/moments.h"
#include "math/optimizer.h"
#include "math/rounding.h"
#include "step_arguments.h"

namespace burnish {

constexpr int kStepThreads = 128;
constexpr int kStepBlocks = 4;       // resident at least: 128 registers a thread
constexpr size_t kStepShared = 128;  // bytes: a word and the scalars of begin_chunk
static_assert(kChunk % kStateBlock == 0);

struct alignas(16) StepTensor {
  void* parameter;
  const void* gradient;
  void* moments[kMostMoments];
  float* scales;
  void* master;
  float* average;
  const uint8_t* mask;
  float* step;
  int64_t count;
  uint16_t format, gradient_format;
  uint32_t aligned;
};

// What a launch is given. numbers(factor, lr, step, tensor) gives an element's scalars.
template <class Numbers>
struct StepCall {
  TensorTable<StepTensor> table;
  OptimizerRule rule;
  DeviceScalar lr, grad_norm, grad_scale, found_inf;
  double max_grad_norm;
  bool maximize;
  Numbers numbers;
};

// --- on the device

// The place of a moment's scale.
template <int kRun>
__device__ float* scale_of(const Share<kRun>& share, const StepTensor& tensor, int kind) {
  const int64_t blocks = (tensor.count + kStateBlock - 1) / kStateBlock;
  return tensor.scales + kind * blocks + share.first / kStateBlock;
}

template <int kRun>
__device__ void decode(const Share<kRun>& share, const StepTensor& tensor, int kind, bool is_signed,
                       float (&values)[kShare]) {
  uint8_t codes[kShare];
  share.load(static_cast<const uint8_t*>(tensor.moments[kind]), codes);
  const float scale = load(scale_of(share, tensor, kind));
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    values[i] = is_signed ? first_value(static_cast<int8_t>(codes[i]), scale) : second_value(codes[i], scale);
  }
}

// The fp32 values of the parameter, or of its master.
template <int kRun>
__device__ void take_parameter(const Share<kRun>& share, const StepTensor& tensor, Master master,
                               float (&values)[kShare]) {
  const auto format = static_cast<Format>(tensor.format);
  if (master == Master::kFloat) return take(share, tensor.master, Format::kFloat, values);
  if (master == Master::kNone) return take(share, tensor.parameter, format, values);
  uint8_t low[kShare];
  share.load(static_cast<const uint8_t*>(tensor.master), low);
  const auto joined = [&]<class T>(T) {
    T high[kShare];
    share.load(static_cast<const T*>(tensor.parameter), high);
#pragma unroll
    for (int i = 0; i < kShare; ++i) values[i] = join(high[i], low[i]);
  };
  format == Format::kBf16 ? joined(bf16()) : joined(fp16());
}

// Of the moments of Element, at least one: an array has no length 0.
template <class Element>
constexpr int kHeld = Element::kMoments > 0 ? Element::kMoments : 1;

// All that a step of these elements needs.
template <class Element, int kRun>
__device__ void take_elements(const Share<kRun>& share, const StepTensor& tensor, const OptimizerRule& rule,
                              float (&parameter)[kShare], float (&gradient)[kShare],
                              float (&moments)[kHeld<Element>][kShare]) {
  take(share, tensor.gradient, static_cast<Format>(tensor.gradient_format), gradient);
  take_parameter(share, tensor, rule.master, parameter);
#pragma unroll
  for (int k = 0; k < Element::kMoments; ++k) {
    if (rule.coded) {
      decode(share, tensor, k, Element::signed_moment(k), moments[k]);
    } else {
      take(share, tensor.moments[k], rule.moments, moments[k]);
    }
  }
}

// The step that this is.
__device__ inline float next_step(const StepTensor& tensor) { return load(tensor.step) + 1.0f; }

// What the step, of which step() says the number, is to the block's tensor; false where there is none.
template <class Scalars, class Numbers, class Step>
__device__ bool begin_chunk(const StepCall<Numbers>& call, uint32_t index, const Step& step, Scalars& scalars) {
  constexpr int kWords = sizeof(Scalars) / sizeof(uint32_t);
  static_assert(sizeof(uint32_t) + sizeof(Scalars) <= kStepShared);
  uint32_t* shared = shared_memory<uint32_t>();  // [1 + kWords]
  uint32_t words[kWords];
  if (threadIdx.x == 0) {
    const double norm = call.grad_norm.value(0), found = call.found_inf.value(0);
    const bool skipped = found != 0 || (call.found_inf.data != nullptr && !std::isfinite(norm));
    store(shared, skipped ? 0u : 1u);
    if (!skipped) {
      const double factor = gradient_factor(call.maximize, call.grad_scale.value(1), call.max_grad_norm, norm);
      scalars = call.numbers(factor, call.lr.value(0), step(), index);
      memcpy(words, &scalars, sizeof scalars);
      for (int i = 0; i < kWords; ++i) store(shared + 1 + i, words[i]);
    }
  }
  __syncthreads();
  if (load(shared) == 0) return false;
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = load(shared + 1 + i);
  memcpy(&scalars, words, sizeof scalars);
  return true;
}

// f(share) for what each lane takes of a chunk.
template <int kRun, class F>
__device__ void each_share(const StepTensor& tensor, uint32_t number, const F& f) {
  const int64_t begin = number * kChunk;
  const int64_t end = begin + kChunk < tensor.count ? begin + kChunk : tensor.count;
  const auto warp = static_cast<int64_t>(threadIdx.x / 32), lane = static_cast<int64_t>(threadIdx.x % 32);
  for (int64_t at = begin + warp * kStateBlock; at < end; at += kStepThreads / 32 * kStateBlock) {
    f(Share<kRun>{at + lane * kRun, tensor.count, tensor.aligned != 0});
  }
}

// --- on the host

inline StepTensor describe(const OptimizerTensor& from, const TensorView& step) {
  StepTensor to{};
  to.parameter = from.parameter;
  to.gradient = from.gradient;
  std::copy_n(from.moments, kMostMoments, to.moments);
  to.scales = from.scales;
  to.master = from.master;
  to.average = from.average;
  to.mask = from.mask;
  to.step = step.mutable_data_ptr<float>();
  to.count = from.count;
  to.format = static_cast<uint16_t>(from.format);
  to.gradient_format = static_cast<uint16_t>(from.gradient_format);
  uintptr_t addresses = 0;
  for (const void* one : {from.parameter, const_cast<void*>(from.gradient), from.moments[0], from.moments[1],
                          from.moments[2], from.master, static_cast<void*>(from.average)}) {
    addresses |= reinterpret_cast<uintptr_t>(one);
  }
  to.aligned = (addresses | reinterpret_cast<uintptr_t>(from.mask)) % kWidest == 0;
  return to;
}

// A call that is checked and whose table is on the device, for kernels that take a block for each chunk: `mixed` where
// one of the arrays is fp32, else `halves`.
template <class Numbers>
struct StepLaunch {
  StepCall<Numbers> call;
  bool fp32;
  unsigned blocks;
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void start(void (*mixed)(StepCall<Numbers>, Parameters...), void (*halves)(StepCall<Numbers>, Parameters...),
             size_t shared, Arguments... arguments) const {
    launch(fp32 ? mixed : halves, dim3(blocks), dim3(kStepThreads), shared, stream, call, arguments...);
  }
};

// Checks a call and runs `run` with its launch, unless there is nothing to step.
template <class Numbers, class Run>
void with_step(const StepArguments& given, const Numbers& numbers, const Run& run) {
  const CheckedStep step = check_step(given);
  if (step.tensors.empty()) return;
  const Tensor first = given.params.front();
  const int32_t device = first.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  BURNISH_CHECK(!(step.rule.random && is_capturing(stream)), given.op,
                ": seed is a number that a CUDA graph would repeat at every replay, expected none while capturing");
  bool fp32 = step.rule.master == Master::kFloat || !given.emas.empty();
  std::vector<int64_t> counts;
  for (const OptimizerTensor& one : step.tensors) {
    counts.push_back(one.count);
    fp32 |= one.format == Format::kFloat || one.gradient_format == Format::kFloat ||
            (one.moments[0] != nullptr && !step.rule.coded && step.rule.moments == Format::kFloat);
  }
  TableWriter<StepTensor> table(counts);
  for (size_t i = 0; i < counts.size(); ++i) table.set(i, describe(step.tensors[i], given.steps[i]));
  const StepCall<Numbers> call{table.upload(first),
                               step.rule,
                               device_scalar(given.lr),
                               device_scalar(given.grad_norm),
                               device_scalar(given.grad_scale),
                               device_scalar(given.found_inf),
                               given.max_grad_norm,
                               given.maximize,
                               numbers};
  run(StepLaunch<Numbers>{call, fp32, static_cast<unsigned>(table.blocks()), stream});
}

}  // namespace burnish
