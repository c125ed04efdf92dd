// The CPU's side of launch.cuh: CUDA's words, and launches that run the kernel at once.
#pragma once

#include "cuda/host/machine.h"

#define BURNISH_DEVICE_KEY CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;

inline void __syncthreads(burnish::host::Where where = burnish::host::Where::current()) {
  burnish::host::barrier(0, 0, true, "__syncthreads", where);
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, burnish::host::Where where = burnish::host::Where::current()) {
  const burnish::host::Threads threads = burnish::host::arrive("__syncwarp", {mask, where}, nullptr, false);
  if (threads.empty()) return;
  burnish::host::share(threads);  // it alone of the warp's collectives orders accesses to memory
  burnish::host::depart(threads);
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

inline cudaStream_t current_stream(int32_t) { return nullptr; }

inline bool is_capturing(cudaStream_t) { return false; }

// An H100's.
inline DeviceLimits device_limits(int32_t) { return {132, 228 << 10, true, true}; }

// A grid, and the line that launches it.
struct Grid {
  dim3 size;
  host::Where where;
  Grid(dim3 size, host::Where where = host::Where::current()) : size(size), where(where) {}
};

namespace detail {

template <class... Parameters>
void run(void (*kernel)(Parameters...), const Grid& grid, dim3 block, size_t shared_bytes, unsigned cluster,
         bool cooperative, bool dependent, auto... arguments) {
  host::run({grid.size, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); },
             reinterpret_cast<const void*>(kernel), grid.where, cluster, cooperative, dependent});
}

}  // namespace detail

void launch(auto kernel, Grid grid, dim3 block, size_t shared_bytes, cudaStream_t, auto... arguments) {
  detail::run(kernel, grid, block, shared_bytes, 1, false, false, arguments...);
}

void launch_dependent(auto kernel, Grid grid, dim3 block, size_t shared_bytes, cudaStream_t, auto... arguments) {
  detail::run(kernel, grid, block, shared_bytes, 1, false, true, arguments...);
}

void launch_cooperative(auto kernel, Grid grid, dim3 block, size_t shared_bytes, cudaStream_t, auto... arguments) {
  detail::run(kernel, grid, block, shared_bytes, 1, true, false, arguments...);
}

void launch_cluster(auto kernel, Grid grid, dim3 block, unsigned cluster, size_t shared_bytes, cudaStream_t,
                    auto... arguments) {
  detail::run(kernel, grid, block, shared_bytes, cluster, false, false, arguments...);
}

int resident_blocks(auto /*kernel*/, dim3 block, size_t shared_bytes, int32_t) {
  return static_cast<int>(host::resident_blocks(block, shared_bytes));
}

}  // namespace burnish
