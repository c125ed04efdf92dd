#include "cuda/host/machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda/host/fiber.h"

namespace burnish::host {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kPage = 4096;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kBarriers = 16;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr size_t kCanaryBytes = 256;  // past the end of shared memory

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, read;
  uint64_t group;
};

enum class State { kReady, kBarrier, kCollective, kDone };

struct Thread {
  Context context;
  uint3 index;
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
};

// Stacks, one a thread, each below a page that no access survives.
class Stacks {
 public:
  Stacks() {
    base_ =
        mmap(nullptr, kMaxThreads * kEach, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(at(i), kPage, PROT_NONE);
  }
  ~Stacks() { munmap(base_, kMaxThreads * kEach); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  void* usable(unsigned thread) const { return at(thread) + kPage; }

 private:
  static constexpr size_t kEach = kStackBytes + kPage;
  char* at(unsigned thread) const { return static_cast<char*>(base_) + thread * kEach; }
  void* base_;
};

struct Block {
  const Launch* launch;
  std::vector<Thread> threads;
  std::vector<unsigned> ready;
  unsigned current;
  unsigned done;
  unsigned arrived[kBarriers];
  unsigned char* shared;
  Context scheduler;
  std::exception_ptr error;
};

thread_local Block* block = nullptr;
thread_local uint64_t random_state = 1;

Thread& here() { return block->threads[block->current]; }

std::string text(const uint3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string text(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

std::string title() {
  return "CUDA on the CPU: the kernel launched at " + text(block->launch->where) + " in " +
         block->launch->where.function_name() + ", block " + text(blockIdx);
}

// Goes on with a ready thread, or with the scheduler where there is none.
void next(bool last = false) {
  Thread& from = here();
  if (block->ready.empty()) {
    switch_context(from.context, block->scheduler, last);
  } else {
    const size_t i = draw() % block->ready.size();
    const unsigned to = block->ready[i];
    block->ready[i] = block->ready.back();
    block->ready.pop_back();
    if (to == block->current) return;
    block->current = to;
    threadIdx = block->threads[to].index;
    switch_context(from.context, block->threads[to].context, last);
  }
}

void make_ready(unsigned thread) {
  block->threads[thread].state = State::kReady;
  block->ready.push_back(thread);
}

void thread_entry() {
  entered_context();
  try {
    block->launch->thread();
    here().state = State::kDone;
    ++block->done;
    next(true);
  } catch (...) {
    block->error = std::current_exception();
    block->ready.clear();
    next(true);
  }
  std::terminate();  // nothing resumes a thread that has ended
}

void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.read);
  std::memset(static_cast<char*>(copy.to) + copy.read, 0, copy.bytes - copy.read);
}

// Threads as ranges: "0-31, 40".
std::string ranges(const std::vector<unsigned>& numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    out << (i == 0 ? "" : ", ") << numbers[i];
    if (last > i) out << "-" << numbers[last];
    i = last + 1;
  }
  return out.str();
}

// What each thread waits for, threads of the same fate together.
std::string deadlock() {
  std::vector<std::pair<std::string, std::vector<unsigned>>> fates;
  for (unsigned i = 0; i < block->threads.size(); ++i) {
    const Thread& thread = block->threads[i];
    std::ostringstream fate;
    if (thread.state == State::kDone) {
      fate << "returned";
    } else {
      fate << "wait in " << thread.name << " at " << text(thread.where);
      if (thread.state == State::kBarrier && thread.barrier != 0) fate << ", barrier " << thread.barrier;
      if (thread.state == State::kCollective) {
        fate << ", warp " << i / kWarp << ", mask 0x" << std::hex << thread.mask;
      }
    }
    const auto same = std::find_if(fates.begin(), fates.end(), [&](auto& f) { return f.first == fate.str(); });
    if (same != fates.end()) {
      same->second.push_back(i);
    } else {
      fates.emplace_back(fate.str(), std::vector<unsigned>{i});
    }
  }
  std::string report = title() + ": deadlock.";
  for (const auto& [fate, threads] : fates) report += " Threads " + ranges(threads) + " " + fate + ".";
  return report;
}

void run_block(Block& b, const Stacks& stacks, std::vector<unsigned char>& memory) {
  const Launch& launch = *b.launch;
  const dim3 size = launch.block;
  for (auto& byte : memory) byte = static_cast<unsigned char>(draw());
  const std::vector<unsigned char> canary(memory.end() - kCanaryBytes, memory.end());
  b.shared = memory.data();
  b.done = 0;
  b.error = nullptr;
  std::fill(std::begin(b.arrived), std::end(b.arrived), 0);
  b.ready.clear();
  for (unsigned i = 0; i < b.threads.size(); ++i) {
    Thread& thread = b.threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.copies.clear();
    thread.group = 0;
    begin_context(thread.context, stacks.usable(i), kStackBytes, thread_entry);
    make_ready(i);
  }
  b.current = static_cast<unsigned>(draw() % b.threads.size());
  std::swap(b.ready[b.current], b.ready.back());
  b.ready.pop_back();
  threadIdx = b.threads[b.current].index;
  switch_context(b.scheduler, b.threads[b.current].context);
  if (b.error) std::rethrow_exception(b.error);
  if (b.done < b.threads.size()) throw std::runtime_error(deadlock());
  if (!std::equal(canary.begin(), canary.end(), memory.end() - kCanaryBytes)) {
    throw std::runtime_error(title() + ": wrote past the end of its " + std::to_string(launch.shared_bytes) +
                             " bytes of shared memory");
  }
}

}  // namespace

void set_seed(uint64_t seed) { random_state = seed * 0x9e3779b97f4a7c15u + 1; }

// splitmix64 (Steele, Lea, Flood 2014)
uint64_t draw() {
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void run(const Launch& launch) {
  thread_local const Stacks stacks;
  Block b{};
  b.launch = &launch;
  block = &b;
  blockDim = launch.block;
  gridDim = launch.grid;
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || launch.grid.y > 65535 || launch.grid.z > 65535 ||
      launch.grid.x > 0x7fffffffu || launch.shared_bytes > kMaxSharedBytes) {
    throw std::runtime_error(title() + ": no GPU takes this launch: " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads, " + std::to_string(launch.shared_bytes) +
                             " bytes of shared memory");
  }
  b.threads.resize(threads);
  std::vector<unsigned char> memory(launch.shared_bytes + kCanaryBytes);
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
  for (const uint64_t i : order) {
    const uint64_t row = launch.grid.x, plane = row * launch.grid.y;
    blockIdx = {static_cast<unsigned>(i % row), static_cast<unsigned>(i % plane / row),
                static_cast<unsigned>(i / plane)};
    run_block(b, stacks, memory);
  }
  block = nullptr;
}

void* shared_memory() { return block->shared; }

void pause() {
  block->ready.push_back(block->current);
  next();
}

void barrier(unsigned id, unsigned count, const char* name, Where where) {
  if (id >= kBarriers) stop("there is no barrier " + std::to_string(id), where);
  Thread& thread = here();
  const unsigned expected = count == 0 ? static_cast<unsigned>(block->threads.size()) : count;
  if (expected % kWarp != 0 && count != 0) stop("a barrier takes whole warps", where);
  thread.state = State::kBarrier;
  thread.barrier = id;
  thread.name = name;
  thread.where = where;
  if (++block->arrived[id] == expected) {
    block->arrived[id] = 0;
    for (unsigned i = 0; i < block->threads.size(); ++i) {
      const Thread& other = block->threads[i];
      if (other.state == State::kBarrier && other.barrier == id) make_ready(i);
    }
  }
  next();
}

bool arrive(const char* name, uint32_t mask, const void* in, void* out, Where where) {
  Thread& thread = here();
  const unsigned lane = block->current % kWarp, first = block->current - lane;
  if ((mask >> lane & 1) == 0) stop(std::string(name) + ": the mask leaves out the lane that calls", where);
  thread.state = State::kCollective;
  thread.name = name;
  thread.mask = mask;
  thread.where = where;
  thread.in = in;
  thread.out = out;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (first + i >= block->threads.size()) stop(std::string(name) + ": the mask names a lane the warp lacks", where);
    const Thread& other = block->threads[first + i];
    if (other.state != State::kCollective || other.mask != mask || std::strcmp(other.name, name) != 0) {
      next();
      return false;
    }
  }
  return true;
}

void depart(uint32_t mask) {
  const unsigned first = block->current / kWarp * kWarp;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) make_ready(first + i);
  }
  next();
}

const void* brought(unsigned lane) { return block->threads[block->current / kWarp * kWarp + lane].in; }

void* takes(unsigned lane) { return block->threads[block->current / kWarp * kWarp + lane].out; }

void copy_async(void* to, const void* from, unsigned bytes, unsigned read) {
  const Copy copy{to, from, bytes, read, here().group};
  if (draw() & 1) {
    land(copy);
  } else {
    here().copies.push_back(copy);
  }
}

void copy_commit() { ++here().group; }

void copy_wait(unsigned pending) {
  Thread& thread = here();
  const auto due = [&](const Copy& copy) { return copy.group + pending < thread.group; };
  for (const Copy& copy : thread.copies) {
    if (due(copy)) land(copy);
  }
  std::erase_if(thread.copies, due);
  pause();
}

void stop(const std::string& what, Where where) {
  throw std::runtime_error(title() + ", thread " + text(threadIdx) + ", warp " +
                           std::to_string(block->current / kWarp) + " lane " + std::to_string(block->current % kWarp) +
                           ", " + text(where) + ": " + what);
}

}  // namespace burnish::host
