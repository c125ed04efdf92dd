#include "cuda/host/machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "cuda/host/state.h"

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};

namespace burnish::host {

constinit thread_local Machine* machine = nullptr;
constinit thread_local uint64_t random_state = 1;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kPage = 4096;
// an H100's limits, and how many threads at once this machine has stacks for
constexpr unsigned kMaxBlockThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr unsigned kMultiprocessors = 132;
constexpr uint64_t kMaxTogether = 24576;
// longer than any wait for a thread that is going to come
constexpr uint64_t kMaxIdle = 1 << 22, kMaxIdleEach = 1 << 18;  // pauses, of all threads and for each

thread_local uint32_t runs = 0;

// Stacks, one a thread, each below a page that no access survives; more are added as launches need them.
class Stacks {
 public:
  Stacks() = default;
  ~Stacks() {
    for (char* part : parts_) munmap(part, kPart * kEach);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  void* usable(unsigned thread) {
    while (parts_.size() * kPart <= thread) {
      void* part =
          mmap(nullptr, kPart * kEach, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (part == MAP_FAILED) throw std::bad_alloc();
      parts_.push_back(static_cast<char*>(part));
      for (size_t i = 0; i < kPart; ++i) mprotect(parts_.back() + i * kEach, kPage, PROT_NONE);
    }
    return parts_[thread / kPart] + thread % kPart * kEach + kPage;
  }

 private:
  static constexpr size_t kEach = kStackBytes + kPage;
  static constexpr size_t kPart = 256;
  std::vector<char*> parts_;
};

thread_local Stacks stacks;

void enter(unsigned thread) {
  machine->current = thread;
  machine->streak = 0;
  threadIdx = machine->threads[thread].index;
  blockIdx = machine->blocks[machine->threads[thread].block].index;
}

unsigned take_ready() {
  std::vector<unsigned>& ready = machine->ready;
  const size_t i = draw() % ready.size();
  const unsigned thread = ready[i];
  ready[i] = ready.back();
  ready.pop_back();
  return thread;
}

// Goes on with a ready thread, or with the scheduler where there is none.
void next(bool last = false) {
  Thread& from = here();
  if (machine->ready.empty()) {
    switch_context(from.context, machine->scheduler, last);
    return;
  }
  const unsigned to = take_ready();
  if (to == machine->current) return;
  enter(to);
  switch_context(from.context, machine->threads[to].context, last);
}

void make_ready(unsigned thread) {
  machine->threads[thread].state = State::kReady;
  machine->ready.push_back(thread);
}

void thread_entry() {
  entered_context();
  try {
    machine->launch->thread();
    here().state = State::kDone;
    here().copies.clear();  // they arrive, but nobody waits for them
    ++machine->done;
    machine->idle = 0;
  } catch (...) {
    machine->error = std::current_exception();
    machine->ready.clear();
  }
  next(true);
  std::terminate();  // nothing resumes a thread that has ended
}

// What each of these threads knows becomes known to those that waited. Where the whole block came, that is one number.
void share_order(const std::vector<unsigned>& came, const std::vector<unsigned>& waiting) {
  const unsigned size = machine->block_threads;
  Block& block = machine->blocks[machine->threads[came[0]].block];
  const unsigned first = came[0] / size * size;
  Order all;
  for (const unsigned i : came) join(all, machine->threads[i].order);
  if (waiting.size() == size) {
    block.met = machine->now++;
    join(block.order, all);
    return;
  }
  all.known.assign(size, 0);
  for (const unsigned i : came) {
    const std::vector<uint32_t>& mine = machine->threads[i].order.known;
    for (unsigned j = 0; j < mine.size(); ++j) all.known[j] = std::max(all.known[j], mine[j]);
    all.known[i - first] = machine->now;
  }
  ++machine->now;
  for (const unsigned i : waiting) {
    Order& mine = machine->threads[i].order;
    join(mine, all);
    mine.known = all.known;
  }
}

bool same_place(Where a, Where b) { return a.line() == b.line() && a.column() == b.column(); }

// The current thread comes to a barrier; whether all that it expects have come.
bool come(Meeting& meeting, unsigned expected, bool wait, unsigned barrier, const char* name, Where where) {
  Thread& thread = here();
  meeting.expected = meeting.came.empty() ? expected : meeting.expected;
  if (meeting.expected != expected) {
    stop(std::string(name) + " of " + std::to_string(expected) + " threads, where others came to one of " +
             std::to_string(meeting.expected),
         where);
  }
  meeting.came.push_back(machine->current);
  meeting.from.push_back(where);
  if (wait) {
    thread.state = State::kBarrier;
    thread.barrier = barrier;
    thread.name = name;
    thread.where = where;
    meeting.waiting.push_back(machine->current);
  }
  return meeting.came.size() == expected;
}

// Lets go on who waits. A barrier is one instruction: for the whole block, or at least for each warp.
void release(Meeting& meeting, bool uniform, const char* name) {
  std::vector<unsigned> first(machine->threads.size() / (uniform ? machine->block_threads : kWarp) + 1, ~0u);
  for (unsigned i = 0; i < meeting.came.size(); ++i) {
    const unsigned thread = meeting.came[i], block = thread / machine->block_threads;
    unsigned& other = first[uniform ? block : thread % machine->block_threads / kWarp];
    if (other == ~0u) other = i;
    if (same_place(meeting.from[i], meeting.from[other])) continue;
    stop(std::string(name) + " is divergent: other threads of the " + (uniform ? "block" : "warp") + " came to " +
             text(same_place(meeting.from[i], meeting.from.back()) ? meeting.from[other] : meeting.from[i]),
         meeting.from.back());
  }
  std::vector<unsigned> waiting;
  waiting.swap(meeting.waiting);
  meeting.came.clear();
  meeting.from.clear();
  machine->idle = 0;
  count_event("barriers");
  for (const unsigned i : waiting) make_ready(i);
}

// The blocks that run together, from the one with this number on.
void run_together(uint64_t number) {
  Machine& m = *machine;
  const dim3 grid = m.launch->grid, size = m.launch->block;
  for (unsigned b = 0; b < m.blocks.size(); ++b) {
    Block& block = m.blocks[b];
    const uint64_t i = number + b, row = grid.x, plane = row * grid.y;
    block.index = {static_cast<unsigned>(i % row), static_cast<unsigned>(i % plane / row),
                   static_cast<unsigned>(i / plane)};
    block.first = static_cast<uint32_t>(i * m.block_threads);
    block.run = ++runs;
    block.met = m.now;
    block.order = {};
    for (Meeting& meeting : block.barriers) meeting = {};
    fill_shared(b);
  }
  m.everyone = {};
  m.met = m.now++;
  m.done = 0;
  m.idle = 0;
  m.ready.clear();
  for (auto& warp : m.warps) warp.clear();
  for (unsigned i = 0; i < m.threads.size(); ++i) {
    Thread& thread = m.threads[i];
    const unsigned t = i % m.block_threads;
    thread.index = {t % size.x, t / size.x % size.y, t / (size.x * size.y)};
    thread.block = i / m.block_threads;
    thread.copies.clear();
    thread.group = 0;
    thread.order = {};
    begin_context(thread.context, stacks.usable(i), kStackBytes, thread_entry);
    make_ready(i);
  }
  enter(take_ready());
  switch_context(m.scheduler, here().context);
  if (m.error) std::rethrow_exception(m.error);
  if (m.done < m.threads.size()) throw std::runtime_error(deadlock());
  for (unsigned b = 0; b < m.blocks.size(); ++b) check_shared(b);
  count_blocks();
}

}  // namespace

void set_seed(uint64_t seed) { random_state = seed * 0x9e3779b97f4a7c15u + 1; }

void run(const Launch& launch) {
  Machine m{};
  struct Current {
    explicit Current(Machine* m) { machine = m; }
    ~Current() { machine = nullptr; }
  } const current(&m);
  m.launch = &launch;
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const uint64_t together = launch.together;
  if (threads == 0 || threads > kMaxBlockThreads || launch.block.z > 64 || blocks == 0 || launch.grid.y > 65535 ||
      launch.grid.z > 65535 || launch.grid.x > 0x7fffffffu || launch.shared_bytes > kMaxSharedBytes || together == 0 ||
      (together < blocks && (together > 16 || launch.grid.x % together != 0)) || threads * together > kMaxTogether) {
    throw std::runtime_error(title() + ": no GPU takes this launch: " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads, " + std::to_string(together) + " of them together, " +
                             std::to_string(launch.shared_bytes) + " bytes of shared memory");
  }
  blockDim = launch.block;
  gridDim = launch.grid;
  m.block_threads = static_cast<unsigned>(threads);
  m.blocks.resize(together);
  m.threads.resize(threads * together);
  m.warps.resize((threads + kWarp - 1) / kWarp * together);
  begin_memory(m);
  count_launch(launch);
  std::vector<uint64_t> order(blocks / together);
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
  for (const uint64_t i : order) run_together(i * together);
}

unsigned resident_blocks(dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t each = std::min<uint64_t>({32, 2048 / threads, (228 << 10) / (shared_bytes + 1024)});
  return static_cast<unsigned>(std::min<uint64_t>(each * kMultiprocessors, kMaxTogether / threads));
}

unsigned cluster_rank() { return machine->launch->cooperative ? 0 : here().block; }

unsigned lane() { return in_own_block() % kWarp; }

void pause(Where where) {
  if (++machine->idle > std::max(kMaxIdle, kMaxIdleEach * machine->threads.size())) {
    stop("waits in a loop for what no thread does", where);
  }
  machine->ready.push_back(machine->current);
  next();
}

void progress() { machine->idle = 0; }

void barrier(unsigned id, unsigned count, bool wait, const char* name, Where where) {
  if (id >= kBarriers) stop("there is no barrier " + std::to_string(id), where);
  if (count % kWarp != 0) stop("a barrier takes whole warps, not " + std::to_string(count) + " threads", where);
  Meeting& meeting = here_block().barriers[id];
  if (come(meeting, count == 0 ? machine->block_threads : count, wait, id, name, where)) {
    share_order(meeting.came, meeting.waiting);
    release(meeting, count == 0, name);
  }
  if (wait) next();
}

void barrier_together(const char* name, bool cooperative, Where where) {
  Machine& m = *machine;
  if (m.launch->cooperative != cooperative) {
    stop(std::string(name) + " in a launch that is " + (cooperative ? "not " : "") + "cooperative", where);
  }
  if (come(m.everyone, static_cast<unsigned>(m.threads.size()), true, 0, name, where)) {
    Order all;
    for (const Thread& thread : m.threads) join(all, thread.order);
    for (const Block& block : m.blocks) join(all, block.order);
    for (Block& block : m.blocks) join(block.order, all);
    m.met = m.now++;
    release(m.everyone, true, name);
  }
  next();
}

void join(Order& order, const Order& other) {
  order.waited |= other.waited;
  for (const auto& [block, times] : other.seen) {
    auto& mine = order.seen[block];
    if (mine == nullptr || mine == times) {
      mine = times;
      continue;
    }
    std::vector<uint32_t> later(times->size());
    std::transform(mine->begin(), mine->end(), times->begin(), later.begin(),
                   [](uint32_t a, uint32_t b) { return std::max(a, b); });
    mine = std::make_shared<const std::vector<uint32_t>>(std::move(later));
  }
}

bool arrive(const char* name, uint32_t mask, const void* in, void* out, Where where, bool aligned) {
  Thread& thread = here();
  const unsigned t = in_own_block(), lane = t % kWarp;
  if ((mask >> lane & 1) == 0) stop(std::string(name) + ": the mask leaves out the lane that calls", where);
  const unsigned lanes = std::min(kWarp, machine->block_threads - (t - lane));
  if (lanes < kWarp && mask >> lanes != 0) stop(std::string(name) + ": the mask names a lane the warp lacks", where);
  thread.state = State::kCollective;
  thread.name = name;
  thread.mask = mask;
  thread.where = where;
  thread.in = in;
  thread.out = out;
  auto& warp = machine->warps[thread.block * ((machine->block_threads + kWarp - 1) / kWarp) + t / kWarp];
  auto at = std::find_if(warp.begin(), warp.end(), [&](auto& g) {
    return g.mask == mask && g.name == name && (!aligned || same_place(g.first, where));
  });
  if (at == warp.end()) at = warp.insert(at, {name, mask, where, 0});
  if (++at->came == static_cast<unsigned>(__builtin_popcount(mask))) {
    warp.erase(at);
    return true;
  }
  next();
  return false;
}

void depart(uint32_t mask) {
  const unsigned first = machine->current - in_own_block() % kWarp;
  machine->idle = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) make_ready(first + i);
  }
  next();
}

const void* brought(unsigned lane) { return machine->threads[machine->current - in_own_block() % kWarp + lane].in; }

void* takes(unsigned lane) { return machine->threads[machine->current - in_own_block() % kWarp + lane].out; }

void sync_warp(uint32_t mask, Where where) {
  if (!arrive("__syncwarp", mask, nullptr, nullptr, where)) return;
  const unsigned first = machine->current - in_own_block() % kWarp;
  std::vector<unsigned> lanes;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) lanes.push_back(first + i);
  }
  share_order(lanes, lanes);
  depart(mask);
}

}  // namespace burnish::host
