// Every wrapper of ptx.cuh that is more than a plain access, each in a kernel of its own that hands it words and stores
// what it gives: which lane's word stands for what is known to the tests alone. Built by nvcc, the same kernels run on
// a GPU.
#include "instructions.cuh"

namespace burnish {
namespace {

// `thread` counts over the grid.
template <class Body>
__global__ void __launch_bounds__(64) instruction_kernel(Data data) {
  Body::run(data, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

template <int Count>
__device__ void get(uint32_t (&words)[Count], const uint32_t* from) {
  for (int i = 0; i < Count; ++i) words[i] = load(from + i);
}

template <class Sum>
__device__ void put(uint32_t* to, const Sum (&words)[4]) {
  for (int i = 0; i < 4; ++i) store(reinterpret_cast<Sum*>(to) + i, words[i]);
}

template <class T>
__device__ T as(uint32_t word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}

// --- words: one thread, one result

struct Lop3 {
  static constexpr int kResults = 12;
  static __device__ void run(const Data& d, int thread) {
    const uint32_t a = load(d.a + thread), b = load(d.b + thread), c = load(d.c + thread);
    const uint32_t results[kResults] = {lop3<1>(a, b, c),    lop3<2>(a, b, c),    lop3<4>(a, b, c),
                                        lop3<8>(a, b, c),    lop3<16>(a, b, c),   lop3<32>(a, b, c),
                                        lop3<64>(a, b, c),   lop3<128>(a, b, c),  lop3<0xea>(a, b, c),
                                        lop3<0x96>(a, b, c), lop3<0xe8>(a, b, c), lop3<0xca>(a, b, c)};
    for (int i = 0; i < kResults; ++i) store(d.y + thread * kResults + i, results[i]);
  }
};

struct Prmt {
  static __device__ void run(const Data& d, int thread) {
    store(d.y + thread, prmt(load(d.a + thread), load(d.b + thread), load(d.c + thread)));
  }
};

struct Bits {
  static __device__ void run(const Data& d, int thread) {
    const uint32_t a = load(d.a + thread);
    store(d.y + thread * 2, static_cast<uint32_t>(popcount(a)));
    store(d.y + thread * 2 + 1, static_cast<uint32_t>(highest_bit(a)));
  }
};

struct Dp4a {
  static __device__ void run(const Data& d, int thread) {
    const uint32_t a = load(d.a + thread), b = load(d.b + thread), c = load(d.c + thread);
    store(d.y + 2 * thread, as<uint32_t>(dp4a(as<int32_t>(a), as<int32_t>(b), as<int32_t>(c))));
    store(d.y + 2 * thread + 1, dp4a(a, b, c));
  }
};

struct Pack {
  static __device__ void run(const Data& d, int thread) {
    const auto low = as<float>(load(d.a + thread)), high = as<float>(load(d.b + thread));
    store(d.y + 2 * thread, pack_fp16(low, high));
    store(d.y + 2 * thread + 1, pack_bf16(low, high));
  }
};

struct FromFp16 {
  static __device__ void run(const Data& d, int thread) {
    store(reinterpret_cast<float*>(d.y) + thread, float_from_fp16(load(d.a + thread)));
  }
};

// --- warps

template <class T>
__device__ void shuffle_all(uint32_t mask, const uint32_t (&by)[4], T value, int64_t* y) {
  const T results[4] = {shuffle(mask, value, static_cast<int>(by[0])),
                        shuffle_xor(mask, value, static_cast<int>(by[1])), shuffle_up(mask, value, by[2]),
                        shuffle_down(mask, value, by[3])};
  for (int i = 0; i < 4; ++i) store(y + i, static_cast<int64_t>(results[i]));
}

// b: a lane's lane, bits and two distances; c: the mask of its group, 0 where it takes no part.
struct Shuffle {
  static __device__ void run(const Data& d, int thread) {
    const uint32_t mask = load(d.c + thread), word = load(d.a + thread);
    if (mask == 0) return;
    uint32_t by[4];
    get(by, d.b + thread * 4);
    auto* y = reinterpret_cast<int64_t*>(d.y) + thread * 16;
    shuffle_all(mask, by, word, y);
    shuffle_all(mask, by, as<int32_t>(word), y + 4);
    shuffle_all(mask, by, static_cast<float>(word & 0xffffff), y + 8);
    shuffle_all(mask, by, static_cast<long long>(uint64_t{word} << 20), y + 12);
  }
};

// Only the lanes of the mask c[0] take part; b names a lane of it.
struct Partial {
  static constexpr int kResults = 12;
  static __device__ void run(const Data& d, int thread) {
    const uint32_t mask = load(d.c), word = load(d.a + thread);
    if ((mask >> thread & 1) == 0) return;
    const auto signed_word = as<int32_t>(word);
    const uint32_t results[kResults] = {shuffle(mask, word, static_cast<int>(load(d.b + thread))),
                                        vote_any(mask, (word & 1) != 0),
                                        vote_all(mask, (word & 1) != 0),
                                        ballot(mask, (word & 1) != 0),
                                        reduce_add(mask, word),
                                        static_cast<uint32_t>(reduce_min(mask, signed_word)),
                                        static_cast<uint32_t>(reduce_max(mask, signed_word)),
                                        reduce_min(mask, word),
                                        reduce_max(mask, word),
                                        reduce_and(mask, word),
                                        reduce_or(mask, word),
                                        reduce_xor(mask, word)};
    for (int i = 0; i < kResults; ++i) store(d.y + thread * kResults + i, results[i]);
  }
};

// --- memory

// Two more for each time it is called.
__device__ void count_by_exchange(uint32_t* counter) {
  uint32_t seen = 0, expected;
  do {
    expected = seen;
    seen = atomic_compare_exchange(counter, expected, expected + 2);
  } while (seen != expected);
}

// y: add int32, uint32, 64 bits, float; max and min int32, uint32; exchange; a count by compare and exchange; a count;
// then, by way of shared memory, add, max, min, exchange (the sum of what went in) and the count by compare and
// exchange; the sum of subnormal floats in global memory, then in shared memory; from kCounts on what the count
// returned, then what the exchange did.
struct Atomics {
  static constexpr int kCounts = 20;
  static __device__ void run(const Data& d, int thread) {
    uint32_t* shared = shared_memory<uint32_t>();
    const uint32_t word = load(d.a + thread);
    auto* y = reinterpret_cast<int32_t*>(d.y);
    const auto threads = static_cast<int>(gridDim.x * blockDim.x);
    atomic_add(y, as<int32_t>(word));
    atomic_add(d.y + 1, word);
    atomic_add(reinterpret_cast<unsigned long long*>(d.y + 2), static_cast<unsigned long long>(word));
    atomic_add(reinterpret_cast<float*>(d.y + 4), static_cast<float>(word % 1024));
    atomic_max(y + 5, as<int32_t>(word));
    atomic_min(y + 6, as<int32_t>(word));
    atomic_max(d.y + 7, word);
    atomic_min(d.y + 8, word);
    store(d.y + kCounts + threads + thread, atomic_exchange(d.y + 9, static_cast<uint32_t>(thread + 1)));
    count_by_exchange(d.y + 10);
    store(d.y + kCounts + thread, atomic_add(d.y + 11, 1u));
    const auto subnormal = as<float>(word % 1024);
    atomic_add(reinterpret_cast<float*>(d.y + 17), subnormal);
    if (threadIdx.x < 6) store(shared + threadIdx.x, threadIdx.x == 2 ? 0xffffffffu : 0u);
    __syncthreads();
    atomic_add(shared, word);
    atomic_max(shared + 1, word);
    atomic_min(shared + 2, word);
    atomic_add(d.y + 15, atomic_exchange(shared + 3, static_cast<uint32_t>(thread + 1)));
    count_by_exchange(shared + 4);
    atomic_add(reinterpret_cast<float*>(shared + 5), subnormal);
    __syncthreads();
    if (threadIdx.x != 0) return;
    atomic_add(d.y + 12, load(shared));
    atomic_max(d.y + 13, load(shared + 1));
    atomic_min(d.y + 14, load(shared + 2));
    atomic_add(d.y + 15, load(shared + 3));
    atomic_add(d.y + 16, load(shared + 4));
    atomic_add(d.y + 18, load(shared + 5));
  }
};

// A lane's 16, 8 and 4 bytes, from global memory and back.
struct Global {
  static __device__ void run(const Data& d, int thread) {
    struct alignas(8) Pair {
      uint32_t word[2];
    };
    const uint32_t* a = d.a + thread * 8;
    uint32_t* y = d.y + thread * 8;
    store_global(reinterpret_cast<Bytes16*>(y), load_global(reinterpret_cast<const Bytes16*>(a)));
    store_global(reinterpret_cast<Pair*>(y + 4), load_global(reinterpret_cast<const Pair*>(a + 4)));
    store_global(y + 6, load_global(a + 6));
  }
};

// A lane's copies of 16, 8 and 4 bytes, each valid where a bit of b says so.
struct Copies {
  static __device__ void run(const Data& d, int thread) {
    uint32_t* shared = shared_memory<uint32_t>() + thread * 8;
    const uint32_t valid = load(d.b + thread);
    copy_async16(shared, d.a + thread * 8, (valid & 1) != 0);
    copy_async_commit();
    copy_async<8>(shared + 4, d.a + thread * 8 + 4, (valid & 2) != 0);
    copy_async<4>(shared + 6, d.a + thread * 8 + 6, (valid & 4) != 0);
    copy_async_commit();
    copy_async_wait<1>();
    for (int i = 0; i < 4; ++i) store(d.y + thread * 7 + i, load(shared + i));
    copy_async_wait<0>();
    for (int i = 4; i < 7; ++i) store(d.y + thread * 7 + i, load(shared + i));
  }
};

// --- blocks

// The first warp hands rounds of 32 words to the second, which stores them backwards.
struct Barriers {
  static __device__ void run(const Data& d, int thread) {
    uint32_t* shared = shared_memory<uint32_t>();
    constexpr int kRounds = 8, kFull = 1, kEmpty = 2;
    for (int r = 0; r < kRounds; ++r) {
      if (thread < 32) {
        if (r > 0) barrier_sync(kEmpty, 64);
        store(shared + thread, load(d.a + r * 32 + thread));
        barrier_arrive(kFull, 64);
      } else {
        barrier_sync(kFull, 64);
        store(d.y + r * 32 + thread - 32, load(shared + 63 - thread));
        if (r + 1 < kRounds) barrier_arrive(kEmpty, 64);
      }
    }
  }
};

// Seven rounds: each thread takes its neighbour's word 37 places on, plus one. y: the barrier, then two buffers
// from 16.
struct GridBarrier {
  static __device__ void run(const Data& d, int thread) {
    const auto threads = static_cast<int>(gridDim.x * blockDim.x);
    auto* y = reinterpret_cast<int32_t*>(d.y + 16);
    store(y + thread, as<int32_t>(load(d.a + thread)));
    for (int r = 0; r < 7; ++r) {
      grid_barrier(d.y);
      store(y + (r + 1) % 2 * threads + thread, load_coherent(y + r % 2 * threads + (thread + 37) % threads) + 1);
    }
  }
};

// y: the word of the next block in the cluster, the word that the block two before sent, the rank; four words of the
// block three on, the same for four threads; two that the block before sent.
struct Cluster {
  static __device__ void run(const Data& d, int thread) {
    uint32_t* shared = shared_memory<uint32_t>();
    const auto lane = static_cast<int>(threadIdx.x);
    const unsigned rank = cluster_rank();
    store(shared + lane, load(d.a + thread));
    cluster_barrier();
    uint32_t* const y = d.y + thread * 9;
    store(y, load_remote(shared + lane, (rank + 1) % 4));
    store_remote(shared + 32 + lane, (rank + 2) % 4, load(d.a + thread) + 1);
    const Bytes16 four = load_remote(reinterpret_cast<Bytes16*>(shared) + lane / 4, (rank + 3) % 4);
    struct alignas(8) Two {
      uint32_t word[2];
    };
    Two* const two = reinterpret_cast<Two*>(shared + 64) + lane;
    store_remote(two, (rank + 1) % 4, Two{{load(d.a + thread), static_cast<uint32_t>(lane)}});
    cluster_barrier();
    store(y + 1, load(shared + 32 + lane));
    store(y + 2, rank);
    for (int i = 0; i < 4; ++i) store(y + 3 + i, four.word[i]);
    for (int i = 0; i < 2; ++i) store(y + 7 + i, load(two).word[i]);
  }
};

// --- matrices

// a: 32 rows of four words in shared memory; b: the row that each lane brings.
template <int Count, bool Transposed>
struct LoadMatrix {
  static __device__ void run(const Data& d, int thread) {
    Bytes16* rows = shared_memory<Bytes16>();
    store(rows + thread, load(reinterpret_cast<const Bytes16*>(d.a) + thread));
    __syncwarp();
    uint32_t tile[Count];
    const Bytes16* row = rows + load(d.b + thread);
    if constexpr (Transposed) {
      load_matrix_transposed(tile, row);
    } else {
      load_matrix(tile, row);
    }
    for (int i = 0; i < Count; ++i) store(d.y + thread * Count + i, tile[i]);
  }
};

template <class A, class B, class Sum>
struct Mma {
  static __device__ void run(const Data& d, int thread) {
    uint32_t a[4], b[2], c[4];
    get(a, d.a + thread * 4);
    get(b, d.b + thread * 2);
    get(c, d.c + thread * 4);
    Sum sum[4] = {as<Sum>(c[0]), as<Sum>(c[1]), as<Sum>(c[2]), as<Sum>(c[3])};
    mma<A, B>(sum, a, b);
    put(d.y + thread * 4, sum);
  }
};

// c: four words of sums a lane, then one of metadata a lane from 128 on.
template <class A, int Selector, class Sum>
struct MmaSparse {
  static __device__ void run(const Data& d, int thread) {
    uint32_t a[4], b[4], c[4];
    get(a, d.a + thread * 4);
    get(b, d.b + thread * 4);
    get(c, d.c + thread * 4);
    Sum sum[4] = {as<Sum>(c[0]), as<Sum>(c[1]), as<Sum>(c[2]), as<Sum>(c[3])};
    mma_sparse<A, Selector>(sum, a, b, load(d.c + 128 + thread));
    put(d.y + thread * 4, sum);
  }
};

using Start = void (*)(const Data&, int);
constexpr size_t kShared = 32 * 8 * sizeof(uint32_t);

template <class Body>
void start(const Data& data, int threads) {
  const int block = threads < 64 ? threads : 64;
  launch(instruction_kernel<Body>, dim3(threads / block), dim3(block), kShared, nullptr, data);
}

void start_together(const Data& data, int threads) {
  launch_cooperative(instruction_kernel<GridBarrier>, dim3(threads / 64), dim3(64), kShared, nullptr, data);
}

void start_clusters(const Data& data, int threads) {
  launch_cluster(instruction_kernel<Cluster>, dim3(threads / 32), dim3(32), 4, kShared, nullptr, data);
}

const std::map<std::string, Start> kInstructions = {
    {"lop3", start<Lop3>},
    {"prmt", start<Prmt>},
    {"bits", start<Bits>},
    {"dp4a", start<Dp4a>},
    {"pack", start<Pack>},
    {"float_from_fp16", start<FromFp16>},
    {"shuffle", start<Shuffle>},
    {"partial", start<Partial>},
    {"atomics", start<Atomics>},
    {"global", start<Global>},
    {"copies", start<Copies>},
    {"barriers", start<Barriers>},
    {"grid_barrier", start_together},
    {"cluster", start_clusters},
    {"load_matrix 1", start<LoadMatrix<1, false>>},
    {"load_matrix 2", start<LoadMatrix<2, false>>},
    {"load_matrix 4", start<LoadMatrix<4, false>>},
    {"load_matrix_transposed 1", start<LoadMatrix<1, true>>},
    {"load_matrix_transposed 2", start<LoadMatrix<2, true>>},
    {"load_matrix_transposed 4", start<LoadMatrix<4, true>>},
    {"mma bf16 bf16", start<Mma<bf16, bf16, float>>},
    {"mma fp16 fp16", start<Mma<fp16, fp16, float>>},
    {"mma int8 int8", start<Mma<int8_t, int8_t, int32_t>>},
    {"mma int8 uint8", start<Mma<int8_t, uint8_t, int32_t>>},
    {"mma uint8 int8", start<Mma<uint8_t, int8_t, int32_t>>},
    {"mma uint8 uint8", start<Mma<uint8_t, uint8_t, int32_t>>},
    {"mma_sparse bf16 0", start<MmaSparse<bf16, 0, float>>},
    {"mma_sparse bf16 1", start<MmaSparse<bf16, 1, float>>},
    {"mma_sparse fp16 0", start<MmaSparse<fp16, 0, float>>},
    {"mma_sparse fp16 1", start<MmaSparse<fp16, 1, float>>},
    {"mma_sparse int8 0", start<MmaSparse<int8_t, 0, int32_t>>},
};

}  // namespace
}  // namespace burnish

// Runs an instruction in `threads` threads, on memory that the device reaches; a message where it failed, else null.
EXPORT const char* run_instruction(const char* name, int threads, uint64_t seed, const void* a, const void* b,
                                   const void* c, void* y) {
  using namespace burnish;
  return attempt(kInstructions, name, seed, [&](Start start) { start(data_of(a, b, c, y), threads); });
}
