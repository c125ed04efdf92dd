// The step of an optimizer as a kernel: an op is a .cu with its numbers and the element of math/<optimizer>.h.
//
//   step_share.cuh    what a lane has of a block of 256 elements, as floats from and to any format
//   decode, encode    moments as 8-bit codes, whose scale a warp finds by one maximum
//   step_elements     a warp's 256 elements: everything is read once and written once
//   begin_chunk       what the step is to a tensor, by one thread of the block, in double
//   start_step        the host's side: the table of tensors, and the launch
//
// Learning rate, scales and steps are read on the device. A block computes what the step is to its tensor by itself;
// blocks draw a ticket of the tensor once they have read its step, and the last one writes it down: all others have
// read it by then.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/device_scalar.cuh"
#include "cuda/step_share.cuh"
#include "cuda/tensor_table.cuh"
#include "math/moments.h"
#include "math/optimizer.h"
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

// What a launch is given. numbers(factor, lr, step) gives an element's scalars.
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

template <int kRun>
__device__ void encode(const Share<kRun>& share, const float (&values)[kShare], const StepTensor& tensor, int kind,
                       bool is_signed) {
  float roots[kShare];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    roots[i] = is_signed ? first_root(values[i]) : second_root(values[i]);
    const uint32_t bits = share.has(i) ? float_bits(roots[i]) & 0x7fffffffu : 0;
    largest = bits > largest ? bits : largest;
  }
  const CodeScale code = code_scale(reduce_max(kFullWarp, largest), is_signed ? kFirstLimit : kSecondLimit);
  uint8_t codes[kShare];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    codes[i] = is_signed ? static_cast<uint8_t>(first_code(values[i], roots[i], code.inverse))
                         : second_code(roots[i], code.inverse);
  }
  share.store(static_cast<uint8_t*>(tensor.moments[kind]), codes);
  if (threadIdx.x % 32 == 0) store(scale_of(share, tensor, kind), code.scale);
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

template <int kRun>
__device__ void put_parameter(const Share<kRun>& share, const float (&values)[kShare], const StepTensor& tensor,
                              const OptimizerRule& rule, uint32_t index) {
  const auto format = static_cast<Format>(tensor.format);
  if (rule.master == Master::kSplit) {
    const auto halved = [&]<class T>(T) {
      T high[kShare];
      uint8_t low[kShare];
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        const Split parts = split<T>(values[i]);
        high[i].bits = parts.high;
        low[i] = parts.low;
      }
      share.store(static_cast<T*>(tensor.parameter), high);
      share.store(static_cast<uint8_t*>(tensor.master), low);
    };
    return format == Format::kBf16 ? halved(bf16()) : halved(fp16());
  }
  if (rule.master == Master::kFloat) put(share, values, tensor.master, Format::kFloat);
  if (rule.master == Master::kNone && rule.random && format != Format::kFloat) {
    uint32_t random[kShare / 2];
    draw(share, rule, index, 1, random);
    put_random(share, values, tensor.parameter, format, random);
  } else {
    put(share, values, tensor.parameter, format);
  }
}

// The parameter to where it belongs, with what follows it: mask, average, master.
template <int kRun>
__device__ void finish_parameter(const Share<kRun>& share, float (&values)[kShare], const StepTensor& tensor,
                                 const OptimizerRule& rule, uint32_t index) {
  uint8_t mask[kShare];
  if (tensor.mask != nullptr) {
    share.load(tensor.mask, mask);
#pragma unroll
    for (int i = 0; i < kShare; ++i) values[i] = mask[i] != 0 ? values[i] : 0.0f;
  }
  if (tensor.average != nullptr) {
    float average[kShare];
    share.load(static_cast<const float*>(tensor.average), average);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      average[i] = average[i] * rule.average_kept + values[i] * rule.average_taken;
      if (tensor.mask != nullptr) average[i] = mask[i] != 0 ? average[i] : 0.0f;
    }
    share.store(tensor.average, average);
  }
  put_parameter(share, values, tensor, rule, index);
}

template <class Element, int kRun>
__device__ void step_elements(const Share<kRun>& share, const StepTensor& tensor,
                              const typename Element::Scalars& scalars, const OptimizerRule& rule, uint32_t index) {
  constexpr int kKept = Element::kMoments > 0 ? Element::kMoments : 1;
  float parameter[kShare], gradient[kShare], moments[kKept][kShare];
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
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    float held[kKept];
#pragma unroll
    for (int k = 0; k < Element::kMoments; ++k) held[k] = moments[k][i];
    parameter[i] = Element::step(scalars, parameter[i], gradient[i], held);
#pragma unroll
    for (int k = 0; k < Element::kMoments; ++k) moments[k][i] = held[k];
  }
#pragma unroll
  for (int k = 0; k < Element::kMoments; ++k) {
    if (rule.coded) {
      encode(share, moments[k], tensor, k, Element::signed_moment(k));
    } else if (rule.random && rule.moments == Format::kBf16) {
      uint32_t random[kShare / 2];
      draw(share, rule, index, static_cast<uint32_t>(2 + k), random);
      put_random(share, moments[k], tensor.moments[k], rule.moments, random);
    } else {
      put(share, moments[k], tensor.moments[k], rule.moments);
    }
  }
  finish_parameter(share, parameter, tensor, rule, index);
}

// The step that this is.
__device__ inline float count_step(const StepTensor& tensor, uint32_t* ticket) {
  const float step = load(tensor.step) + 1.0f;
  const auto blocks = static_cast<uint32_t>(chunks_of(tensor.count));
  if (blocks == 1 || draw_ticket(ticket) == blocks - 1) {
    store(tensor.step, step);
    store(ticket, 0u);
  }
  return step;
}

// What the step is to the block's tensor; false where there is none.
template <class Scalars, class Numbers>
__device__ bool begin_chunk(const StepCall<Numbers>& call, const StepTensor& tensor, uint32_t index, Scalars& scalars) {
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
      scalars = call.numbers(factor, call.lr.value(0), count_step(tensor, call.table.tickets + index));
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

// The body of a step's kernel.
template <class Element, int kRun, class Numbers>
__device__ void step_chunk(const StepCall<Numbers>& call) {
  const Chunk chunk = load(call.table.chunks + blockIdx.x);
  const StepTensor tensor = call.table.entry(chunk.tensor);
  typename Element::Scalars scalars;
  if (!begin_chunk(call, tensor, chunk.tensor, scalars)) return;
  const int64_t begin = chunk.number * kChunk;
  const int64_t end = begin + kChunk < tensor.count ? begin + kChunk : tensor.count;
  const auto warp = static_cast<int64_t>(threadIdx.x / 32), lane = static_cast<int64_t>(threadIdx.x % 32);
  for (int64_t at = begin + warp * kStateBlock; at < end; at += kStepThreads / 32 * kStateBlock) {
    step_elements<Element>(Share<kRun>{at + lane * kRun, tensor.count, tensor.aligned != 0}, tensor, scalars, call.rule,
                           chunk.tensor);
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

// Checks a call and starts the kernel for its arrays: `mixed` where one of them is fp32, else `halves`.
template <class Numbers>
void start_step(const StepArguments& given, const Numbers& numbers, void (*mixed)(StepCall<Numbers>),
                void (*halves)(StepCall<Numbers>)) {
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
  launch(fp32 ? mixed : halves, dim3(static_cast<unsigned>(table.blocks())), dim3(kStepThreads), kStepShared, stream,
         call);
}

}  // namespace burnish
