// What the parts of the machine share: the blocks that run together, their threads, and the clock that orders accesses.
#pragma once

#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/host/fiber.h"
#include "cuda/host/machine.h"

namespace burnish::host {

constexpr unsigned kBarriers = 16;
constexpr size_t kRedZone = 1024;  // bytes before and after a block's shared memory

enum class State { kReady, kBarrier, kCollective, kDone };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  bool valid, landed;
  uint64_t group;
};

// Of blocks, by their first thread's number: up to which time the accesses of each of its threads are ordered.
using Seen = std::map<uint32_t, std::shared_ptr<const std::vector<uint32_t>>>;

// What a thread knows: the accesses that are ordered before its next one. The clock ticks whenever threads meet.
struct Order {
  bool waited = false;          // those of the launch before, where that may overlap this one
  Seen seen;                    // what tickets told
  std::vector<uint32_t> known;  // those of each thread of the block up to a time; empty until part of a block meets
};

struct Thread {
  Context context;
  uint3 index;
  unsigned block;  // among those that run together
  State state;
  // what it waits for, and where
  const char* name;
  unsigned barrier;
  uint32_t mask;
  Where where;
  // what it brings to a collective
  const void* in;
  void* out;
  std::vector<Copy> copies;
  uint64_t group;  // of the next copy
  Order order;
};

// Threads on their way to a barrier: all that came and from where, and of them those that wait.
struct Meeting {
  std::vector<unsigned> came, waiting;
  std::vector<Where> from;
  unsigned expected;
};

// A collective of a warp that some of its lanes have come to.
struct Gathering {
  const char* name;
  uint32_t mask;
  Where first;
  unsigned came;
};

struct Block {
  uint3 index;
  uint32_t first;  // its first thread's number in the launch; numbers wrap around
  uint32_t run;    // its number among all blocks that ran
  uint32_t met;    // time at which all its threads met last
  Order order;     // what each of its threads knows beside its own
  Meeting barriers[kBarriers];
};

struct Memory;

struct Machine {
  const Launch* launch;
  Memory* memory;
  unsigned block_threads;
  std::vector<Block> blocks;    // those that run together
  std::vector<Thread> threads;  // of all these blocks
  std::vector<unsigned> ready;
  std::vector<std::vector<Gathering>> warps;
  Meeting everyone;
  uint32_t now;  // ticks of this launch
  uint32_t met;  // time at which all threads of all blocks met last
  unsigned current, done;
  uint64_t idle;    // pauses since anything happened
  uint64_t streak;  // accesses since another thread ran
  Context scheduler;
  std::exception_ptr error;
};

BURNISH_FAST_TLS extern constinit thread_local Machine* machine;
BURNISH_FAST_TLS extern constinit thread_local uint64_t random_state;

inline Thread& here() { return machine->threads[machine->current]; }
inline Block& here_block() { return machine->blocks[here().block]; }
inline unsigned in_own_block() { return machine->current - here().block * machine->block_threads; }

// A random number that depends on the seed and on what ran before: splitmix64 (Steele, Lea, Flood 2014).
inline uint64_t draw() {
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Adds what `other` knows; `known` apart, which is of one block.
void join(Order& order, const Order& other);

// --- memory.cpp

void begin_memory(Machine& machine);
void fill_shared(unsigned block);   // with random bytes
void check_shared(unsigned block);  // that nothing was written around it
unsigned char* shared_of(unsigned block);

// --- counters.cpp

void count_launch(const Launch& launch);
void count_access(Access kind, bool shared, const void* address, size_t bytes, Where where);
void count_blocks();  // that ran together, once they have ended

// --- report.cpp

std::string text(const uint3& at);
std::string text(Where where);
std::string kernel_name(const void* kernel);
std::string title();
std::string deadlock();

}  // namespace burnish::host
