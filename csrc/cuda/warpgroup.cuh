// What sm_90a adds, each instruction wrapped once as in ptx.cuh: four warps that multiply tiles out of shared memory,
// an engine that copies tiles of a matrix there and back, and barriers in shared memory that count bytes.
//
//   tiles        TileMap, tile_map, load_tile, load_tile_to, load_tile_to_all, store_tile, store_tile_commit,
//                store_tile_wait, copies_see_stores, copies_see_remote_stores, copies_see_global_stores
//   barriers     TileBarrier, tile_barrier_init, _expect, _arrive, _arrive_remote, _wait, _wait_remote,
//                tile_barriers_ready
//   warpgroups   shared_tile, warpgroup_mma, warpgroup_mma_sparse, warpgroup_fence, _commit, _wait, _registers
//   warps        store_matrix_transposed
//
// A kernel of these is compiled for every architecture and has a body where kHasWarpgroups; DeviceLimits::warpgroups
// says where it may be launched. On a CPU host/warpgroup.cuh takes this file's place.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace burnish {

// How a tile's rows lie in shared memory: one after the other, in lines of that many bytes. The 16-byte units of a line
// of 128 are exchanged among themselves by its number modulo 8, of one of 64 by half its number modulo 4, of one of 32
// by a quarter of its number modulo 2, so that a unit of eight lines is in all banks. Such a tile starts at a multiple
// of eight lines.
enum class Swizzle : int { kNone = 16, k32 = 32, k64 = 64, k128 = 128 };

// Rows of bytes in global memory and the tiles of them that are copied. tile_map makes of it what the copy engine
// reads, which a kernel takes as `const __grid_constant__ TileMap`.
struct TileSource {
  const void* data;                // aligned to 16 bytes
  int64_t rows, width, stride;     // width and stride in bytes, the stride a multiple of 16
  unsigned tile_rows, tile_bytes;  // at most 256; the bytes of a line
  Swizzle swizzle;
};

// A barrier in shared memory for copies: its phase ends when as many threads have arrived as it was made for, and when
// as many bytes have come as they said. Phases have parity 0, 1, 0, ...
struct TileBarrier {
  uint64_t word;
};

constexpr int kWarpgroup = 128;            // threads: four warps, the first a multiple of four
constexpr size_t kSharedAlignment = 1024;  // of tiles in lines of 128 bytes

}  // namespace burnish

#ifndef __CUDACC__
#include "cuda/host/warpgroup.cuh"
#else

#include <cudaTypedefs.h>

namespace burnish {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

struct alignas(64) TileMap {
  unsigned char opaque[sizeof(CUtensorMap)];
};

inline TileMap tile_map(const TileSource& from) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
          "looking for cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("burnish: the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(from.width), static_cast<cuuint64_t>(from.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(from.stride)};
  const cuuint32_t box[] = {from.tile_bytes, from.tile_rows}, steps[] = {1, 1};
  const CUtensorMapSwizzle swizzle = from.swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : from.swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : from.swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap map;
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(from.data), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("burnish: cuTensorMapEncodeTiled failed with " + std::to_string(static_cast<int>(status)));
  }
  TileMap result;
  memcpy(&result, &map, sizeof map);
  return result;
}

// The block's dynamic shared memory from the first multiple of kSharedAlignment on: ask for that much more.
template <class T>
__device__ T* aligned_shared_memory() {
  unsigned char* shared = shared_memory<unsigned char>();
  return reinterpret_cast<T*>(shared + (0u - shared_address(shared)) % kSharedAlignment);
}

// --- barriers

__device__ inline void tile_barrier_init(TileBarrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// By the thread that made them, before the block's barrier: copies and other threads see the barriers from there on.
__device__ inline void tile_barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and says that `bytes` more will come in this phase.
__device__ inline void tile_barrier_expect(TileBarrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ inline void tile_barrier_arrive(TileBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

#define BURNISH_ARRIVE(ORDER)                                                                         \
  asm volatile(                                                                                       \
      "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"                          \
      "mbarrier.arrive" ORDER ".shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)), \
      "r"(rank)                                                                                       \
      : "memory")

// At the barrier in the same place of the cluster's block `rank`: what has been read may be overwritten from there.
__device__ inline void tile_barrier_arrive(TileBarrier* barrier, unsigned rank) { BURNISH_ARRIVE(""); }

// The same, and what this thread has stored there is there for tile_barrier_wait_remote. It waits until all its stores
// are done, which costs too much for every stage of a ring.
__device__ inline void tile_barrier_arrive_remote(TileBarrier* barrier, unsigned rank) {
  BURNISH_ARRIVE(".release.cluster");
}

#undef BURNISH_ARRIVE

#define BURNISH_PHASE_HAS_ENDED(ORDER)                                               \
  asm volatile("{\n\t.reg .pred ended;\n\tmbarrier.try_wait.parity" ORDER            \
               ".shared::cta.b64 ended, [%1], %2;\n\tselp.u32 %0, 1, 0, ended;\n\t}" \
               : "=r"(ended)                                                         \
               : "r"(shared_address(barrier)), "r"(parity)                           \
               : "memory")

// Waits until the phase of this parity has ended; for one before the first, at once.
__device__ inline void tile_barrier_wait(TileBarrier* barrier, unsigned parity) {
  uint32_t ended;
  do {
    BURNISH_PHASE_HAS_ENDED("");
  } while (ended == 0);
}

// The same, and what threads of the cluster's other blocks have stored before tile_barrier_arrive_remote is there too.
__device__ inline void tile_barrier_wait_remote(TileBarrier* barrier, unsigned parity) {
  uint32_t ended;
  do {
    BURNISH_PHASE_HAS_ENDED(".acquire.cluster");
  } while (ended == 0);
}

#undef BURNISH_PHASE_HAS_ENDED

// --- tiles: by one thread each

// Starts the copy of the tile whose first byte is `byte` of row `row`; zeros where the matrix has none. Adds all bytes
// of the tile to the barrier as they come.
__device__ inline void load_tile(void* shared, const TileMap& map, int byte, int row, TileBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(byte), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same to those blocks of the cluster whose bits are set, in the same place of each; their barriers there too.
__device__ inline void load_tile_to(unsigned blocks, void* shared, const TileMap& map, int byte, int row,
                                    TileBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(byte), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// The same to as many blocks, from the first on.
template <unsigned Blocks>
__device__ inline void load_tile_to_all(void* shared, const TileMap& map, int byte, int row, TileBarrier* barrier) {
  static_assert(Blocks >= 2 && Blocks <= 8);
  load_tile_to((1u << Blocks) - 1, shared, map, byte, row, barrier);
}

// Starts the copy of a tile to the matrix, where there is one.
__device__ inline void store_tile(const TileMap& map, const void* shared, int byte, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(byte), "r"(row)
               : "memory");
}

// Closes the group of stores that this thread started since the last commit.
__device__ inline void store_tile_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until shared memory has been read for all but `Pending` of this thread's groups.
template <int Pending>
__device__ inline void store_tile_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// What this thread has stored in shared memory is there for copies and products that are started after a barrier.
__device__ inline void copies_see_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same, also of what it has stored in the shared memory of the cluster's other blocks.
__device__ inline void copies_see_remote_stores() { asm volatile("fence.proxy.async.shared::cluster;" ::: "memory"); }

// The same of global memory.
__device__ inline void copies_see_global_stores() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- warpgroups: all threads of the four warps together

// Takes registers to `Registers` a thread, a multiple of 8: fewer gives some up, more waits until the block has them.
template <int Registers, bool More>
__device__ inline void warpgroup_registers() {
  if constexpr (More) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
  }
}

// Before products: what the threads did to their sums is done.
__device__ inline void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products since the last commit.
__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` groups of products are under way; they end in order. Until then sums are not to be
// touched, nor what is multiplied.
template <int Pending>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Rows of a product's operand in shared memory, the first with its first byte at `start`.
struct SharedTile {
  uint64_t descriptor;
};

template <Swizzle kSwizzle>
__device__ inline SharedTile shared_tile(const void* start) {
  static_assert(kSwizzle == Swizzle::k64 || kSwizzle == Swizzle::k128);
  constexpr uint64_t kLines = 8 * static_cast<int>(kSwizzle) / 16;  // from eight lines to the next, in 16 bytes
  constexpr uint64_t kMode = kSwizzle == Swizzle::k128 ? 1 : 2;
  return {uint64_t{shared_address(start) >> 4 & 0x3fff} | uint64_t{1} << 16 | kLines << 32 | kMode << 62};
}

// clang-format off
#define BURNISH_8(X, v, i) X(v[i]), X(v[i + 1]), X(v[i + 2]), X(v[i + 3]), X(v[i + 4]), X(v[i + 5]), X(v[i + 6]), X(v[i + 7])
#define BURNISH_16(X, v, i) BURNISH_8(X, v, i), BURNISH_8(X, v, i + 8)
#define BURNISH_32(X, v, i) BURNISH_16(X, v, i), BURNISH_16(X, v, i + 16)
#define BURNISH_64(X, v) BURNISH_32(X, v, 0), BURNISH_32(X, v, 32)
#define BURNISH_88(X, v) BURNISH_64(X, v), BURNISH_8(X, v, 64), BURNISH_8(X, v, 72), BURNISH_8(X, v, 80)
#define BURNISH_128(X, v) BURNISH_64(X, v), BURNISH_32(X, v, 64), BURNISH_32(X, v, 96)
#define BURNISH_NAMES_16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define BURNISH_NAMES_32 BURNISH_NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BURNISH_NAMES_64 BURNISH_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BURNISH_NAMES_88 BURNISH_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87"
#define BURNISH_NAMES_128 BURNISH_NAMES_88 \
  ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
// clang-format on

// NAMES and SUMS of the sums; OPERANDS names what comes after them, ADD is whether they are added to; then the inputs
// that come after a, b and that.
#define BURNISH_WARPGROUP_PRODUCT(INSTRUCTION, NAMES, SUMS, ADD, OPERANDS, ...)                                       \
  asm volatile("{\n\t.reg .pred adding;\n\tsetp.ne.u32 adding, " ADD ", 0;\n\twgmma.mma_async." INSTRUCTION " " NAMES \
               "}, " OPERANDS ";\n\t}"                                                                                \
               : SUMS                                                                                                 \
               : "l"(a.descriptor), "l"(b.descriptor), "r"(uint32_t{add})__VA_OPT__(, ) __VA_ARGS__)
#define BURNISH_FLOAT(x) "+f"(x)
#define BURNISH_INT32(x) "+r"(x)
#define BURNISH_ROW_MAJOR ", 1, 1, 0, 0"

#define BURNISH_PRODUCT_16(TYPES)                                                                                 \
  BURNISH_WARPGROUP_PRODUCT("sync.aligned.m64n32k16." TYPES, BURNISH_NAMES_16, BURNISH_16(BURNISH_FLOAT, sum, 0), \
                            "%18", "%16, %17, adding" BURNISH_ROW_MAJOR)
#define BURNISH_PRODUCT_32(TYPES)                                                                                 \
  BURNISH_WARPGROUP_PRODUCT("sync.aligned.m64n64k16." TYPES, BURNISH_NAMES_32, BURNISH_32(BURNISH_FLOAT, sum, 0), \
                            "%34", "%32, %33, adding" BURNISH_ROW_MAJOR)
#define BURNISH_PRODUCT_64(TYPES)                                                                                      \
  BURNISH_WARPGROUP_PRODUCT("sync.aligned.m64n128k16." TYPES, BURNISH_NAMES_64, BURNISH_64(BURNISH_FLOAT, sum), "%66", \
                            "%64, %65, adding" BURNISH_ROW_MAJOR)
#define BURNISH_PRODUCT_128(TYPES)                                                                                \
  BURNISH_WARPGROUP_PRODUCT("sync.aligned.m64n256k16." TYPES, BURNISH_NAMES_128, BURNISH_128(BURNISH_FLOAT, sum), \
                            "%130", "%128, %129, adding" BURNISH_ROW_MAJOR)

// Starts sum[64][N] = or += a[64][16] * b[N][16]^T, N = 2 * Words, of which a thread holds what mma would give it: its
// warp's 16 rows, sum[4 i + r] of the columns from 8 i on. Of a's and b's rows 32 bytes are multiplied.
template <class A, int Words>
__device__ inline void warpgroup_mma(float (&sum)[Words], SharedTile a, SharedTile b, bool add) {
  static_assert(Words == 16 || Words == 32 || Words == 64 || Words == 128);
  static_assert(std::is_same_v<A, bf16> || std::is_same_v<A, fp16>);
  if constexpr (std::is_same_v<A, bf16>) {
    if constexpr (Words == 16) BURNISH_PRODUCT_16("f32.bf16.bf16");
    if constexpr (Words == 32) BURNISH_PRODUCT_32("f32.bf16.bf16");
    if constexpr (Words == 64) BURNISH_PRODUCT_64("f32.bf16.bf16");
    if constexpr (Words == 128) BURNISH_PRODUCT_128("f32.bf16.bf16");
  } else {
    if constexpr (Words == 16) BURNISH_PRODUCT_16("f32.f16.f16");
    if constexpr (Words == 32) BURNISH_PRODUCT_32("f32.f16.f16");
    if constexpr (Words == 64) BURNISH_PRODUCT_64("f32.f16.f16");
    if constexpr (Words == 128) BURNISH_PRODUCT_128("f32.f16.f16");
  }
}

#define BURNISH_SPARSE(COLUMNS, TYPES, WORDS, SUM, TILES, ADD, KEPT, LAYOUT)                                        \
  BURNISH_WARPGROUP_PRODUCT("sp.sync.aligned.m64n" COLUMNS TYPES, BURNISH_NAMES_##WORDS, BURNISH_##WORDS(SUM, sum), \
                            ADD, TILES ", " KEPT ", adding" LAYOUT, "r"(kept), "n"(Selector))
#define BURNISH_SPARSE_OF(TYPES, SUM, LAYOUT)                                     \
  if constexpr (Words == 64) {                                                    \
    BURNISH_SPARSE("128", TYPES, 64, SUM, "%64, %65", "%66", "%67, %68", LAYOUT); \
  } else {                                                                        \
    BURNISH_SPARSE("176", TYPES, 88, SUM, "%88, %89", "%90", "%91, %92", LAYOUT); \
  }

// The same with a sparse a, and `kept` as mma_sparse has them for the warp's 16 rows: of a's rows 32 bytes are
// multiplied, of b's 64.
template <class A, int Selector = 0, class Sum, int Words>
__device__ inline void warpgroup_mma_sparse(Sum (&sum)[Words], SharedTile a, SharedTile b, uint32_t kept, bool add) {
  static_assert(Words == 64 || Words == 88);
  static_assert(std::is_same_v<A, bf16> || std::is_same_v<A, fp16> || (std::is_same_v<A, int8_t> && Selector == 0));
  if constexpr (std::is_same_v<A, bf16>) {
    BURNISH_SPARSE_OF("k32.f32.bf16.bf16", BURNISH_FLOAT, BURNISH_ROW_MAJOR)
  } else if constexpr (std::is_same_v<A, fp16>) {
    BURNISH_SPARSE_OF("k32.f32.f16.f16", BURNISH_FLOAT, BURNISH_ROW_MAJOR)
  } else {
    BURNISH_SPARSE_OF("k64.s32.s8.s8", BURNISH_INT32, "")
  }
}

#undef BURNISH_8
#undef BURNISH_16
#undef BURNISH_32
#undef BURNISH_64
#undef BURNISH_88
#undef BURNISH_128
#undef BURNISH_NAMES_16
#undef BURNISH_NAMES_32
#undef BURNISH_NAMES_64
#undef BURNISH_NAMES_88
#undef BURNISH_NAMES_128
#undef BURNISH_WARPGROUP_PRODUCT
#undef BURNISH_FLOAT
#undef BURNISH_INT32
#undef BURNISH_ROW_MAJOR
#undef BURNISH_PRODUCT_16
#undef BURNISH_PRODUCT_32
#undef BURNISH_PRODUCT_64
#undef BURNISH_PRODUCT_128
#undef BURNISH_SPARSE
#undef BURNISH_SPARSE_OF

// --- warps

// The inverse of load_matrix_transposed<4>: tile i's columns, of which a lane's word i has two values of one, become
// rows of 16 bytes in shared memory, row r of it at the address of lane 8 i + r.
__device__ inline void store_matrix_transposed(void* row, const uint32_t (&tile)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(tile[0]), "r"(tile[1]), "r"(tile[2]), "r"(tile[3])
               : "memory");
}

}  // namespace burnish

#endif
