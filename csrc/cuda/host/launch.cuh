// The CPU's side of launch.cuh: CUDA's words, and launches that run the kernel at once, one block after another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/host/machine.h"

#define BURNISH_DEVICE_KEY CPU
#define __global__
#define __device__
#define __launch_bounds__(...)

using cudaStream_t = void*;

inline void __syncthreads(burnish::host::Where where = burnish::host::Where::current()) {
  burnish::host::barrier(0, 0, "__syncthreads", where);
}

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
};

// An H100's.
inline DeviceLimits device_limits(int32_t) { return {132, 228 << 10, true}; }

// A grid, and the line that launches it.
struct Grid {
  dim3 size;
  host::Where where;
  Grid(dim3 size, host::Where where = host::Where::current()) : size(size), where(where) {}
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  host::run({grid.size, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); }, grid.where});
}

template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                      Arguments... arguments) {
  launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace burnish
