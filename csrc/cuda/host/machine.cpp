#include "cuda/host/machine.h"

#include <sys/mman.h>

#include <memory>
#include <new>
#include <numeric>

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};

namespace burnish::host {

constinit thread_local Machine* machine = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10;  // with room for AddressSanitizer's frames; only what is used takes memory
// an H100's limits
constexpr unsigned kMaxBlockThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;
// longer than any wait for a thread that is going to come
constexpr uint64_t kMaxIdle = 1 << 22, kMaxIdleEach = 1 << 18;  // pauses, of all threads and for each

BURNISH_FAST_TLS constinit thread_local uint64_t random_state = 1;

// A stack for each thread, above a page that no access survives; more are added as launches need them.
thread_local std::vector<std::shared_ptr<char>> stacks;

char* stack_of(size_t thread) {
  while (stacks.size() <= thread) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stack = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    stacks.emplace_back(static_cast<char*>(stack), [](char* mapped) { munmap(mapped, kPage + kStackBytes); });
    mprotect(stack, kPage, PROT_NONE);
  }
  return stacks[thread].get() + kPage;
}

// Goes on with one of the ready threads, or with the scheduler where there is none.
void next(Context& from, bool last = false) {
  Threads& ready = machine->ready;
  while (ready.empty() && !machine->error && one_arrives()) {
  }
  if (ready.empty()) return switch_context(from, machine->scheduler, last);
  std::swap(ready[draw() % ready.size()], ready.back());
  Thread& to = *ready.back();
  ready.pop_back();
  if (&to.context == &from) return;
  machine->current = &to;
  machine->streak = 0;
  threadIdx = to.index;
  blockIdx = machine->blocks[to.block].index;
  switch_context(from, to.context, last);
}

void thread_entry() {
  entered_context();
  try {
    machine->launch->thread();
    if (!here().tile_stores.empty() || !here().products.empty()) {
      stop(machine->launch->where, "ends while stores of tiles or products are under way");
    }
    ++machine->blocks[here().block].ended;
    machine->idle = 0;
  } catch (...) {
    machine->error = std::current_exception();
    machine->ready.clear();
  }
  next(here().context, true);
  std::terminate();  // nothing resumes a thread that has ended
}

bool same_place(Where a, Where b) { return a.line() == b.line() && a.column() == b.column(); }

// The current thread comes to a barrier for `count` of these threads, and waits there or not. A barrier is one
// instruction: for all threads of a block, with count 0, or at least for each warp.
void come(Barrier& barrier, std::span<Thread> threads, size_t count, bool waits, const char* name, Where where) {
  const auto expected = static_cast<unsigned>(count == 0 ? threads.size() : count);
  if (barrier.came++ == 0) barrier.expected = expected;
  if (barrier.expected != expected) {
    stop(where, name, " of ", expected, " threads, where others came to one of ", barrier.expected);
  }
  const auto warp = static_cast<unsigned>(here().block * (kMaxTogether / kWarp) + here().in_block / kWarp);
  const auto line = barrier.lines.try_emplace(count == 0 ? here().block : warp, where).first->second;
  if (!same_place(line, where)) {
    stop(where, name, " is divergent: other threads of the ", count == 0 ? "block" : "warp", " came to ", text(line));
  }
  if (waits) {
    here().wait = {.name = name, .where = where, .barrier = &barrier};
  } else {
    share({&here()});
    barrier.known.join(*here().clock);
  }
  if (barrier.came == expected) {
    Threads waiting;
    for (Thread& thread : threads) {
      if (thread.wait.barrier == &barrier) waiting.push_back(&thread);
    }
    share(waiting, std::move(barrier.known));
    release(waiting);
    barrier = {};
    count_event("barriers");
  }
  if (waits) next(here().context);
}

// Where an item lies in a box of this size, by its number.
uint3 place_in(dim3 size, uint64_t number) {
  const auto rest = static_cast<unsigned>(number / size.x);
  return {static_cast<unsigned>(number % size.x), rest % size.y, rest / size.y};
}

// The blocks that run together, from the one with this number on.
void run_together(uint64_t number) {
  Machine& m = *machine;
  m.began = ++m.now;
  m.everyone = {};
  m.clusters.assign(m.blocks.size() / m.launch->cluster, {});
  m.idle = 0;
  m.ready.clear();
  m.phases.clear();
  m.arriving.clear();
  m.clocks.assign(1, {});
  for (unsigned b = 0; b < m.blocks.size(); ++b) {
    m.blocks[b] = {place_in(m.launch->grid, number + b), {}, 0};
    fill_shared(b);
  }
  for (unsigned i = 0; i < m.threads.size(); ++i) {
    const unsigned block = i / m.block_threads, in_block = i % m.block_threads;
    m.threads[i] = {.index = place_in(m.launch->block, in_block),
                    .block = block,
                    .in_block = in_block,
                    .number = static_cast<uint32_t>(number * m.block_threads + i + kLaunchBefore + 1),
                    .clock = &m.clocks[0]};
    begin_context(m.threads[i].context, stack_of(i), kStackBytes, thread_entry);
    m.ready.push_back(&m.threads[i]);
  }
  next(m.scheduler);
  if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
  if (std::ranges::any_of(m.threads, [](const Thread& thread) { return thread.wait.name != nullptr; })) stop_deadlock();
  for (unsigned b = 0; b < m.blocks.size(); ++b) check_shared(b);
  count_blocks();
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
  // by a pointer: the loader has few bytes for the thread_local variables of all libraries like this one
  static thread_local const auto own = std::make_unique<Machine>();
  Machine& m = *(machine = own.get());
  m.launch = &launch;
  const uint64_t threads = volume(launch.block), blocks = volume(launch.grid);
  const uint64_t together = launch.cooperative ? blocks : launch.cluster;
  if (threads == 0 || threads > kMaxBlockThreads || launch.block.z > 64 || blocks == 0 || launch.grid.y > 65535 ||
      launch.grid.z > 65535 || launch.grid.x > 0x7fffffffu || launch.shared_bytes > kMaxSharedBytes || together == 0 ||
      launch.cluster == 0 || launch.cluster > 16 || launch.grid.x % launch.cluster != 0 ||
      threads * together > kMaxTogether) {
    stop_launch(say("no GPU takes this launch: ", blocks, " blocks of ", threads, " threads, ", together,
                    " of them together, ", launch.shared_bytes, " bytes of shared memory"));
  }
  blockDim = launch.block;
  gridDim = launch.grid;
  m.block_threads = static_cast<unsigned>(threads);
  m.blocks.resize(together);
  m.threads.resize(threads * together);
  begin_memory();
  count_launch();
  std::vector<uint64_t> order(blocks / together);
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
  for (const uint64_t i : order) run_together(i * together);
}

void pause(Where where) {
  if (++machine->idle > std::max(kMaxIdle, kMaxIdleEach * machine->threads.size())) {
    stop(where, "waits in a loop for what no thread does");
  }
  machine->ready.push_back(&here());
  next(here().context);
}

void release(const Threads& threads) {
  for (Thread* thread : threads) thread->wait = {};
  machine->ready.insert(machine->ready.end(), threads.begin(), threads.end());
  machine->idle = 0;
}

void wait_for(const void* barrier, const char* name, Where where) {
  here().wait = {.name = name, .where = where, .barrier = barrier};
  next(here().context);
}

void barrier(unsigned id, unsigned count, bool waits, const char* name, Where where) {
  if (id >= kBarriers) stop(where, "there is no barrier ", id);
  if (count % kWarp != 0) stop(where, "a barrier takes whole warps, not ", count, " threads");
  const std::span block(&here() - here().in_block, machine->block_threads);
  come(machine->blocks[here().block].barriers[id], block, count, waits, name, where);
}

void grid_barrier(Where where) {
  if (!machine->launch->cooperative) stop(where, "grid_barrier in a launch that is not cooperative");
  come(machine->everyone, machine->threads, 0, true, "grid_barrier", where);
}

void cluster_barrier(Where where) {
  const unsigned cluster = here().block / machine->launch->cluster;
  const size_t threads = size_t{machine->block_threads} * machine->launch->cluster;
  const std::span mine = std::span(machine->threads).subspan(cluster * threads, threads);
  come(machine->clusters[cluster], mine, threads, true, "cluster_barrier", where);
}

void meet(const char* name, Mask mask, void* brought, bool aligned, const std::function<void(const Threads&)>& act) {
  const unsigned own = lane(), size = std::min(kWarp, machine->block_threads - (here().in_block - own));
  if ((mask.value >> own & 1) == 0) stop(mask.where, name, ": the mask leaves out the lane that calls");
  if (mask.value >> (size - 1) > 1) stop(mask.where, name, ": the mask names a lane the warp lacks");
  here().wait = {.name = name, .where = mask.where, .mask = mask.value, .brought = brought};
  Threads& threads = machine->meeting;
  threads.clear();
  for (Thread& thread : std::span(&here() - own, size)) {
    if ((mask.value >> thread.in_block % kWarp & 1) == 0) continue;
    const Wait& wait = thread.wait;
    const bool same = wait.mask == mask.value && wait.name == name;
    if (!same || (aligned && !same_place(wait.where, mask.where))) return next(here().context);
    threads.push_back(&thread);
  }
  act(threads);
  release(threads);
  next(here().context);
}

void share(const Threads& threads, Clock clock) {
  std::vector<uint32_t> numbers;
  const Clock* last = nullptr;
  for (const Thread* thread : threads) {
    if (thread->clock != last) clock.join(*thread->clock);
    last = thread->clock;
    numbers.push_back(thread->number);
  }
  clock.join(Clock(numbers, machine->now++));
  machine->clocks.push_back(std::move(clock));
  for (Thread* thread : threads) thread->clock = &machine->clocks.back();
}

}  // namespace burnish::host
