// Memory as the kernels see it. For each word that a block shares, and each global one that a launch writes, the
// machine keeps who touched it last, when and on which line. Two accesses of which one writes, and which no barrier,
// copy wait or ticket orders, are a race, whatever order this seed happened to run them in.
#include <sanitizer/asan_interface.h>

#include <cstring>

#include "cuda/host/machine.h"

namespace burnish::host {
namespace {

constexpr size_t kRedZone = 1024;  // bytes before and after a block's shared memory
constexpr unsigned char kRed = 0xa5;
constexpr uint64_t kMaxStreak = 1 << 24;  // accesses of a thread that lets no other run: more than any useful loop has

Memory& memory() { return machine->memory; }

unsigned char* shared_of(unsigned block) { return memory().shared.data() + block * memory().stride + kRedZone; }

std::array<unsigned char*, 2> red_zones(unsigned block) {
  return {shared_of(block) - kRedZone, shared_of(block) + machine->launch->shared_bytes};
}

size_t offset_of(const void* shared) {
  return static_cast<size_t>(static_cast<const unsigned char*>(shared) - memory().shared.data());
}

const char* verb(Access kind) { return writes(kind) ? "writes " : "reads "; }

constexpr size_t kGlobal = ~size_t{0};  // for a byte of shared memory

std::string place(size_t byte) { return byte == kGlobal ? "global memory" : say("byte ", byte, " of shared memory"); }

// fn(index from that of `address` on, mask of its bytes) for each word that these bytes are part of.
void each_word(const void* address, size_t bytes, const auto& fn) {
  const size_t first = reinterpret_cast<uintptr_t>(address) % kWord, end = first + bytes;
  for (size_t i = 0; i * kWord < end; ++i) {
    const size_t low = i == 0 ? first : 0, high = std::min(end - i * kWord, kWord);
    fn(i, static_cast<uint8_t>((1u << high) - (1u << low)));
  }
}

// The last stores to global words from that of `address` on; null where there was none, unless one is to be noted.
Touch* global_stores(const void* address, bool note) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto& pages = memory().pages;
  const auto page = note ? pages.try_emplace(at / kPage).first : pages.find(at / kPage);
  return page == pages.end() ? nullptr : &page->second[at % kPage / kWord];  // an aligned access stays on its page
}

// Stops at an access that the other one may come before or after, as the hardware chooses.
void check_order(Access kind, const Touch& other, const char* does, size_t byte, Where where) {
  const bool before = other.time < memory().launched;
  const uint32_t thread = before ? kLaunchBefore : other.thread, in_block = thread - (here().number - here().in_block);
  if (thread == here().number || other.time <= (*here().clock)[thread]) return;
  std::string who = in_block < machine->block_threads ? say("thread number ", in_block) : "another block";
  if (before) who = "the launch before";
  stop(where, verb(kind), place(byte), ", which ", who, does, text(other.where),
       before ? ", without dependency_wait" : ", and nothing orders the two");
}

// Checks an access to bytes of a word against the last store to it and, in shared memory, the last load. Notes it.
void touch(Access kind, uint8_t bytes, Touch& store, Touch* load, size_t byte, Where where) {
  if (load != nullptr && store.time < machine->began) store = *load = {};
  const bool before = store.time < memory().launched, atomic = kind >= Access::kAtomic;
  if (load != nullptr && (atomic || !writes(kind)) && (store.held & bytes) != bytes) {
    stop(where, "reads ", place(byte), ", which nothing has written");
  }
  if (store.bytes & bytes) {
    if (store.pending) {
      stop(where, verb(kind), place(byte), ", where a copy started at ", text(store.where), " may still arrive");
    }
    if (before || !atomic || !store.atomic) check_order(kind, store, " writes at ", byte, where);
    if (kind == Access::kStreamingLoad) {
      stop(where, "reads as unchanging what ", before ? "the launch before" : "this launch", " writes at ",
           text(store.where));
    }
  }
  const auto held = static_cast<uint8_t>(store.held | bytes);
  const bool tile = kind == Access::kTileCopy, pending = kind == Access::kCopy || (tile && load != nullptr);
  const Touch now{machine->now, where, here().number, bytes, held, atomic, pending, tile};
  if (writes(kind) && load != nullptr && (load->bytes & bytes)) check_order(kind, *load, " reads at ", byte, where);
  Touch* const last = writes(kind) ? &store : load;
  if (last != nullptr) *last = now;
}

// The start of the shared memory that an access is to, all of whose bytes must lie in it.
size_t check_bounds(Access kind, size_t offset, size_t bytes, Where where) {
  const size_t size = machine->launch->shared_bytes, stride = memory().stride, own = here().block * stride;
  const size_t start = (offset - own < stride ? own : offset / stride * stride) + kRedZone;
  if (offset < start || offset + bytes > start + size) {
    stop(where, verb(kind), bytes, " bytes at byte ", static_cast<int64_t>(offset - start), " of ", size,
         " bytes of shared memory");
  }
  return start;
}

void check_aligned(const void* address, size_t bytes, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    stop(where, "an access of ", bytes, " bytes is not aligned");
  }
}

void land(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

}  // namespace

void begin_memory() {
  Memory& m = memory();
  ASAN_UNPOISON_MEMORY_REGION(m.shared.data(), m.shared.size());
  m.stride = (machine->launch->shared_bytes + 15) / 16 * 16 + 2 * kRedZone;
  m.shared.resize(m.stride * machine->blocks.size());
  m.stores.resize(m.shared.size() / kWord);
  m.loads.resize(m.shared.size() / kWord);
  m.tickets.clear();
  m.launched = ++machine->now;
  if (!machine->launch->dependent) m.pages.clear();
}

void fill_shared(unsigned block) {
  unsigned char *const slot = shared_of(block) - kRedZone, *const end = slot + memory().stride;
  ASAN_UNPOISON_MEMORY_REGION(slot, memory().stride);
  std::generate(reinterpret_cast<uint64_t*>(slot), reinterpret_cast<uint64_t*>(end), draw);
  for (unsigned char* zone : red_zones(block)) {
    std::memset(zone, kRed, kRedZone);
    ASAN_POISON_MEMORY_REGION(zone, kRedZone);
  }
}

void check_shared(unsigned block) {
  for (unsigned char* zone : red_zones(block)) {
    ASAN_UNPOISON_MEMORY_REGION(zone, kRedZone);
    if (std::all_of(zone, zone + kRedZone, [](unsigned char byte) { return byte == kRed; })) continue;
    stop_launch(say("wrote past the end of its ", machine->launch->shared_bytes, " bytes of shared memory"));
  }
}

void* shared_memory() { return shared_of(here().block); }

void* in_block(const void* shared, unsigned rank, Where where) {
  const unsigned cluster = machine->launch->cluster;
  if (rank >= cluster) stop(where, "the cluster has no block ", rank);
  if (!in_shared(shared)) stop(where, "an access to another block's shared memory names an address outside of its own");
  const unsigned there = here().block / cluster * cluster + rank;
  if (has_ended(there)) stop(where, "an access to the shared memory of a block that has ended");
  return shared_of(there) + (static_cast<const unsigned char*>(shared) - shared_of(here().block));
}

bool has_ended(unsigned block) { return machine->blocks[block].ended == machine->block_threads; }

bool in_shared(const void* address) { return offset_of(address) < memory().shared.size(); }

void access(Access kind, const void* address, size_t bytes, Where where) {
  if (++machine->streak > kMaxStreak) stop(where, "waits in a loop for what no thread does");
  check_aligned(address, bytes, where);
  const size_t offset = offset_of(address);
  const bool shared = offset < memory().shared.size();
  const bool global_only = kind == Access::kStreamingLoad || kind == Access::kCoherentLoad || kind == Access::kTicket;
  if (shared ? global_only : kind == Access::kMatrixLoad) {
    stop(where, "an access to ", shared ? "global" : "shared", " memory only names an address ",
         shared ? "in shared memory" : "outside of it");
  }
  const size_t start = shared ? check_bounds(kind, offset, bytes, where) : 0;
  Touch* const stores = shared ? &memory().stores[offset / kWord] : global_stores(address, writes(kind));
  Touch* const loads = shared ? &memory().loads[offset / kWord] : nullptr;
  const auto check = [&](size_t i, uint8_t mask) {
    const size_t first = i == 0 ? offset : (offset / kWord + i) * kWord;
    touch(kind, mask, stores[i], shared ? loads + i : nullptr, shared ? first - start : kGlobal, where);
  };
  if (stores != nullptr) each_word(address, bytes, check);
  count_access(kind, shared, address, bytes, where);
  if (kind != Access::kTicket) return;
  // this thread takes up what was published before; that and what it knows and did is published
  Clock& published = memory().tickets[address];
  share({&here()}, published);
  published = *here().clock;
}

void copy_async(void* to, const void* from, unsigned bytes, bool valid, Where where) {
  // a copy of zeros reads nothing: its address may lie anywhere
  static constexpr unsigned char kZeros[16] = {};
  check_aligned(from, bytes, where);
  if (!in_shared(to) || (valid && in_shared(from))) {
    stop(where, "an asynchronous copy goes from global to shared memory only");
  }
  if (valid) access(Access::kLoad, from, bytes, where);
  access(Access::kCopy, to, bytes, where);
  here().copies.push_back({to, valid ? from : kZeros, bytes, here().group});
  if (draw() & 1) land(here().copies.back());
}

void copy_wait(unsigned pending, Where where) {
  const auto due = [&](const Copy& copy) {
    if (copy.group + pending >= here().group) return false;
    land(copy);
    arrived(copy.to, copy.bytes);
    return true;
  };
  std::erase_if(here().copies, due);
  pause(where);
}

void arrived(const void* to, size_t bytes) {
  each_word(to, bytes, [to](size_t i, uint8_t) {
    Touch& store = memory().stores[offset_of(to) / kWord + i];
    store.pending = false;
    store.time = machine->now;
  });
}

size_t shared_offset(const void* address, Where where) {
  if (!in_shared(address)) stop(where, "a tile is in global memory, expected in shared memory");
  return offset_of(address) - offset_of(shared_memory());
}

void access_beside(const void* address, size_t bytes, Where where) {
  access(Access::kTileLoad, address, bytes, where);
  const size_t offset = offset_of(address);
  const bool shared = offset < memory().shared.size();
  const Touch* const stores = shared ? &memory().stores[offset / kWord] : global_stores(address, false);
  if (stores == nullptr) return;
  each_word(address, bytes, [&](size_t i, uint8_t) {
    const Touch& store = stores[i];
    const uint32_t thread = store.thread - machine->threads[0].number;
    if (store.beside || store.time < machine->began || thread >= machine->threads.size()) return;
    const Thread& by = machine->threads[thread];
    const bool remote = shared && offset / memory().stride != by.block;
    if ((remote ? by.shown_remote : shared ? by.shown : by.shown_global) <= store.time) {
      const char* const what = remote ? "remote_" : shared ? "" : "global_";
      stop(where, "reads beside the threads what thread number ", by.in_block, " wrote at ", text(store.where),
           ", without copies_see_", what, "stores");
    }
  });
}

void dependency_wait() { share({&here()}, Clock({kLaunchBefore}, machine->now)); }

}  // namespace burnish::host
