// What a lane has of a block of 256 elements of an optimizer's tensors: Share loads and stores it, take and put make
// floats of any format and back.
//
// A warp takes 256 elements, 8 a lane. Where some array is fp32 these are two runs of 4, 128 apart, so that an access
// of fp32 has 16 bytes; else they are one run of 8, and those of 16-bit arrays have. Either way the lanes' accesses lie
// side by side. All lanes together then ask for at least 64 bytes of each of 512 threads of a multiprocessor, 32 KB,
// where 15 KB would cover the latency of an H100's memory. A run that passes a tensor's end, or a tensor that is not
// aligned, is read and written by single elements.
#pragma once

#include "cuda/format.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "optimizer.h"

namespace burnish {

constexpr int kShare = static_cast<int>(kStateBlock / 32);  // elements of a lane
constexpr int64_t kWidest = 16;                             // bytes of an access

template <int kRun>
struct Share {
  static constexpr int kRuns = kShare / kRun;
  static constexpr int64_t kPitch = kStateBlock / kRuns;  // elements from a run to the next

  int64_t first, count;
  bool aligned;

  __device__ int64_t start(int run) const { return first + run * kPitch; }
  __device__ bool has(int i) const { return start(i / kRun) + i % kRun < count; }
  __device__ bool whole(int run) const { return aligned && start(run) + kRun <= count; }

  // A run of T in as few accesses as there can be.
  template <class T>
  struct Access {
    static constexpr int64_t kSize = sizeof(T), kBytes = kSize * kRun < kWidest ? kSize * kRun : kWidest;
    static constexpr int kElements = kBytes / kSize;
    struct alignas(kBytes) Unit {
      uint32_t word[kBytes / 4];
    };
  };

  // Zeros stand for what there is not.
  template <class T>
  __device__ void load(const T* data, T (&values)[kShare]) const {
    using Unit = typename Access<T>::Unit;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (whole(run)) {
#pragma unroll
        for (int i = run * kRun; i < (run + 1) * kRun; i += Access<T>::kElements) {
          const Unit unit = load_global(reinterpret_cast<const Unit*>(data + start(run) + (i - run * kRun)));
          memcpy(values + i, &unit, sizeof unit);
        }
      } else {
#pragma unroll
        for (int i = run * kRun; i < (run + 1) * kRun; ++i) {
          values[i] = has(i) ? burnish::load(data + start(run) + i % kRun) : T{};
        }
      }
    }
  }

  template <class T>
  __device__ void store(T* data, const T (&values)[kShare]) const {
    using Unit = typename Access<T>::Unit;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (whole(run)) {
#pragma unroll
        for (int i = run * kRun; i < (run + 1) * kRun; i += Access<T>::kElements) {
          Unit unit;
          memcpy(&unit, values + i, sizeof unit);
          store_global(reinterpret_cast<Unit*>(data + start(run) + (i - run * kRun)), unit);
        }
      } else {
#pragma unroll
        for (int i = run * kRun; i < (run + 1) * kRun; ++i) {
          if (has(i)) burnish::store(data + start(run) + i % kRun, values[i]);
        }
      }
    }
  }
};

// f(T()) for the type of a format; shares of 8 neighbours are for tensors without fp32.
template <int kRun, class F>
__device__ void with_format(Format format, const F& f) {
  if constexpr (kRun * static_cast<int64_t>(sizeof(float)) <= kWidest) {
    if (format == Format::kFloat) return f(float());
  }
  format == Format::kBf16 ? f(bf16()) : f(fp16());
}

template <int kRun>
__device__ void take(const Share<kRun>& share, const void* data, Format format, float (&values)[kShare]) {
  with_format<kRun>(format, [&]<class T>(T) {
    T stored[kShare];
    share.load(static_cast<const T*>(data), stored);
#pragma unroll
    for (int i = 0; i < kShare; ++i) values[i] = to_float(stored[i]);
  });
}

template <int kRun>
__device__ void put(const Share<kRun>& share, const float (&values)[kShare], void* data, Format format) {
  with_format<kRun>(format, [&]<class T>(T) {
    T stored[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) stored[i] = from_float<T>(values[i]);
    share.store(static_cast<T*>(data), stored);
  });
}

}  // namespace burnish
