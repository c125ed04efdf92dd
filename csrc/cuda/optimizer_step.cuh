// The step of an optimizer as a kernel: an op is a .cu with its numbers and the element of math/<optimizer>.h.
//
//   step_call.cuh    what a kernel is given and reads, and its launch
//   encode           moments as 8-bit codes, whose scale a warp finds by one maximum
//   group_words      the generator's words for a lane, drawn once for all that is rounded at random
//   draw             the randomness of put_random, of them
//   step_elements    a warp's 256 elements: everything is read once and written once
//   start_step       the host's side
//
// Blocks draw a ticket of their tensor once they have read its step, and the last one writes it down: all others have
// read it by then.
#pragma once

#include "cuda/step_call.cuh"

namespace burnish {

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

// The words in the order in which a stream takes them.
__device__ inline Philox turned(const Philox& words, uint32_t stream) {
  Philox turned;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) turned.word[i] = words.word[(i + stream - 1) % 4];
  return turned;
}

// A call of the generator decides 8 neighbours: with runs of 4, a lane calls it for one of its two runs. Zeros where
// nothing of the tensor is rounded at random.
template <int kRun>
__device__ Philox group_words(const Share<kRun>& share, const StepTensor& tensor, const OptimizerRule& rule,
                              uint32_t index) {
  static_assert(kRun == kRoundingGroup || (2 * kRun == kRoundingGroup && Share<kRun>::kRuns == 2));
  const bool parameter = rule.master == Master::kNone && static_cast<Format>(tensor.format) != Format::kFloat;
  if (!rule.random || !(parameter || rule.moments == Format::kBf16)) return {};
  const int run = kRun < kRoundingGroup && threadIdx.x % 2 != 0 ? 1 : 0;
  return rounding_words(rule.seed, index, static_cast<uint64_t>(share.start(run)) / kRoundingGroup);
}

// Sixteen random bits for each element, two in a word. With runs of 4, a lane trades halves of its words with the lane
// that has the others.
template <int kRun>
__device__ void draw(const Philox& drawn, uint32_t stream, uint32_t (&random)[kShare / 2]) {
  const Philox words = turned(drawn, stream);
  if constexpr (kRun == kRoundingGroup) {
#pragma unroll
    for (int i = 0; i < kShare / 2; ++i) random[i] = words.word[i];
  } else {
    const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t kept = odd ? words.word[2 + i] : words.word[i];
      const uint32_t got = shuffle_xor(kFullWarp, odd ? words.word[i] : words.word[2 + i], 1);
      random[i] = odd ? got : kept;
      random[2 + i] = odd ? kept : got;
    }
  }
}

template <int kRun>
__device__ void put_random(const Share<kRun>& share, const float (&values)[kShare], void* data, Format format,
                           const uint32_t (&random)[kShare / 2]) {
  const auto rounded = [&]<class T>(T) {
    T stored[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      stored[i] = round_random<T>(values[i], random[i / 2] >> 16 * (i % 2) & 0xffffu);
    }
    share.store(static_cast<T*>(data), stored);
  };
  format == Format::kBf16 ? rounded(bf16()) : rounded(fp16());
}

template <int kRun>
__device__ void put_parameter(const Share<kRun>& share, const float (&values)[kShare], const StepTensor& tensor,
                              const OptimizerRule& rule, const Philox& words) {
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
    draw<kRun>(words, 1, random);
    put_random(share, values, tensor.parameter, format, random);
  } else {
    put(share, values, tensor.parameter, format);
  }
}

// The parameter to where it belongs, with what follows it: mask, average, master.
template <int kRun>
__device__ void finish_parameter(const Share<kRun>& share, float (&values)[kShare], const StepTensor& tensor,
                                 const OptimizerRule& rule, const Philox& words) {
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
  put_parameter(share, values, tensor, rule, words);
}

template <class Element, int kRun>
__device__ void step_elements(const Share<kRun>& share, const StepTensor& tensor,
                              const typename Element::Scalars& scalars, const OptimizerRule& rule, uint32_t index) {
  float parameter[kShare], gradient[kShare], moments[kHeld<Element>][kShare];
  take_elements<Element>(share, tensor, rule, parameter, gradient, moments);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    float held[kHeld<Element>];
#pragma unroll
    for (int k = 0; k < Element::kMoments; ++k) held[k] = moments[k][i];
    parameter[i] = Element::step(scalars, parameter[i], gradient[i], held);
#pragma unroll
    for (int k = 0; k < Element::kMoments; ++k) moments[k][i] = held[k];
  }
  const Philox words = group_words(share, tensor, rule, index);
#pragma unroll
  for (int k = 0; k < Element::kMoments; ++k) {
    if (rule.coded) {
      encode(share, moments[k], tensor, k, Element::signed_moment(k));
    } else if (rule.random && rule.moments == Format::kBf16) {
      uint32_t random[kShare / 2];
      draw<kRun>(words, static_cast<uint32_t>(2 + k), random);
      put_random(share, moments[k], tensor.moments[k], rule.moments, random);
    } else {
      put(share, moments[k], tensor.moments[k], rule.moments);
    }
  }
  finish_parameter(share, parameter, tensor, rule, words);
}

// The step that this is, of which the tensor's last block keeps count.
__device__ inline float count_step(const StepTensor& tensor, uint32_t* ticket) {
  const float step = next_step(tensor);
  const auto blocks = static_cast<uint32_t>(chunks_of(tensor.count));
  if (blocks == 1 || draw_ticket(ticket) == blocks - 1) {
    store(tensor.step, step);
    store(ticket, 0u);
  }
  return step;
}

// The body of a step's kernel.
template <class Element, int kRun, class Numbers>
__device__ void step_chunk(const StepCall<Numbers>& call) {
  const Chunk chunk = load(call.table.chunks + blockIdx.x);
  const StepTensor tensor = call.table.entry(chunk.tensor);
  const auto step = [&] { return count_step(tensor, call.table.tickets + chunk.tensor); };
  typename Element::Scalars scalars;
  if (!begin_chunk(call, chunk.tensor, step, scalars)) return;
  each_share<kRun>(tensor, chunk.number, [&](const Share<kRun>& share) {
    step_elements<Element>(share, tensor, scalars, call.rule, chunk.tensor);
  });
}

template <class Numbers>
void start_step(const StepArguments& given, const Numbers& numbers, void (*mixed)(StepCall<Numbers>),
                void (*halves)(StepCall<Numbers>)) {
  with_step(given, numbers, [&](const StepLaunch<Numbers>& launch) { launch.start(mixed, halves, kStepShared); });
}

}  // namespace burnish
