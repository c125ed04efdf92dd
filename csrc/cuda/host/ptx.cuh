// The CPU's side of ptx.cuh: every wrapper by the same name, computed from what the ISA says of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/host/machine.h"
#include "math/half.h"

namespace burnish {

using host::Where;

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

inline Bytes16 load_streaming(const void* address, Where where = Where::current()) {
  host::check_aligned(address, 16, where);
  Bytes16 value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class T>
T load_coherent(const T* address, Where where = Where::current()) {
  host::check_aligned(address, sizeof(T), where);
  host::pause();
  const T value = *address;
  host::pause();
  return value;
}

inline uint64_t evict_first_policy() { return 0; }

inline void copy_async16(void* shared, const void* global, bool valid, Where where = Where::current()) {
  host::check_aligned(shared, 16, where);
  host::check_aligned(global, 16, where);
  host::copy_async(shared, global, 16, valid ? 16 : 0);
}

inline void copy_async16(void* shared, const void* global, bool valid, uint64_t, Where where = Where::current()) {
  copy_async16(shared, global, valid, where);
}

inline void copy_async_commit() { host::copy_commit(); }

template <int Pending>
void copy_async_wait() {
  host::copy_wait(Pending);
}

// The fragments lie as ptx.cuh says; each lane computes its own sums.
inline void mma_int8(int32_t (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                     Where where = Where::current()) {
  struct In {
    uint32_t a[4], b[2];
    int32_t c[4];
  };
  struct Out {
    int32_t d[4];
  };
  const In in{{a0, a1, a2, a3}, {b0, b1}, {sum[0], sum[1], sum[2], sum[3]}};
  const auto compute = [](const In* const* ins, Out* const* outs) {
    int8_t a[16][32], b[8][32];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) std::memcpy(&a[group + i % 2 * 8][t * 4 + i / 2 * 16], &ins[lane]->a[i], 4);
      for (int i = 0; i < 2; ++i) std::memcpy(&b[group][t * 4 + i * 16], &ins[lane]->b[i], 4);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        int32_t dot = 0;
        for (int k = 0; k < 32; ++k) dot += a[row][k] * b[column][k];
        outs[lane]->d[i] = static_cast<int32_t>(static_cast<uint32_t>(ins[lane]->c[i]) + static_cast<uint32_t>(dot));
      }
    }
  };
  const Out out = host::collective<Out>("mma_int8", host::kFullWarp, in, where, compute);
  std::memcpy(sum, out.d, sizeof out.d);
}

inline uint32_t warp_max(uint32_t value, Where where = Where::current()) {
  return host::collective<uint32_t>("warp_max", host::kFullWarp, value, where,
                                    [](const uint32_t* const* ins, uint32_t* const* outs) {
                                      uint32_t largest = 0;
                                      for (int lane = 0; lane < 32; ++lane) largest = std::max(largest, *ins[lane]);
                                      for (int lane = 0; lane < 32; ++lane) *outs[lane] = largest;
                                    });
}

inline float float_from_fp16(uint32_t bits) { return to_float(fp16{static_cast<uint16_t>(bits)}); }

inline uint32_t draw_ticket(uint32_t* counter, Where where = Where::current()) {
  host::check_aligned(counter, sizeof *counter, where);
  host::pause();
  return (*counter)++;
}

inline void dependents_start() {}

inline void dependency_wait() {}

}  // namespace burnish
