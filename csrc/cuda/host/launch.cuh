// The CPU's side of launch.cuh: CUDA's words, and launches that run the kernel at once.
#pragma once

#include "cuda/host/machine.h"

#define BURNISH_DEVICE_KEY CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = void*;

inline void __syncthreads(burnish::host::Where where = burnish::host::Where::current()) {
  burnish::host::barrier(0, 0, true, "__syncthreads", where);
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, burnish::host::Where where = burnish::host::Where::current()) {
  // it alone of the warp's collectives orders accesses to memory
  burnish::host::meet("__syncwarp", {mask, where}, nullptr, false, [](auto& lanes) { burnish::host::share(lanes); });
}

// Intrinsics that have a wrapper in ptx.cuh, or none yet, stop the launch with their name.
#define BURNISH_STOP(name)                                                                                   \
  int name(auto...) {                                                                                        \
    burnish::host::stop(burnish::host::Where::current(), #name " is not modelled: see ptx.cuh for what is"); \
  }
// clang-format off
#define BURNISH_NOT_MODELLED(X)                                                                              \
  X(__shfl_sync) X(__shfl_xor_sync) X(__shfl_up_sync) X(__shfl_down_sync)                                    \
  X(__ballot_sync) X(__any_sync) X(__all_sync) X(__match_any_sync) X(__activemask)                           \
  X(__threadfence) X(__threadfence_block) X(__nanosleep) X(__ldg) X(__byte_perm) X(__dp4a) X(clock64)        \
  X(atomicAdd) X(atomicMax) X(atomicMin) X(atomicExch) X(atomicCAS)
// clang-format on
BURNISH_NOT_MODELLED(BURNISH_STOP)
#undef BURNISH_NOT_MODELLED
#undef BURNISH_STOP

namespace burnish {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

template <class T>
T* shared_memory() {
  return static_cast<T*>(host::shared_memory());
}

// A launch is done when it returns, so each thread is a stream.
inline cudaStream_t current_stream(int32_t) {
  static thread_local char own;
  return &own;
}

inline bool is_capturing(cudaStream_t) { return false; }

// An H100's.
inline DeviceLimits device_limits(int32_t) { return {132, 228 << 10, true, true, true}; }

using Grid = host::At<dim3>;

// What all launches are; their arguments are converted to the kernel's parameter types.
template <class... Parameters>
void launch_as(host::Special how, void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes,
               cudaStream_t, auto... arguments) {
  host::run({how, grid.value, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); },
             reinterpret_cast<const void*>(kernel), grid.where});
}

void launch(auto kernel, Grid grid, auto... rest) { launch_as({}, kernel, grid, rest...); }

void launch_dependent(auto kernel, Grid grid, auto... rest) { launch_as({.dependent = true}, kernel, grid, rest...); }

void launch_cooperative(auto kernel, Grid grid, auto... rest) {
  launch_as({.cooperative = true}, kernel, grid, rest...);
}

void launch_cluster(auto kernel, Grid grid, dim3 block, unsigned cluster, auto... rest) {
  launch_as({.cluster = cluster}, kernel, grid, block, rest...);
}

void launch_cooperative_clusters(auto kernel, Grid grid, dim3 block, unsigned cluster, auto... rest) {
  launch_as({.cluster = cluster, .cooperative = true}, kernel, grid, block, rest...);
}

int resident_blocks(auto /*kernel*/, dim3 block, size_t shared_bytes, int32_t device, unsigned cluster = 1) {
  const DeviceLimits limits = device_limits(device);
  const uint64_t threads = host::volume(block);
  const uint64_t each = std::min<uint64_t>({32, 2048 / threads, limits.shared_memory / (shared_bytes + 1024)});
  return static_cast<int>(std::min(each * limits.multiprocessors, host::kMaxTogether / threads) / cluster * cluster);
}

}  // namespace burnish
