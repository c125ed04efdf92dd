// A CUDA device on a CPU, for tests: a thread is a fiber, and whichever thread may run next is drawn from a seed.
//
// Everything that hardware leaves open is left open here: the order of threads and of blocks, what uninitialised shared
// memory holds, when an asynchronous copy arrives. A kernel that is right under every seed did not rely on any of it. A
// kernel that cannot go on is stopped with an exception that names the launch, the block and the threads.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

// CUDA's words for where a thread is. They change with the running thread.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};

namespace burnish::host {

using Where = std::source_location;

constexpr unsigned kWarp = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// --- for the host side

// The next launches draw from this seed.
void set_seed(uint64_t seed);

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> thread;  // the kernel, with its arguments
  Where where;
};

// Runs every block of a launch; throws std::runtime_error where the kernel cannot go on.
void run(const Launch& launch);

// --- for a thread of a kernel

// The block's shared memory.
void* shared_memory();

// A random number that depends on the seed and on what ran before.
uint64_t draw();

// A point at which the hardware might let another thread run.
void pause();

// Waits until `count` threads have come to barrier `id`; 0 for all of the block.
void barrier(unsigned id, unsigned count, const char* name, Where where);

// Comes to a collective of the lanes in `mask`. True in the lane that came last, which finds what every lane brought
// and takes in `brought` and `takes`, computes, and calls depart. The others return false after that.
bool arrive(const char* name, uint32_t mask, const void* in, void* out, Where where);
void depart(uint32_t mask);
const void* brought(unsigned lane);
void* takes(unsigned lane);

// compute(in, out) once for a warp, with pointers to what each lane of `mask` brought and takes, null for the others.
template <class Out, class In, class Compute>
Out collective(const char* name, uint32_t mask, const In& in, Where where, const Compute& compute) {
  Out out{};
  if (arrive(name, mask, &in, &out, where)) {
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

// Asynchronous copies of this thread. A copy arrives at once or not before a wait asks for its group, as the seed has
// it.
void copy_async(void* to, const void* from, unsigned bytes, unsigned read);
void copy_commit();
void copy_wait(unsigned pending);

// Stops the launch: the thread did what hardware would not.
[[noreturn]] void stop(const std::string& what, Where where);

// A wide access must lie at a multiple of its size.
inline void check_aligned(const void* address, size_t bytes, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    stop("an access of " + std::to_string(bytes) + " bytes is not aligned", where);
  }
}

}  // namespace burnish::host
