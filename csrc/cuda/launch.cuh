// How kernels are launched and what they ask of the device: launch(), the stream, errors, shared memory.
//
// With a plain C++20 compiler host/launch.cuh takes this file's place: it defines CUDA's words (__global__, threadIdx,
// __syncthreads, ...) and runs the same kernels on a CPU.
#pragma once

namespace burnish {

// What a device has and can do.
struct DeviceLimits {
  int multiprocessors;
  int shared_memory;  // bytes a multiprocessor
  bool dependent_launch;
  bool clusters;
  bool warpgroups;  // what warpgroup.cuh has
};

}  // namespace burnish

#ifndef __CUDACC__
#include "cuda/host/launch.cuh"
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
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

// Whether what is launched goes into a CUDA graph.
inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream, &status), "asking for a capture");
  return status != cudaStreamCaptureStatusNone;
}

inline DeviceLimits device_limits(int32_t device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "reading a device attribute");
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), major >= 9,
          major >= 9, major == 9};
}

namespace detail {

template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  constexpr size_t kFree = 48 << 10;  // a kernel has these without asking
  if (bytes <= kFree) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "reserving shared memory");
  // such a kernel keeps little in L1: give it to shared memory, so that more than one block fits
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "reserving shared memory");
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            std::initializer_list<cudaLaunchAttribute> attributes, Parameters... arguments) {
  allow_shared(kernel, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = const_cast<cudaLaunchAttribute*>(attributes.begin());
  config.numAttrs = static_cast<unsigned>(attributes.size());
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
}

inline cudaLaunchAttribute cooperative() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return attribute;
}

inline cudaLaunchAttribute clusters(unsigned blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

}  // namespace detail

// Launches a kernel; its arguments are converted to the kernel's parameter types.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  detail::launch<Parameters...>(kernel, grid, block, shared_bytes, stream, {}, arguments...);
}

// Launches a kernel that may start while the stream's previous kernel, which calls dependents_start(), still runs; what
// that one writes may be read after dependency_wait(). Only where DeviceLimits::dependent_launch says so.
template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                      Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  detail::launch<Parameters...>(kernel, grid, block, shared_bytes, stream, {attribute}, arguments...);
}

// Launches a grid whose blocks all run at the same time, for grid_barrier: at most resident_blocks() of them.
template <class... Parameters, class... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                        Arguments... arguments) {
  detail::launch<Parameters...>(kernel, grid, block, shared_bytes, stream, {detail::cooperative()}, arguments...);
}

// Launches a grid in clusters of `cluster` blocks (a power of two, at most 8) that are neighbours along x and run at
// the same time. Only where DeviceLimits::clusters says so.
template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                    cudaStream_t stream, Arguments... arguments) {
  detail::launch<Parameters...>(kernel, grid, block, shared_bytes, stream, {detail::clusters(cluster)}, arguments...);
}

// Both: at most as many blocks as resident_blocks() says for such clusters.
template <class... Parameters, class... Arguments>
void launch_cooperative_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                                 size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  detail::launch<Parameters...>(kernel, grid, block, shared_bytes, stream,
                                {detail::cooperative(), detail::clusters(cluster)}, arguments...);
}

// How many blocks of a kernel the device runs at the same time, in clusters of as many.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), dim3 block, size_t shared_bytes, int32_t device,
                    unsigned cluster = 1) {
  detail::allow_shared(kernel, shared_bytes);
  int each = 0;
  if (cluster > 1) {
    cudaLaunchAttribute attribute = detail::clusters(cluster);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(cluster);
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&each, kernel, &config), "counting resident clusters");
    return each * static_cast<int>(cluster);
  }
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(block.x * block.y * block.z),
                                                      shared_bytes),
        "counting resident blocks");
  return each * device_limits(device).multiprocessors;
}

}  // namespace burnish

#endif
