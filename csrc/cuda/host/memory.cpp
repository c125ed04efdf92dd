// Memory as the kernels see it. For each word that a block shares, and each global one that a launch writes, the
// machine keeps who touched it last, when and on which line. Two accesses of which one writes, and which no barrier,
// copy wait or ticket orders, are a race, whatever order this seed happened to run them in.
#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>

#include "cuda/host/machine.h"
#include "cuda/host/state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace burnish::host {
constexpr size_t kWord = 4;
constexpr size_t kPage = 4096;
constexpr uint64_t kMaxStreak = 1 << 24;  // accesses of a thread that lets no other run: more than any useful loop has

struct Touch {
  uint32_t time, thread;
  Where where;
};

// Who wrote a word last; bytes are a bit each.
struct Word {
  Touch write;
  uint8_t written;  // bytes by that write
  bool atomic;
};

struct SharedWord : Word {
  bool pending;               // the write is a copy that its thread has not waited for
  uint8_t holds, read_bytes;  // that anything has written; that the last read took
  uint32_t run;               // the block all this is about
  Touch read;
};

struct Page {
  Word words[kPage / kWord];
};

struct Memory {
  std::vector<unsigned char> shared;  // of the blocks that run together, red zones between
  size_t stride = 0;                  // of a block in it
  std::vector<SharedWord> words;
  size_t block_words = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages[2];  // written by this launch and by the one before
  std::unordered_map<const void*, Order> tickets;                 // what those who drew one have published
};

namespace {

thread_local Memory own_memory;

Memory& memory() { return *machine->memory; }

uint32_t own_number() { return here_block().first + in_own_block(); }

bool writes(Access kind) { return kind >= Access::kStore; }

std::string verb(Access kind) { return writes(kind) ? "writes " : "reads "; }

bool is_atomic(Access kind) { return kind >= Access::kAtomic; }

bool told(const Seen& seen, const Touch& touch) {
  auto block = seen.upper_bound(touch.thread);
  if (block == seen.begin()) return false;
  const uint32_t in_block = touch.thread - (--block)->first;
  return in_block < block->second->size() && touch.time <= (*block->second)[in_block];
}

// Whether what `touch` did comes before what this thread does next, in every order the hardware may choose.
bool ordered(const Touch& touch) {
  const Block& block = here_block();
  const Order& mine = here().order;
  if (touch.thread == own_number()) return true;
  const bool together = touch.thread - machine->blocks[0].first < machine->threads.size();
  if (together && touch.time <= machine->met) return true;
  const uint32_t in_block = touch.thread - block.first;
  if (in_block < machine->block_threads) {
    if (touch.time <= block.met || (!mine.known.empty() && touch.time <= mine.known[in_block])) return true;
  }
  return told(mine.seen, touch) || told(block.order.seen, touch);
}

// Publishes what this thread knows, with its own accesses, and takes up what was published before.
void draw_order(const void* ticket) {
  Thread& thread = here();
  const Block& block = here_block();
  std::vector<uint32_t> times(machine->block_threads, block.met);
  for (unsigned i = 0; i < thread.order.known.size(); ++i) times[i] = std::max(times[i], thread.order.known[i]);
  times[in_own_block()] = machine->now++;
  Order own = thread.order;
  join(own, block.order);
  join(own, {false, {{block.first, std::make_shared<const std::vector<uint32_t>>(std::move(times))}}, {}});
  Order& published = memory().tickets[ticket];
  join(published, own);
  join(thread.order, published);
}

[[noreturn]] void race(const Touch& other, bool other_writes, Access kind, const std::string& place, Where where) {
  const uint32_t from_first = other.thread - here_block().first;
  const bool own_block = from_first < machine->block_threads;
  stop(verb(kind) + place + ", which " +
           (own_block ? "thread number " + std::to_string(from_first) : std::string("another block")) +
           (other_writes ? " writes at " : " reads at ") + text(other.where) + ", and nothing orders the two",
       where);
}

// fn(word's index, mask of its bytes) for each word that [offset, offset + bytes) touches.
template <class Fn>
void each_word(size_t offset, size_t bytes, const Fn& fn) {
  for (size_t at = offset / kWord; at * kWord < offset + bytes; ++at) {
    const size_t low = std::max(at * kWord, offset) - at * kWord;
    const size_t high = std::min((at + 1) * kWord, offset + bytes) - at * kWord;
    fn(at, static_cast<uint8_t>((1u << high) - (1u << low)));
  }
}

// Where an address lies among the blocks' shared memories.
struct Slot {
  unsigned block;
  size_t offset;  // from the red zone before it
};

Slot slot_of(const void* address) {
  const Memory& m = memory();
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - m.shared.data());
  const unsigned own = here().block;
  if (offset - own * m.stride < m.stride) return {own, offset - own * m.stride};
  return {static_cast<unsigned>(offset / m.stride), offset % m.stride};
}

void access_shared(Access kind, const void* address, size_t bytes, Where where) {
  const auto [block, in_slot] = slot_of(address);
  const size_t size = machine->launch->shared_bytes;
  if (in_slot < kRedZone || in_slot + bytes > kRedZone + size) {
    stop(verb(kind) + std::to_string(bytes) + " bytes at byte " +
             std::to_string(static_cast<int64_t>(in_slot) - static_cast<int64_t>(kRedZone)) + " of " +
             std::to_string(size) + " bytes of shared memory",
         where);
  }
  const size_t first = in_slot - kRedZone;
  const Touch touch{machine->now, own_number(), where};
  const uint32_t run = machine->blocks[block].run;
  SharedWord* words = memory().words.data() + block * memory().block_words;
  const auto place = [&](size_t i) {
    return "byte " + std::to_string(std::max(i * kWord, first)) + " of shared memory";
  };
  each_word(first, bytes, [&](size_t i, uint8_t mask) {
    SharedWord& word = words[i];
    if (word.run != run) {
      word = {};
      word.run = run;
    }
    if ((!writes(kind) || is_atomic(kind)) && (word.holds & mask) != mask) {
      stop("reads " + place(i) + ", which nothing has written", where);
    }
    if (word.written & mask) {
      if (word.pending) {
        stop(verb(kind) + place(i) + ", where a copy started at " + text(word.write.where) + " may still arrive",
             where);
      }
      if (!(is_atomic(kind) && word.atomic) && !ordered(word.write)) race(word.write, true, kind, place(i), where);
    }
    if (!writes(kind)) {
      word.read = touch;
      word.read_bytes = mask;
      return;
    }
    if ((word.read_bytes & mask) && !ordered(word.read)) race(word.read, false, kind, place(i), where);
    word.write = touch;
    word.written = mask;
    word.atomic = is_atomic(kind);
    word.pending = kind == Access::kCopy;
    word.holds |= mask;
  });
}

Page* find_page(uintptr_t page, bool of_this_launch) {
  auto& pages = memory().pages[of_this_launch ? 0 : 1];
  if (pages.empty()) return nullptr;
  const auto found = pages.find(page);
  return found == pages.end() ? nullptr : found->second.get();
}

void access_global(Access kind, uintptr_t address, size_t bytes, Where where) {
  const uintptr_t number = address / kPage;  // an aligned access stays on its page
  Page* page = find_page(number, true);
  const Page* before = machine->launch->dependent ? find_page(number, false) : nullptr;
  if (page == nullptr && writes(kind)) {
    auto& fresh = memory().pages[0][number];
    fresh = std::make_unique<Page>();
    page = fresh.get();
  }
  const bool waited = here().order.waited || here_block().order.waited;
  each_word(address % kPage, bytes, [&](size_t i, uint8_t mask) {
    if (before != nullptr && (before->words[i].written & mask) && (!waited || kind == Access::kStreamingLoad)) {
      stop(verb(kind) + "global memory, which the launch before writes at " + text(before->words[i].write.where) +
               (waited ? ", past the caches that see it" : ", without dependency_wait"),
           where);
    }
    if (page == nullptr) return;
    Word& word = page->words[i];
    if (word.written & mask) {
      if (kind == Access::kStreamingLoad) {
        stop("reads as unchanging what this launch writes at " + text(word.write.where), where);
      }
      if (!(is_atomic(kind) && word.atomic) && !ordered(word.write)) {
        race(word.write, true, kind, "global memory", where);
      }
    }
    if (writes(kind)) word = {{machine->now, own_number(), where}, mask, is_atomic(kind)};
  });
}

void check_aligned(const void* address, size_t bytes, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    stop("an access of " + std::to_string(bytes) + " bytes is not aligned", where);
  }
}

void land(Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
  copy.landed = true;
}

unsigned char* red_zone(unsigned block, bool behind) {
  return shared_of(block) + (behind ? machine->launch->shared_bytes : -kRedZone);
}

}  // namespace

void begin_memory(Machine& machine) {
  Memory& m = own_memory;
  const Launch& launch = *machine.launch;
  const uint64_t together = machine.blocks.size();
  machine.memory = &m;
  m.block_words = (launch.shared_bytes + kWord - 1) / kWord;
  m.stride = (launch.shared_bytes + 15) / 16 * 16 + 2 * kRedZone;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(m.shared.data(), m.shared.size());
#endif
  m.shared.resize(m.stride * together);
  if (m.words.size() < m.block_words * together) m.words.resize(m.block_words * together);
  m.pages[1].clear();
  if (launch.dependent) m.pages[1].swap(m.pages[0]);
  m.pages[0].clear();
  m.tickets.clear();
}

unsigned char* shared_of(unsigned block) { return memory().shared.data() + block * memory().stride + kRedZone; }

void fill_shared(unsigned block) {
  unsigned char* const slot = shared_of(block) - kRedZone;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(slot, memory().stride);
#endif
  for (size_t i = 0; i < memory().stride; i += sizeof(uint64_t)) {
    const uint64_t random = draw();
    std::memcpy(slot + i, &random, sizeof random);
  }
  for (const bool behind : {false, true}) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(red_zone(block, behind), kRedZone);
#else
    std::memset(red_zone(block, behind), 0xa5, kRedZone);
#endif
  }
}

void check_shared(unsigned block) {
#if defined(__SANITIZE_ADDRESS__)
  (void)block;
#else
  for (const bool behind : {false, true}) {
    const unsigned char* zone = red_zone(block, behind);
    if (std::all_of(zone, zone + kRedZone, [](unsigned char byte) { return byte == 0xa5; })) continue;
    throw std::runtime_error(title() + ": wrote past the end of its " + std::to_string(machine->launch->shared_bytes) +
                             " bytes of shared memory");
  }
#endif
}

void* shared_memory() { return shared_of(here().block); }

void* in_block(const void* shared, unsigned rank, Where where) {
  const size_t blocks = machine->launch->cooperative ? 1 : machine->blocks.size();
  if (rank >= blocks) stop("the cluster has no block " + std::to_string(rank), where);
  if (!in_shared(shared)) stop("an access to another block's shared memory names an address outside of its own", where);
  return shared_of(rank) + (static_cast<const unsigned char*>(shared) - shared_of(here().block));
}

bool in_shared(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  return byte >= memory().shared.data() && byte < memory().shared.data() + memory().shared.size();
}

void access(Access kind, const void* address, size_t bytes, Where where) {
  if (++machine->streak > kMaxStreak) stop("waits in a loop for what no thread does", where);
  check_aligned(address, bytes, where);
  const bool shared = in_shared(address);
  const bool global_only = kind == Access::kStreamingLoad || kind == Access::kCoherentLoad || kind == Access::kTicket;
  if (shared ? global_only : kind == Access::kMatrixLoad) {
    stop(std::string("an access to ") + (shared ? "global" : "shared") + " memory only names an address " +
             (shared ? "in shared memory" : "outside of it"),
         where);
  }
  if (shared) {
    access_shared(kind, address, bytes, where);
  } else {
    access_global(kind, reinterpret_cast<uintptr_t>(address), bytes, where);
  }
  if (kind == Access::kTicket) draw_order(address);
  count_access(kind, shared, address, bytes, where);
}

void copy_async(void* to, const void* from, unsigned bytes, bool valid, Where where) {
  check_aligned(to, bytes, where);
  check_aligned(from, bytes, where);
  // a copy of zeros reads nothing: its address may lie anywhere
  if (!in_shared(to) || (valid && in_shared(from))) {
    stop("an asynchronous copy goes from global to shared memory only", where);
  }
  if (valid) {
    access_global(Access::kLoad, reinterpret_cast<uintptr_t>(from), bytes, where);
    count_access(Access::kLoad, false, from, bytes, where);
  }
  access_shared(Access::kCopy, to, bytes, where);
  count_access(Access::kCopy, true, to, bytes, where);
  Copy copy{to, from, bytes, valid, false, here().group};
  if (draw() & 1) land(copy);
  here().copies.push_back(copy);
}

void copy_commit() { ++here().group; }

void copy_wait(unsigned pending, Where where) {
  Thread& thread = here();
  const auto due = [&](const Copy& copy) { return copy.group + pending < thread.group; };
  for (Copy& copy : thread.copies) {
    if (!due(copy)) continue;
    if (!copy.landed) land(copy);
    const auto [block, in_slot] = slot_of(copy.to);
    SharedWord* words = memory().words.data() + block * memory().block_words;
    each_word(in_slot - kRedZone, copy.bytes, [&](size_t i, uint8_t) {
      SharedWord& word = words[i];
      word.pending = false;
      word.write.time = machine->now;
    });
  }
  std::erase_if(thread.copies, due);
  pause(where);
}

void dependency_wait() { here().order.waited = true; }

}  // namespace burnish::host
