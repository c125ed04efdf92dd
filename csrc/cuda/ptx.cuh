// Every PTX instruction and CUDA intrinsic that kernels use, each wrapped once under a name of ours.
//
//   memory    load, store, load_global, store_global, load_streaming, load_coherent, copy_async*, atomic_*, draw_ticket
//   warps     shuffle*, vote_*, ballot, reduce_*
//   blocks    barrier_sync, barrier_arrive, grid_barrier, grid_arrive, grid_wait, cluster_*, load_remote, store_remote,
//   dependen* words     lop3, prmt, popcount, highest_bit, dp4a, pack_fp16, pack_bf16, float_from_fp16 matrices
//   load_matrix, load_matrix_transposed, mma, mma_sparse
//
// Kernels contain no asm and no intrinsic of their own but __syncthreads and __syncwarp, so that a plain C++20
// compiler, with host/ptx.cuh in this file's place, builds and runs them on a CPU. All instructions are of the sm_80
// class, which later GPUs run too; the few newer ones say what they do below their architecture.
#pragma once

#include <cstdint>

#include "math/half.h"

namespace burnish {

constexpr uint32_t kFullWarp = 0xffffffffu;  // the mask of all 32 lanes

// The unit of memory traffic: 16 bytes are the widest access a thread can make, and a warp's 512 bytes keep four full
// cache lines in flight with one instruction.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

}  // namespace burnish

#ifndef __CUDACC__
#include "cuda/host/ptx.cuh"
#else

#include <type_traits>

namespace burnish {

// --- memory

// An ordinary access to global or shared memory, of 1, 2, 4, 8 or 16 bytes. Kernels make all of theirs through these
// two, so that on a CPU each is checked and counted.
template <class T>
__device__ inline T load(const T* address) {
  return *address;
}

template <class T>
__device__ inline void store(T* address, const T& value) {
  *address = value;
}

// The same for 4, 8 or 16 bytes of global memory, each one instruction: a struct the compiler may take apart, and where
// an address comes from a table it would ask at each access which memory that is in.
template <class T>
__device__ inline T load_global(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t word[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(word[0]) : "l"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(address) : "memory");
  } else {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(address)
                 : "memory");
  }
  T value;
  memcpy(&value, word, sizeof value);
  return value;
}

template <class T>
__device__ inline void store_global(T* address, const T& value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t word[sizeof(T) / 4];
  memcpy(word, &value, sizeof value);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(word[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(word[0]), "r"(word[1]) : "memory");
  } else {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                 "r"(word[3])
                 : "memory");
  }
}

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

// The same for 4 or 8 bytes, by way of L1: for rows that are not 16-byte aligned.
template <int Bytes>
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
               "r"(valid ? Bytes : 0)
               : "memory");
}

// Closes the group of copies that this thread started since the last commit; an empty group is complete at once.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's groups are under way; groups complete in order.
template <int Pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// One indivisible update each, ordered with nothing else; the value before it is returned. T: int32_t, uint32_t,
// unsigned long long, and float for atomic_add: its sum depends on the order of the threads, and in global memory it
// loses subnormals.
template <class T>
__device__ inline T atomic_add(T* address, T value) {
  return atomicAdd(address, value);
}

template <class T>
__device__ inline T atomic_max(T* address, T value) {
  return atomicMax(address, value);
}

template <class T>
__device__ inline T atomic_min(T* address, T value) {
  return atomicMin(address, value);
}

template <class T>
__device__ inline T atomic_exchange(T* address, T value) {
  return atomicExch(address, value);
}

// Stores `value` where `expected` was found.
template <class T>
__device__ inline T atomic_compare_exchange(T* address, T expected, T value) {
  return atomicCAS(address, expected, value);
}

// Adds one and returns the old value. Release and acquire over the whole GPU: with a barrier of the block before and
// after, whoever draws the last number sees all that the blocks before it wrote.
__device__ inline uint32_t draw_ticket(uint32_t* counter) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(old) : "l"(counter) : "memory");
  return old;
}

// --- warps: the lanes of `mask` come together; each of them must call, with the same mask

// The value of another lane: a given one, the one whose number differs in `bits`, the one `distance` below or above;
// each from 0 to 31. A lane that would have to look beyond the warp gets its own value.
template <class T>
__device__ inline T shuffle(uint32_t mask, T value, int lane) {
  return __shfl_sync(mask, value, lane);
}

template <class T>
__device__ inline T shuffle_xor(uint32_t mask, T value, int bits) {
  return __shfl_xor_sync(mask, value, bits);
}

template <class T>
__device__ inline T shuffle_up(uint32_t mask, T value, unsigned distance) {
  return __shfl_up_sync(mask, value, distance);
}

template <class T>
__device__ inline T shuffle_down(uint32_t mask, T value, unsigned distance) {
  return __shfl_down_sync(mask, value, distance);
}

__device__ inline bool vote_any(uint32_t mask, bool mine) { return __any_sync(mask, mine) != 0; }

__device__ inline bool vote_all(uint32_t mask, bool mine) { return __all_sync(mask, mine) != 0; }

// Bit i is lane i's answer.
__device__ inline uint32_t ballot(uint32_t mask, bool mine) { return __ballot_sync(mask, mine); }

// One instruction each, the result in every lane. T: uint32_t or int32_t; uint32_t for the bitwise ones.
template <class T>
__device__ inline T reduce_add(uint32_t mask, T value) {
  return __reduce_add_sync(mask, value);
}

template <class T>
__device__ inline T reduce_min(uint32_t mask, T value) {
  return __reduce_min_sync(mask, value);
}

template <class T>
__device__ inline T reduce_max(uint32_t mask, T value) {
  return __reduce_max_sync(mask, value);
}

__device__ inline uint32_t reduce_and(uint32_t mask, uint32_t value) { return __reduce_and_sync(mask, value); }

__device__ inline uint32_t reduce_or(uint32_t mask, uint32_t value) { return __reduce_or_sync(mask, value); }

__device__ inline uint32_t reduce_xor(uint32_t mask, uint32_t value) { return __reduce_xor_sync(mask, value); }

// --- blocks

// Barriers 1 to 15 of a block, for some of its warps: `threads`, a multiple of 32, counts those that wait and those
// that only arrive. __syncthreads is barrier 0.
__device__ inline void barrier_sync(unsigned barrier, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void barrier_arrive(unsigned barrier, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A thread of each block of a grid that launch_cooperative started arrives, once, and whichever thread waits then knows
// what those threads did and knew. `counter` is zero but for its upper bit, which turns with every round: it needs no
// reset, in a kernel or after it. grid_wait takes what grid_arrive gave the block.
__device__ inline uint32_t grid_arrive(uint32_t* counter) {
  const bool first = blockIdx.x + blockIdx.y + blockIdx.z == 0;
  const uint32_t others = gridDim.x * gridDim.y * gridDim.z - 1;
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(first ? 0x80000000u - others : 1u)
               : "memory");
  return before;
}

__device__ inline void grid_wait(const uint32_t* counter, uint32_t before) {
  uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while ((before ^ now) >> 31 == 0);
}

// Waits for all threads of such a grid.
__device__ inline void grid_barrier(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x + threadIdx.y + threadIdx.z == 0) grid_wait(counter, grid_arrive(counter));
  __syncthreads();
}

// The block's number within its cluster, the cluster's barrier, and accesses to where `shared` lies in the memory of
// block `rank`: loads of 4 or 16 bytes, stores of 4, 8 or 16. sm_90; before, a cluster is one block.
__device__ inline unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

template <class T>
__device__ inline T load_remote(const T* shared, unsigned rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
#if __CUDA_ARCH__ >= 900
  uint32_t address, word[sizeof(T) / 4];
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(word[0]) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
  }
  T value;
  memcpy(&value, word, sizeof value);
  return value;
#else
  return *shared;
#endif
}

template <class T>
__device__ inline void store_remote(T* shared, unsigned rank, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if __CUDA_ARCH__ >= 900
  uint32_t address, word[sizeof(T) / 4];
  memcpy(word, &value, sizeof value);
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(word[0]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(word[0]), "r"(word[1]) : "memory");
  } else {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(word[0]), "r"(word[1]),
                 "r"(word[2]), "r"(word[3])
                 : "memory");
  }
#else
  *shared = value;
#endif
}

// Lets a kernel that was launched by launch_dependent start on the multiprocessors that this one leaves free. Before
// sm_90 nothing.
__device__ inline void dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before, in a launch_dependent pair, has ended and its writes are visible. Before sm_90
// nothing.
__device__ inline void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- words

// Any function of three bits, for 32 at once: bit (4 a + 2 b + c) of Table.
template <int Table>
__device__ inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t value;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(value) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return value;
}

// Four bytes out of the eight of b (4 to 7) and a (0 to 3), each named by a digit of `selector`; a digit of 8 and more
// gives eight copies of the sign of byte digit - 8.
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t value;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(selector));
  return value;
}

__device__ inline int popcount(uint32_t word) { return __popc(word); }

// The place of the highest bit that is set, 31 to 0; -1 without one.
__device__ inline int highest_bit(uint32_t word) {
  int place;
  asm("bfind.u32 %0, %1;" : "=r"(place) : "r"(word));
  return place;
}

// sum + the dot product of four bytes, signed or unsigned; wraps around.
__device__ inline int32_t dp4a(int32_t a, int32_t b, int32_t sum) { return __dp4a(a, b, sum); }

__device__ inline uint32_t dp4a(uint32_t a, uint32_t b, uint32_t sum) { return __dp4a(a, b, sum); }

// Two floats, rounded to nearest even, in one word; a NaN becomes 0x7fff.
__device__ inline uint32_t pack_fp16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// fp16 bits, in the low half of `bits`, to fp32; exact.
__device__ inline float float_from_fp16(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}

// --- matrices: all lanes of a warp together; g = lane / 4, t = lane % 4

// Reads Count (1, 2 or 4) tiles of 8 rows of 16 bytes, eight 16-bit values each, from shared memory. Lane 8 i + r
// brings the address of row r of tile i; word i of a lane is tile i's row g, values 2 t and 2 t + 1.
template <int Count>
__device__ inline void load_matrix(uint32_t (&tile)[Count], const void* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  if constexpr (Count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(tile[0])
                 : "r"(shared_address(row))
                 : "memory");
  } else if constexpr (Count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(tile[0]), "=r"(tile[1])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// The same transposed: word i of a lane is tile i's column g, rows 2 t and 2 t + 1.
template <int Count>
__device__ inline void load_matrix_transposed(uint32_t (&tile)[Count], const void* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  if constexpr (Count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(tile[0])
                 : "r"(shared_address(row))
                 : "memory");
  } else if constexpr (Count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(tile[0]), "=r"(tile[1])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

#define BURNISH_MMA(TYPES, KIND)                                                                            \
  asm volatile("mma.sync.aligned." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : KIND(sum[0]), KIND(sum[1]), KIND(sum[2]), KIND(sum[3])                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// sum[16][8] += a[16][K] * b[K][8], with K = 16 for bf16 and fp16 (summed in fp32) and 32 for int8_t and uint8_t (exact
// in int32, wrapping around). A word holds v = 2 or 4 values of consecutive k, the lowest in the lowest bits:
//   a[0]: row g, k from v t   a[1]: row g + 8, the same k   a[2], a[3]: as a[0], a[1] with k + K / 2
//   b[0]: column g, k from v t   b[1]: the same with k + K / 2
//   sum: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
// A permutation of k that a and b share leaves the sum as it is.
template <class A, class B = A, class Sum>
__device__ inline void mma(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool kSigned = std::is_same_v<A, int8_t>;
  if constexpr (std::is_same_v<A, bf16>) {
    static_assert(std::is_same_v<B, bf16> && std::is_same_v<Sum, float>);
    BURNISH_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
  } else if constexpr (std::is_same_v<A, fp16>) {
    static_assert(std::is_same_v<B, fp16> && std::is_same_v<Sum, float>);
    BURNISH_MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
  } else {
    static_assert((kSigned || std::is_same_v<A, uint8_t>) && std::is_same_v<Sum, int32_t>);
    static_assert(std::is_same_v<B, int8_t> || std::is_same_v<B, uint8_t>);
    if constexpr (kSigned && std::is_same_v<B, int8_t>) BURNISH_MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
    if constexpr (kSigned && std::is_same_v<B, uint8_t>) BURNISH_MMA("m16n8k32.row.col.s32.s8.u8.s32", "+r");
    if constexpr (!kSigned && std::is_same_v<B, int8_t>) BURNISH_MMA("m16n8k32.row.col.s32.u8.s8.s32", "+r");
    if constexpr (!kSigned && std::is_same_v<B, uint8_t>) BURNISH_MMA("m16n8k32.row.col.s32.u8.u8.s32", "+r");
  }
}

#undef BURNISH_MMA

#define BURNISH_MMA_SPARSE(TYPES, KIND)                                                                             \
  asm volatile("mma.sp::ordered_metadata.sync.aligned." TYPES                                                       \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"               \
               : KIND(sum[0]), KIND(sum[1]), KIND(sum[2]), KIND(sum[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(kept), \
                 "n"(Selector))

// sum[16][8] += a[16][K] * b[K][8], where of every four values in a row of a two are kept; K = 32 for bf16 and fp16, 64
// for int8_t. a holds the kept ones, laid out as mma lays out a matrix of K / 2 columns; so does b with two words more:
//   b[i]: column g, k from v t + i K / 4
// `kept` has two digits of two bits for each four values, the places of the two, ascending; the first in the lower
// bits:
//   bf16, fp16: lanes with t / 2 == Selector bring row g (lower half) and row g + 8, 16 columns from (t % 2) 16 on
//   int8_t: a lane brings row g + t % 2 * 8, 32 columns from t / 2 * 32 on; Selector is 0
// What b has at the other places is not multiplied: an infinity or a NaN there leaves the sum as it is.
template <class A, int Selector = 0, class Sum>
__device__ inline void mma_sparse(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t kept) {
  if constexpr (std::is_same_v<A, int8_t>) {
    static_assert(Selector == 0 && std::is_same_v<Sum, int32_t>);
    BURNISH_MMA_SPARSE("m16n8k64.row.col.s32.s8.s8.s32", "+r");
  } else {
    static_assert((Selector == 0 || Selector == 1) && std::is_same_v<Sum, float>);
    static_assert(std::is_same_v<A, bf16> || std::is_same_v<A, fp16>);
    if constexpr (std::is_same_v<A, bf16>) BURNISH_MMA_SPARSE("m16n8k32.row.col.f32.bf16.bf16.f32", "+f");
    if constexpr (std::is_same_v<A, fp16>) BURNISH_MMA_SPARSE("m16n8k32.row.col.f32.f16.f16.f32", "+f");
  }
}

#undef BURNISH_MMA_SPARSE

}  // namespace burnish

#endif
