// One launch over a list of tensors: what the kernel must know of each of them, and which part of which one a block
// takes, as a table in device memory.
//
// Each call writes its table anew and compares it with those uploaded before: where no tensor has moved, the table is
// on the device already, and only else it is copied there, from pinned memory, without waiting. A table belongs to the
// stream that it was uploaded on. One that a CUDA graph reads is kept for good, with the pinned memory that a replay
// copies it from; one that was uploaded while capturing is there only after a replay, so no other call is given it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace burnish {

// Elements of a tensor that a block takes: a few microseconds of a multiprocessor, against which the block's start is
// little, and 57M elements are still 26 blocks for each of an H100's.
constexpr int64_t kChunk = 16384;

struct alignas(8) Chunk {
  uint32_t tensor, number;  // which tensor; elements [number kChunk, (number + 1) kChunk) of it
};

// Also an empty tensor has a block, for what is to be done once for each.
BURNISH_HD inline int64_t chunks_of(int64_t count) { return count == 0 ? 1 : (count - 1) / kChunk + 1; }

// In device memory. Entry is a plain struct, aligned to 16 bytes.
template <class Entry>
struct TensorTable {
  const Entry* entries;
  const Chunk* chunks;
  uint32_t* tickets;  // one for each entry; zero between launches

  __device__ Entry entry(uint32_t tensor) const {
    static_assert(sizeof(Entry) % sizeof(Bytes16) == 0);
    Entry found;
#pragma unroll
    for (size_t i = 0; i < sizeof(Entry) / sizeof(Bytes16); ++i) {
      const Bytes16 bytes = load(reinterpret_cast<const Bytes16*>(entries + tensor) + i);
      memcpy(reinterpret_cast<char*>(&found) + i * sizeof(Bytes16), &bytes, sizeof bytes);
    }
    return found;
  }
};

namespace detail {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct UploadedTable {
  int32_t device;
  cudaStream_t stream;
  Tensor image, table;  // what was copied, in pinned memory, and where to
};

class TableCache {
 public:
  // A device's copy of `image`, for launches on its current stream.
  char* find(const std::vector<char>& image, const Tensor& like) {
    const std::lock_guard lock(mutex_);
    const int32_t device = like.get_device_index();
    const cudaStream_t stream = current_stream(device);
    const bool capturing = is_capturing(stream);
    const auto found = std::find_if(recent_.begin(), recent_.end(), [&](const UploadedTable& one) {
      return one.device == device && one.stream == stream && one.image.numel() == static_cast<int64_t>(image.size()) &&
             memcmp(one.image.const_data_ptr(), image.data(), image.size()) == 0;
    });
    if (found != recent_.end()) {
      std::rotate(recent_.begin(), found, found + 1);
      if (capturing) captured_.push_back(recent_.front());
      return static_cast<char*>(recent_.front().table.mutable_data_ptr());
    }
    std::vector<UploadedTable>& kept = capturing ? captured_ : recent_;
    kept.insert(kept.begin(), upload(image, like, device, stream));
    if (recent_.size() > kMost) recent_.pop_back();
    return static_cast<char*>(kept.front().table.mutable_data_ptr());
  }

 private:
  // A few optimizers' groups, whose gradients come back to the same few places.
  static constexpr size_t kMost = 64;

  static UploadedTable upload(const std::vector<char>& image, const Tensor& like, int32_t device, cudaStream_t stream) {
    const int64_t size = static_cast<int64_t>(image.size());
    const Tensor pinned =
        torch::stable::empty({size}, ScalarType::Byte, std::nullopt,
                             torch::stable::Device(torch::headeronly::DeviceType::CPU), like.is_cuda());
    memcpy(pinned.mutable_data_ptr(), image.data(), image.size());
    Tensor table = torch::stable::new_empty(like, {size}, ScalarType::Byte);
    torch::stable::copy_(table, pinned, true);
    return {device, stream, pinned, table};
  }

  std::mutex mutex_;
  std::vector<UploadedTable> recent_, captured_;
};

// Never destroyed: at exit there may be no device any more.
inline TableCache& table_cache() {
  static TableCache& cache = *new TableCache;
  return cache;
}

}  // namespace detail

// A table being written: entry i is `entries()[i]`, all zeros at first; upload() gives it to the device. `counts` are
// the tensors' elements.
template <class Entry>
class TableWriter {
 public:
  explicit TableWriter(const std::vector<int64_t>& counts) : entries_(counts.size()) {
    for (const int64_t count : counts) chunks_ += static_cast<size_t>(chunks_of(count));
    image_.resize(chunks_at() + chunks_ * sizeof(Chunk) + entries_ * sizeof(uint32_t));
    char* to = image_.data() + chunks_at();
    for (size_t i = 0; i < entries_; ++i) {
      const auto own = static_cast<uint32_t>(chunks_of(counts[i]));
      for (uint32_t number = 0; number < own; ++number, to += sizeof(Chunk)) {
        const Chunk chunk{static_cast<uint32_t>(i), number};
        memcpy(to, &chunk, sizeof chunk);
      }
    }
  }

  // Every byte of an entry is compared: it must have no padding.
  void set(size_t i, const Entry& entry) {
    static_assert(std::has_unique_object_representations_v<Entry>);
    memcpy(image_.data() + i * sizeof(Entry), &entry, sizeof entry);
  }

  int64_t blocks() const { return static_cast<int64_t>(chunks_); }

  TensorTable<Entry> upload(const torch::stable::Tensor& like) const {
    char* table = detail::table_cache().find(image_, like);
    return {reinterpret_cast<const Entry*>(table), reinterpret_cast<const Chunk*>(table + chunks_at()),
            reinterpret_cast<uint32_t*>(table + chunks_at() + chunks_ * sizeof(Chunk))};
  }

 private:
  size_t chunks_at() const { return entries_ * sizeof(Entry); }

  size_t entries_, chunks_ = 0;
  std::vector<char> image_;
};

}  // namespace burnish
