// Every PTX instruction and CUDA intrinsic that kernels use, each wrapped once under a name of ours.
//
// Kernels contain no asm and no intrinsic of their own, so that a plain C++20 compiler, with host/ptx.cuh in this
// file's place, builds and runs them on a CPU. All instructions are of the sm_80 class, which later GPUs run too; the
// few newer ones are no-ops below their architecture.
#pragma once

#ifndef __CUDACC__
#include "cuda/host/ptx.cuh"
#else

#include <cstdint>

namespace burnish {

// The unit of memory traffic: 16 bytes are the widest access a thread can make, and a warp's 512 bytes keep four full
// cache lines in flight with one instruction.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Reads 16 bytes that this kernel does not write and reads once: through the read-only path, leaving no line in L1.
__device__ inline Bytes16 load_streaming(const void* address) {
  Bytes16 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
      : "l"(address));
  return value;
}

// Read what another kernel or block may have written after this kernel started: from L2, because an L1 is not coherent.
__device__ inline Bytes16 load_coherent(const Bytes16* address) {
  Bytes16 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(address)
               : "memory");
  return value;
}

__device__ inline int32_t load_coherent(const int32_t* address) {
  int32_t value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline float load_coherent(const float* address) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

// An L2 policy for data read once: its lines are the first to leave, so that activations and scales stay.
__device__ inline uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes from global to shared memory, past the registers and L1; where not `valid` it writes zeros
// and reads nothing. The bytes are there for this thread after copy_async_wait, for others after a barrier as well.
__device__ inline void copy_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void copy_async16(void* shared, const void* global, bool valid, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// Closes the group of copies that this thread started since the last commit; an empty group is complete at once.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's groups are under way; groups complete in order.
template <int Pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// sum[16][8] += a[16][32] * b[32][8] of one warp, exact in int32. With g = lane / 4 and t = lane % 4 a lane holds
//   a0: row g, k 4t..4t+3   a1: row g + 8, the same k   a2, a3: as a0, a1 with k + 16
//   b0: column g, k 4t..4t+3   b1: column g, k + 16
//   sum: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// A permutation of k that a and b share leaves the sum as it is, and the kernels choose one that loads 16 bytes a lane.
__device__ inline void mma_int8(int32_t (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The largest value in the warp, in every lane, by one instruction.
__device__ inline uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

// fp16 bits, in the low half of `bits`, to fp32; exact.
__device__ inline float float_from_fp16(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}

// Adds one and returns the old value. Release and acquire over the whole GPU: with a barrier of the block before and
// after, whoever draws the last number sees all that the blocks before it wrote.
__device__ inline uint32_t draw_ticket(uint32_t* counter) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(old) : "l"(counter) : "memory");
  return old;
}

// Lets a kernel that was launched by launch_dependent start on the multiprocessors that this one leaves free. sm_90.
__device__ inline void dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before, in a launch_dependent pair, has ended and its writes are visible. sm_90.
__device__ inline void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace burnish

#endif
