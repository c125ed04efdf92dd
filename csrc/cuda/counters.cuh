// Counters that kernels find as they left them, so that no launch of its own has to clear them.
//
// Each stream keeps some from call to call: its kernels follow one another. A CUDA graph may be replayed beside its
// stream's other work, so it gets counters of its own, which it clears at every replay.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <utility>

#include "cuda/launch.cuh"

namespace burnish {

struct Counters {
  static constexpr int64_t kTickets = 4096;
  torch::stable::Tensor memory;

  // For grid_barrier, which alone may use it.
  uint32_t* barrier() const { return static_cast<uint32_t*>(memory.mutable_data_ptr()); }
  // For tickets: zero, and whoever draws the last number stores a zero.
  uint32_t* tickets() const { return barrier() + 1; }
};

// Counters for a kernel on `like`'s device and current stream.
inline Counters counters_of(const torch::stable::Tensor& like) {
  const int32_t device = like.get_device_index();
  const cudaStream_t stream = current_stream(device);
  const auto made = [&]() -> Counters {
    return {torch::stable::new_zeros(like, {1 + Counters::kTickets}, torch::headeronly::ScalarType::Int)};
  };
  if (is_capturing(stream)) return made();
  // never destroyed: at exit there may be no device any more
  static std::mutex& mutex = *new std::mutex;
  static auto& kept = *new std::map<std::pair<int32_t, cudaStream_t>, Counters>;
  const std::lock_guard lock(mutex);
  const auto found = kept.find({device, stream});
  return found != kept.end() ? found->second : kept.emplace(std::pair{device, stream}, made()).first->second;
}

}  // namespace burnish
