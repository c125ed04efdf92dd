// A CUDA device on a CPU, for tests: a thread is a fiber, and whichever thread may run next is drawn from a seed.
//
// Everything that hardware leaves open is left open here: the order of threads and of blocks, what uninitialised shared
// memory holds, when an asynchronous copy arrives. A kernel that is right under every seed did not rely on any of it. A
// kernel that does what hardware would not, or that leaves its result to chance, is stopped with an exception that
// names the kernel, the block, the thread and the line.
//
//   machine.cpp   threads, barriers, collectives of a warp; which thread runs next
//   clock.h       which accesses of other threads come before those of a thread
//   memory.cpp    every access through the wrappers: bounds, first writes, races, copies that arrive late
//   tiles.cpp     copies of tiles, the barriers that count their bytes, and what else goes on beside the threads
//   counters.cpp  what a launch moved and did, exactly
//   report.cpp    what the exceptions say
//   ptx.cuh       what kernels call, matrix.h, warpgroup.cuh and launch.cuh as well
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <source_location>
#include <span>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/host/clock.h"
#include "cuda/host/fiber.h"

#pragma GCC visibility push(default)  // kernels outside this library run on the same machine

// Read all the time, so without a call: a few bytes of what the loader keeps for libraries like this one.
#define BURNISH_FAST_TLS __attribute__((tls_model("initial-exec")))

// CUDA's words for where a thread is. They change with the running thread.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
BURNISH_FAST_TLS extern constinit thread_local uint3 threadIdx, blockIdx;
BURNISH_FAST_TLS extern constinit thread_local dim3 blockDim, gridDim;

namespace burnish::host {

using Where = std::source_location;

constexpr unsigned kWarp = 32, kBarriers = 16;
constexpr size_t kWord = 4, kPage = 4096;
constexpr uint64_t kMaxTogether = 24576;  // threads that run at the same time: all of a cooperative launch
constexpr uint32_t kLaunchBefore = 0;     // the thread number that stands for all that the launch before did

// How a launch differs from an ordinary one.
struct Special {
  unsigned cluster = 1;      // blocks that run at the same time
  bool cooperative = false;  // all of them do
  bool dependent = false;    // may have started before the launch before it ended
};

struct Launch : Special {
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> thread;  // the kernel, with its arguments
  const void* kernel;
  Where where;
};

// An asynchronous copy that its thread has not waited for.
struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  uint64_t group;
};

// Threads on their way to a barrier: how many are to come and came, the line by which the first of each block or warp
// did, and what those know that do not wait.
struct Barrier {
  unsigned expected, came;
  std::map<unsigned, Where> lines;
  Clock known;
};

// A barrier in shared memory that counts arrivals and bytes: what the phase still lacks, and what those know that
// arrived or copied, in this phase and in those that have ended.
struct Phases {
  unsigned expected, lacking;
  int64_t bytes;
  uint64_t ended;
  Clock known, published;
};

// What goes on beside the threads until its thread waits for its group: a store of a tile, or a product.
struct Deferred {
  uint64_t group;
  std::function<void()> act;
};

// What a thread waits for: a barrier, or else a collective of the lanes in `mask`, which finds what it brought.
struct Wait {
  const char* name = nullptr;  // of nothing
  Where where;
  const void* barrier = nullptr;
  uint32_t mask = 0;
  void* brought = nullptr;
};

struct Thread {
  Context context{};
  uint3 index;
  unsigned block, in_block;  // among those that run together; its number there
  uint32_t number;           // in the launch
  Wait wait{};
  std::vector<Copy> copies{};
  uint64_t group = 0;  // of the next copy
  std::vector<Deferred> tile_stores{}, products{};
  uint64_t tile_group = 0, product_group = 0;  // of the next one
  uint64_t shown = 0;                          // up to when its stores are there for what goes on beside the threads
  uint64_t shown_remote = 0;                   // the same for those to other blocks' shared memory
  uint64_t shown_global = 0;                   // and for those to global memory
  bool fenced = false;                         // its sums are ready for products
  const Clock* clock;
};
using Threads = std::vector<Thread*>;  // in ascending order

struct Block {
  uint3 index;
  std::array<Barrier, kBarriers> barriers;
  unsigned ended;  // of its threads
};

// The last store to a word, or the last load of it. Bytes are a bit each.
struct Touch {
  uint64_t time;
  Where where;
  uint32_t thread;
  uint8_t bytes;  // that it took
  uint8_t held;   // that a store of this block has written by now
  bool atomic;
  bool pending;  // a copy that its thread has not waited for
  bool beside;   // a tile's
};

struct Memory {
  std::vector<unsigned char> shared;  // of the blocks that run together, each between red zones
  size_t stride;                      // of a block in it
  std::vector<Touch> stores, loads;   // of each of its words
  std::unordered_map<uintptr_t, std::array<Touch, kPage / kWord>> pages;  // stores to global memory
  uint64_t launched;                               // when the launch was; earlier stores are of the one before
  std::unordered_map<const void*, Clock> tickets;  // what those who drew one have published
};

struct Machine {
  const Launch* launch;
  Memory memory;
  unsigned block_threads;
  std::vector<Block> blocks;    // those that run together
  std::vector<Thread> threads;  // of all these blocks
  Threads ready;
  Thread* current;
  Threads meeting;  // in a collective; kept between them for its memory only
  Barrier everyone;
  std::vector<Barrier> clusters;                   // of those that run together
  std::unordered_map<const void*, Phases> phases;  // of the barriers that threads arrive at without waiting
  std::vector<std::function<void()>> arriving;     // tiles that are on their way there
  std::deque<Clock> clocks;                        // that these threads have had
  uint64_t now;                                    // ticks whenever threads meet
  uint64_t began;                                  // when these blocks did
  uint64_t idle;                                   // pauses since anything happened
  uint64_t streak;                                 // accesses since another thread ran
  Context scheduler;
  std::exception_ptr error;
};

BURNISH_FAST_TLS extern constinit thread_local Machine* machine;

inline uint64_t volume(const uint3& size) { return uint64_t{size.x} * size.y * size.z; }
inline Thread& here() { return *machine->current; }
inline unsigned lane() { return here().in_block % kWarp; }

// --- machine.cpp

// The next launches draw from this seed.
void set_seed(uint64_t seed);

// Runs every block of a launch; throws std::runtime_error where the kernel cannot go on.
void run(const Launch& launch);

// A point at which the hardware might let another thread run.
void pause(Where where);

// Waits until `count` threads have come to barrier `id` of the block, 0 for all; or only says that it has come.
void barrier(unsigned id, unsigned count, bool waits, const char* name, Where where);

// Waits for all threads of a cooperative launch, or of the cluster.
void grid_barrier(Where where);
void cluster_barrier(Where where);

// An argument, and the line that passes it.
template <class T>
struct At {
  T value;
  Where where;
  At(T value, Where where = Where::current()) : value(value), where(where) {}
};
using Mask = At<uint32_t>;  // lanes of a warp, a bit each

// Lets these threads go on.
void release(const Threads& threads);

// Waits for what release() ends.
void wait_for(const void* barrier, const char* name, Where where);

// Comes to a collective, an aligned one only with those at the same place. The lane that comes last runs act() for all.
void meet(const char* name, Mask mask, void* brought, bool aligned, const std::function<void(const Threads&)>& act);

// What these threads know and did until now, beside what the clock knows, becomes known to all of them.
void share(const Threads& threads, Clock clock = {});

// compute(lanes) once for a warp, with pointers to what the lanes of the mask brought, in their order. It may change
// that; each lane gets its own back.
template <class Mine>
Mine collective(const char* name, Mask mask, Mine mine, const auto& compute, bool aligned = false) {
  meet(name, mask, &mine, aligned, [&compute](const Threads& threads) {
    std::vector<Mine*> lanes(threads.size());
    for (size_t i = 0; i < lanes.size(); ++i) lanes[i] = static_cast<Mine*>(threads[i]->wait.brought);
    compute(lanes);
  });
  return mine;
}

// --- memory.cpp

// What an access does. A streaming one goes past the caches that see other threads' stores; a copy, or a tile's, stores
// later; a ticket is atomic, publishes what its thread knows and lets it see what those before it published. Streaming
// and coherent loads and tickets are of global memory, matrix loads of shared memory, the others of either.
enum class Access : uint8_t {
  kLoad,
  kStreamingLoad,
  kCoherentLoad,
  kMatrixLoad,
  kTileLoad,
  kStore,
  kCopy,
  kTileCopy,
  kAtomic,
  kTicket
};
inline bool writes(Access kind) { return kind >= Access::kStore; }

// To be called before each access: stops the launch where the access is out of shared memory's bounds, in the wrong
// memory, not aligned, reads what nothing has written, or races with another one.
void access(Access kind, const void* address, size_t bytes, Where where);

// The block's shared memory, and where an address in it lies in that of another block of the cluster.
void* shared_memory();
void* in_block(const void* shared, unsigned rank, Where where);
bool has_ended(unsigned block);  // then its shared memory is no longer its own
bool in_shared(const void* address);

// Asynchronous copies of this thread. The bytes arrive at once or not before a wait asks for their group, as the seed
// has it.
void copy_async(void* to, const void* from, unsigned bytes, bool valid, Where where);
void copy_wait(unsigned pending, Where where);

// The launch before this one has ended and its writes are visible.
void dependency_wait();

// For a read by what goes on beside the threads: it sees a thread's stores once they have been shown.
void access_beside(const void* address, size_t bytes, Where where);

// Where the block's shared memory has an address; stops for any other.
size_t shared_offset(const void* address, Where where);

// The bytes of a copy from shared or global memory that ends now are there.
void arrived(const void* to, size_t bytes);

// --- tiles.cpp

// A tile arrives that was on its way, if any was.
bool one_arrives();

// What ptx.cuh has by these names, once in a launch.
void grid_arrive(uint32_t* counter, Where where);
void grid_wait(const uint32_t* counter, Where where);

// One of the groups that a thread waits for, and those before it, are done.
void finish(std::vector<Deferred>& all, uint64_t groups);

// --- counters.cpp

// From now on launches are counted, or no longer; and what was counted since, as JSON, a list with an object a launch.
void set_counting(bool on);
std::string take_counters();

// Adds one to a counter of the launch.
void count_event(const char* name);

// --- report.cpp

// Stops the launch: the thread did what hardware would not.
[[noreturn]] void stop_thread(Where where, const std::string& what);

std::string say(const auto&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}
[[noreturn]] void stop(Where where, const auto&... what) { stop_thread(where, say(what...)); }

#pragma GCC visibility pop

// --- between the parts

uint64_t draw();  // a random number that depends on the seed and on what ran before

void begin_memory();
void fill_shared(unsigned block);   // with random bytes
void check_shared(unsigned block);  // that nothing was written around it

void count_launch();
void count_access(Access kind, bool shared, const void* address, size_t bytes, Where where);
void count_tile(Access kind, const void* address, size_t bytes);  // a unit of one, in global memory
void count_blocks();                                              // that ran together, once they have ended

std::string text(const uint3& at);
std::string text(Where where);
std::string kernel_name(const void* kernel);

[[noreturn]] void stop_launch(const std::string& what);  // that the machine cannot run, or go on with
[[noreturn]] void stop_deadlock();

}  // namespace burnish::host
