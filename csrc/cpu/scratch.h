// Memory that a thread keeps between calls, so that hot ops allocate nothing but their result.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "math/pack.h"

namespace burnish {

// Carves 64-byte aligned arrays out of one block. reserve() sizes the block before anything is taken.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(block_); }

  template <class T>
  static int64_t bytes(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

  void reserve(int64_t size) {
    taken_ = 0;
    if (size <= size_) return;
    std::free(block_);
    size_ = 0;
    block_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(size, 4096))));
    if (block_ == nullptr) throw std::bad_alloc();
    size_ = size;
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
    return array;
  }

 private:
  static constexpr int64_t kKept = int64_t{32} << 20;
  char* block_ = nullptr;
  int64_t size_ = 0;
  int64_t taken_ = 0;
};

}  // namespace burnish
