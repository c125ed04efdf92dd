// A CUDA device on a CPU, for tests: a thread is a fiber, and whichever thread may run next is drawn from a seed.
//
// Everything that hardware leaves open is left open here: the order of threads and of blocks, what uninitialised shared
// memory holds, when an asynchronous copy arrives. A kernel that is right under every seed did not rely on any of it. A
// kernel that does what hardware would not, or that leaves its result to chance, is stopped with an exception that
// names the kernel, the block, the thread and the line.
//
//   machine.cpp   threads, barriers, collectives of a warp; which thread runs next
//   memory.cpp    every access through the wrappers: bounds, first writes, races, copies that arrive late
//   counters.cpp  what a launch moved and did, exactly
//   report.cpp    what the exceptions say
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#pragma GCC visibility push(default)  // kernels outside this library run on the same machine

// Read all the time, so without a call: a few bytes of what the loader keeps for libraries like this one.
#define BURNISH_FAST_TLS __attribute__((tls_model("initial-exec")))

// CUDA's words for where a thread is. They change with the running thread.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
BURNISH_FAST_TLS extern constinit thread_local uint3 threadIdx, blockIdx;
BURNISH_FAST_TLS extern constinit thread_local dim3 blockDim, gridDim;

namespace burnish::host {

using Where = std::source_location;

constexpr unsigned kWarp = 32;

// --- for the host side

// The next launches draw from this seed.
void set_seed(uint64_t seed);

// From now on launches are counted, or no longer; and what was counted since, as JSON, a list with an object a launch.
void set_counting(bool on);
std::string take_counters();

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> thread;  // the kernel, with its arguments
  const void* kernel;
  Where where;
  uint64_t together = 1;     // blocks that run at the same time: one, those of a cluster, those of the grid
  bool cooperative = false;  // those of the grid
  bool dependent = false;    // may have started before the launch before it ended
};

// Runs every block of a launch; throws std::runtime_error where the kernel cannot go on.
void run(const Launch& launch);

// How many blocks of this size a cooperative launch may have.
unsigned resident_blocks(dim3 block, size_t shared_bytes);

// --- for a thread of a kernel

// The block's shared memory, and where an address in it lies in that of another block of the cluster.
void* shared_memory();
void* in_block(const void* shared, unsigned rank, Where where);
unsigned cluster_rank();

// The thread's number within its warp.
unsigned lane();

// What an access does. A streaming one goes past the caches that see other threads' stores; a copy stores later; a
// ticket is atomic, publishes what its thread knows and lets it see what those before it published. Streaming and
// coherent loads and tickets are of global memory, matrix loads of shared memory, the others of either.
enum class Access : uint8_t { kLoad, kStreamingLoad, kCoherentLoad, kMatrixLoad, kStore, kCopy, kAtomic, kTicket };

// To be called before each access: stops the launch where the access is out of shared memory's bounds, in the wrong
// memory, not aligned, reads what nothing has written, or races with another one.
void access(Access kind, const void* address, size_t bytes, Where where);
bool in_shared(const void* address);

// Asynchronous copies of this thread. The bytes arrive at once or not before a wait asks for their group, as the seed
// has it.
void copy_async(void* to, const void* from, unsigned bytes, bool valid, Where where);
void copy_commit();
void copy_wait(unsigned pending, Where where);

// The launch before this one has ended and its writes are visible.
void dependency_wait();

// A point at which the hardware might let another thread run; and that memory has changed since the last one.
void pause(Where where);
void progress();

// Waits until `count` threads have come to barrier `id` of the block, 0 for all; or only says that it has come.
void barrier(unsigned id, unsigned count, bool wait, const char* name, Where where);

// Waits for all threads of the blocks that run together: those of a cooperative launch, or else of a cluster.
void barrier_together(const char* name, bool cooperative, Where where);

// Comes to a collective of the lanes in `mask`, an aligned one only with those at the same place. True in the lane that
// came last, which finds what every lane brought and takes in `brought` and `takes`, computes, and calls depart. The
// others return false after that.
bool arrive(const char* name, uint32_t mask, const void* in, void* out, Where where, bool aligned = false);
void depart(uint32_t mask);
const void* brought(unsigned lane);
void* takes(unsigned lane);

// __syncwarp: a collective that orders the memory accesses of its lanes.
void sync_warp(uint32_t mask, Where where);

// Adds one to a counter of the launch.
void count_event(const char* name);

// Stops the launch: the thread did what hardware would not.
[[noreturn]] void stop(const std::string& what, Where where);

// compute(in, out) once for a warp, with pointers to what each lane of `mask` brought and takes, null for the others.
template <class Out, class In, class Compute>
Out collective(const char* name, uint32_t mask, const In& in, Where where, const Compute& compute,
               bool aligned = false) {
  Out out{};
  if (arrive(name, mask, &in, &out, where, aligned)) {
    const In* ins[kWarp];
    Out* outs[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const bool present = mask >> lane & 1;
      ins[lane] = present ? static_cast<const In*>(brought(lane)) : nullptr;
      outs[lane] = present ? static_cast<Out*>(takes(lane)) : nullptr;
    }
    compute(ins, outs);
    depart(mask);
  }
  return out;
}

}  // namespace burnish::host

#pragma GCC visibility pop
