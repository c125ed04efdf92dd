// Blocks of a parameter's step: what is not fp32 is staged through buffers of a block that stay in the first-level
// cache, so that one loop over floats does the maths of every mix of formats. fp32 is worked on where it lies.
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {
namespace {

struct alignas(64) Staged {
  float parameter[kStateBlock], gradient[kStateBlock], moments[3][kStateBlock];
};

// `count` elements from `at` on as floats: where they are, or converted into `spare`.
float* take(const void* data, Format format, int64_t at, int64_t count, float* spare) {
  if (format == Format::kFloat) return static_cast<float*>(const_cast<void*>(data)) + at;
  with_type(format, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(data)) + at;
    for (int64_t i = 0; i < count; i += Vec::kLanes) store(spare + i, load(from + i, count - i), count - i);
  });
  return spare;
}

// Back from `spare`, rounded to nearest; nothing where the floats lie in their place.
void put(const float* spare, void* data, Format format, int64_t at, int64_t count) {
  if (format == Format::kFloat) return;
  with_type(format, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(data) + at;
    for (int64_t i = 0; i < count; i += Vec::kLanes) store(to + i, load(spare + i, count - i), count - i);
  });
}

template <bool kCoupled, bool kGreatest>
void step(const AdamScalars& scalars, float* parameter, const float* gradient, float* const (&moments)[3],
          int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const int64_t left = count - i;
    Vec first = load(moments[0] + i, left), second = load(moments[1] + i, left), greatest;
    if (kGreatest) greatest = load(moments[2] + i, left);
    const Vec next = adam_element<kCoupled>(scalars, load(parameter + i, left), load(gradient + i, left), first, second,
                                            kGreatest ? &greatest : nullptr);
    store(parameter + i, next, left);
    store(moments[0] + i, first, left);
    store(moments[1] + i, second, left);
    if (kGreatest) store(moments[2] + i, greatest, left);
  }
}

void step_block(const AdamTensor& tensor, const AdamRule& rule, int64_t at, int64_t count, Staged& staged) {
  const bool master = rule.master == Master::kFloat;
  float* const parameter = take(master ? tensor.master : tensor.parameter, master ? Format::kFloat : tensor.format, at,
                                count, staged.parameter);
  const float* const gradient = take(tensor.gradient, tensor.gradient_format, at, count, staged.gradient);
  const int kinds = tensor.moments[2] != nullptr ? 3 : 2;
  float* moments[3] = {};
  for (int k = 0; k < kinds; ++k) moments[k] = take(tensor.moments[k], rule.moments, at, count, staged.moments[k]);
  const auto run = rule.coupled ? (kinds == 3 ? step<true, true> : step<true, false>)
                                : (kinds == 3 ? step<false, true> : step<false, false>);
  run(tensor.scalars, parameter, gradient, moments, count);
  if (tensor.mask != nullptr) {
    for (int64_t i = 0; i < count; ++i) parameter[i] = tensor.mask[at + i] != 0 ? parameter[i] : 0.0f;
  }
  if (tensor.average != nullptr) {
    float* const average = tensor.average + at;
    for (int64_t i = 0; i < count; ++i) {
      average[i] = average[i] * rule.average_kept + parameter[i] * rule.average_taken;
    }
    if (tensor.mask != nullptr) {
      for (int64_t i = 0; i < count; ++i) average[i] = tensor.mask[at + i] != 0 ? average[i] : 0.0f;
    }
  }
  for (int k = 0; k < kinds; ++k) put(moments[k], tensor.moments[k], rule.moments, at, count);
  if (master && tensor.format == Format::kFloat) {
    memcpy(static_cast<float*>(tensor.parameter) + at, parameter, static_cast<size_t>(count) * sizeof(float));
  } else {
    put(parameter, tensor.parameter, tensor.format, at, count);
  }
}

}  // namespace

void adam_step(const AdamTensor& tensor, const AdamRule& rule, int64_t begin, int64_t end) {
  Staged staged;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * kStateBlock;
    step_block(tensor, rule, at, tensor.count - at < kStateBlock ? tensor.count - at : kStateBlock, staged);
  }
}

}  // namespace burnish::BURNISH_ISA
