// Memory that a thread keeps between calls, so that hot ops allocate nothing but their result.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "math/pack.h"

namespace burnish {

constexpr int64_t kLargePage = int64_t{2} << 20;

// Asks for 2 MiB pages under memory that was not yet written, because a stream over 4 KiB pages waits for a page walk
// every 64 cache lines. Advice only: where the system declines, nothing changes.
inline void advise_large_pages(void* data, int64_t bytes) {
  constexpr auto kLarge = static_cast<uintptr_t>(kLargePage);
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kLarge * kLarge;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
}

// Carves 64-byte aligned arrays out of one block. reserve() sizes the block before anything is taken. AddressSanitizer
// would see one piece of memory, as large as any call before needed: under it each call has its own, the arrays lie
// apart, only what was taken may be touched, and floats read as NaN until they are written.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  template <class T>
  static int64_t bytes(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)), 64) + (kWatched ? 64 : 0);
  }

  void reserve(int64_t size) { reserve(size, 64); }

  // The same in large pages, for what is read in no order: in small ones each read would wait for a page walk.
  void reserve_large(int64_t size) {
    reserve(round_up(size, kLargePage), kLargePage);
    advise_large_pages(block_, size_);
  }

  // Gives a block back that is too large to sit idle in every thread.
  void trim() {
    if (size_ <= kKept) return;
    std::free(block_);
    block_ = nullptr;
    size_ = 0;
  }

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(block_ + taken_);
    taken_ += bytes<T>(count);
#if defined(__SANITIZE_ADDRESS__)
    // what was not reserved stays closed
    if (taken_ <= size_) __asan_unpoison_memory_region(array, static_cast<size_t>(count) * sizeof(T));
    std::memset(static_cast<void*>(array), 0xFF, static_cast<size_t>(count) * sizeof(T));
#endif
    return array;
  }

 private:
  void reserve(int64_t size, int64_t alignment) {
    taken_ = 0;
    if (!kWatched && size <= size_) return;
    std::free(block_);
    size_ = 0;
    const int64_t unit = alignment < 4096 ? 4096 : alignment;
    const auto whole = static_cast<size_t>(round_up(size, unit));
    block_ = static_cast<char*>(std::aligned_alloc(static_cast<size_t>(alignment), whole));
    if (block_ == nullptr) throw std::bad_alloc();
    size_ = size;
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(block_, whole);
#endif
  }

#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kWatched = true;
#else
  static constexpr bool kWatched = false;
#endif
  static constexpr int64_t kKept = int64_t{32} << 20;
  char* block_ = nullptr;
  int64_t size_ = 0;
  int64_t taken_ = 0;
};

}  // namespace burnish
