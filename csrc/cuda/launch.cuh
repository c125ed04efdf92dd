// How kernels are launched and what they ask of the device: launch(), the stream, errors, shared memory.
//
// With a plain C++20 compiler host/launch.cuh takes this file's place: it defines CUDA's words (__global__, threadIdx,
// __syncthreads, ...) and runs the same kernels on a CPU.
#pragma once

#ifndef __CUDACC__
#include "cuda/host/launch.cuh"
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

// The dispatch key that the kernels are registered under.
#define BURNISH_DEVICE_KEY CUDA

namespace burnish {

// Makes a device current while it lives.
using torch::stable::accelerator::DeviceGuard;

// A block's dynamic shared memory, the only shared memory kernels use; aligned for 16-byte accesses.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char burnish_shared_memory[];
  return reinterpret_cast<T*>(burnish_shared_memory);
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("burnish: ") + what + ": " + cudaGetErrorString(status));
  }
}

// PyTorch's current stream on a device.
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct DeviceLimits {
  int multiprocessors;
  int shared_memory;  // bytes a multiprocessor
  bool dependent_launch;
};

inline DeviceLimits device_limits(int32_t device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "reading a device attribute");
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrComputeCapabilityMajor) >= 9};
}

namespace detail {

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            bool dependent, Parameters... arguments) {
  constexpr size_t kFreeSharedBytes = 48 << 10;  // a kernel has these without asking
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (shared_bytes > kFreeSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "reserving shared memory");
    // such a kernel keeps little in L1: give it to shared memory, so that more than one block fits
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  }
  if (dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
}

}  // namespace detail

// Launches a kernel; its arguments are converted to the kernel's parameter types.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  detail::launch<Parameters...>(kernel, grid, block, shared_bytes, stream, false, arguments...);
}

// Launches a kernel that may start while the stream's previous kernel, which calls dependents_start(), still runs; what
// that one writes may be read after dependency_wait(). Only where DeviceLimits::dependent_launch says so.
template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                      Arguments... arguments) {
  detail::launch<Parameters...>(kernel, grid, block, shared_bytes, stream, true, arguments...);
}

}  // namespace burnish

#endif
