// The CPU's side of launch.cuh: CUDA's words, and launches that run the kernel at once.
#pragma once

#include <cstddef>
#include <cstdint>

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
  burnish::host::sync_warp(mask, where);
}

// Intrinsics that have a wrapper in ptx.cuh, or none yet, stop the launch with their name.
#define BURNISH_STOP(name)                                                                                   \
  template <class... Arguments>                                                                              \
  int name(Arguments...) {                                                                                   \
    burnish::host::stop(#name " is not modelled: see ptx.cuh for what is", burnish::host::Where::current()); \
  }
// clang-format off
BURNISH_STOP(__shfl_sync) BURNISH_STOP(__shfl_xor_sync) BURNISH_STOP(__shfl_up_sync) BURNISH_STOP(__shfl_down_sync)
BURNISH_STOP(__ballot_sync) BURNISH_STOP(__any_sync) BURNISH_STOP(__all_sync) BURNISH_STOP(__match_any_sync)
BURNISH_STOP(__activemask) BURNISH_STOP(__threadfence) BURNISH_STOP(__threadfence_block) BURNISH_STOP(__nanosleep)
BURNISH_STOP(__ldg) BURNISH_STOP(__byte_perm) BURNISH_STOP(__dp4a) BURNISH_STOP(clock64) BURNISH_STOP(atomicAdd)
BURNISH_STOP(atomicMax) BURNISH_STOP(atomicMin) BURNISH_STOP(atomicExch) BURNISH_STOP(atomicCAS)
// clang-format on
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

  struct DeviceLimits {
    int multiprocessors;
    int shared_memory;
    bool dependent_launch;
    bool clusters;
  };

  // An H100's.
  inline DeviceLimits device_limits(int32_t) { return {132, 228 << 10, true, true}; }

  // A grid, and the line that launches it.
  struct Grid {
    dim3 size;
    host::Where where;
    Grid(dim3 size, host::Where where = host::Where::current()) : size(size), where(where) {}
  };

  namespace detail {

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), const Grid& grid, dim3 block, size_t shared_bytes, uint64_t together,
           bool dependent, Arguments... arguments) {
    host::run({grid.size, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); },
               reinterpret_cast<const void*>(kernel), grid.where, together, dependent});
  }

  }  // namespace detail

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, cudaStream_t,
              Arguments... arguments) {
    detail::run(kernel, grid, block, shared_bytes, 1, false, arguments...);
  }

  template <class... Parameters, class... Arguments>
  void launch_dependent(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, cudaStream_t,
                        Arguments... arguments) {
    detail::run(kernel, grid, block, shared_bytes, 1, true, arguments...);
  }

  template <class... Parameters, class... Arguments>
  void launch_cooperative(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, cudaStream_t,
                          Arguments... arguments) {
    detail::run(kernel, grid, block, shared_bytes, uint64_t{grid.size.x} * grid.size.y * grid.size.z, false,
                arguments...);
  }

  template <class... Parameters, class... Arguments>
  void launch_cluster(void (*kernel)(Parameters...), Grid grid, dim3 block, unsigned cluster, size_t shared_bytes,
                      cudaStream_t, Arguments... arguments) {
    detail::run(kernel, grid, block, shared_bytes, cluster, false, arguments...);
  }

  template <class... Parameters>
  int resident_blocks(void (*)(Parameters...), dim3 block, size_t shared_bytes, int32_t) {
    return static_cast<int>(host::resident_blocks(block, shared_bytes));
  }

}  // namespace burnish
