// The CPU's side of ptx.cuh: every wrapper by the same name, computed from what the ISA says of it.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/host/machine.h"
#include "cuda/host/matrix.h"
#include "math/half.h"

namespace burnish {

using host::Where;

// The types that ptx.cuh names; what nvcc would refuse is refused here too.
template <class T, class... Allowed>
constexpr bool kOneOf = (std::is_same_v<T, Allowed> || ...);
template <class T>
constexpr bool kAtomicInteger = kOneOf<T, int32_t, uint32_t, unsigned long long>;

template <class T>
T load(const T* address, Where where = Where::current(), host::Access kind = host::Access::kLoad) {
  static_assert(sizeof(T) <= 16 && sizeof(T) == alignof(T), "no single access of this size");
  host::access(kind, address, sizeof(T), where);
  return *address;
}

template <class T>
void store(T* address, const std::type_identity_t<T>& value, Where where = Where::current()) {
  static_assert(sizeof(T) <= 16 && sizeof(T) == alignof(T), "no single access of this size");
  host::access(host::Access::kStore, address, sizeof(T), where);
  *address = value;
}

template <class T>
T load_global(const T* address, Where where = Where::current()) {
  return load(address, where);
}

template <class T>
void store_global(T* address, const std::type_identity_t<T>& value, Where where = Where::current()) {
  store(address, value, where);
}

inline Bytes16 load_streaming(const void* address, Where where = Where::current()) {
  host::access(host::Access::kStreamingLoad, address, 16, where);
  return *static_cast<const Bytes16*>(address);
}

template <class T>
T load_coherent(const T* address, Where where = Where::current()) {
  static_assert(kOneOf<T, Bytes16, int32_t, float>, "load_coherent has no such type");
  host::pause(where);
  return load(address, where, host::Access::kCoherentLoad);
}

inline uint64_t evict_first_policy() { return 0; }

inline void copy_async16(void* shared, const void* global, bool valid, Where where = Where::current()) {
  host::copy_async(shared, global, 16, valid, where);
}

inline void copy_async16(void* shared, const void* global, bool valid, uint64_t, Where where = Where::current()) {
  host::copy_async(shared, global, 16, valid, where);
}

template <int Bytes>
void copy_async(void* shared, const void* global, bool valid, Where where = Where::current()) {
  static_assert(Bytes == 4 || Bytes == 8);
  host::copy_async(shared, global, Bytes, valid, where);
}

inline void copy_async_commit() { host::copy_commit(); }

template <int Pending>
void copy_async_wait(Where where = Where::current()) {
  host::copy_wait(Pending, where);
}

// One update of an atomic: update(old) is stored, old returned. Other threads may come before.
template <class T, class Update>
T atomic_update(T* address, Where where, const Update& update, host::Access kind = host::Access::kAtomic) {
  host::pause(where);
  host::access(kind, address, sizeof(T), where);
  const T old = *address, now = update(old);
  if (std::memcmp(&old, &now, sizeof(T)) != 0) host::progress();
  *address = now;
  return old;
}

// In global memory subnormal floats count as zeros of their sign, before and after.
inline float add_floats(float a, float b, bool subnormals) {
  const auto kept = [=](float x) {
    return subnormals || std::fabs(x) >= FLT_MIN || x != x ? x : std::copysign(0.f, x);
  };
  return kept(kept(a) + kept(b));
}

template <class T>
T atomic_add(T* address, std::type_identity_t<T> value, Where where = Where::current()) {
  static_assert(kAtomicInteger<T> || kOneOf<T, float>, "atomic_add has no such type");
  return atomic_update(address, where, [=](T old) {
    if constexpr (std::is_same_v<T, float>) {
      return add_floats(old, value, host::in_shared(address));
    } else {
      return static_cast<T>(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value));
    }
  });
}

template <class T>
T atomic_max(T* address, std::type_identity_t<T> value, Where where = Where::current()) {
  static_assert(kAtomicInteger<T>, "atomic_max has no such type");
  return atomic_update(address, where, [=](T old) { return std::max(old, value); });
}

template <class T>
T atomic_min(T* address, std::type_identity_t<T> value, Where where = Where::current()) {
  static_assert(kAtomicInteger<T>, "atomic_min has no such type");
  return atomic_update(address, where, [=](T old) { return std::min(old, value); });
}

template <class T>
T atomic_exchange(T* address, std::type_identity_t<T> value, Where where = Where::current()) {
  static_assert(kAtomicInteger<T>, "atomic_exchange has no such type");
  return atomic_update(address, where, [=](T) { return value; });
}

template <class T>
T atomic_compare_exchange(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
                          Where where = Where::current()) {
  static_assert(kAtomicInteger<T>, "atomic_compare_exchange has no such type");
  return atomic_update(address, where, [=](T old) { return old == expected ? value : old; });
}

inline uint32_t draw_ticket(uint32_t* counter, Where where = Where::current()) {
  return atomic_update(counter, where, [](uint32_t old) { return old + 1; }, host::Access::kTicket);
}

// The lane that `source(lane)` names gives its value; a lane outside the warp is the own one.
template <class T, class Source>
T shuffle_from(const char* name, uint32_t mask, T value, unsigned by, Where where, const Source& source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 4 or 8 bytes");
  struct In {
    T value;
    int from;
  };
  if (by > 31) host::stop(std::string(name) + " by " + std::to_string(by) + ": only 0 to 31 mean something", where);
  const int lane = static_cast<int>(host::lane()), wanted = source(lane, static_cast<int>(by));
  const In in{value, wanted < 0 || wanted >= 32 ? lane : wanted};
  if ((mask >> in.from & 1) == 0) {
    host::stop(std::string(name) + ": lane " + std::to_string(in.from) + " is not in the mask", where);
  }
  return host::collective<T>(name, mask, in, where, [](const In* const* ins, T* const* outs) {
    for (int i = 0; i < 32; ++i) {
      if (outs[i] != nullptr) *outs[i] = ins[ins[i]->from]->value;
    }
  });
}

template <class T>
T shuffle(uint32_t mask, T value, int lane, Where where = Where::current()) {
  return shuffle_from("shuffle", mask, value, lane, where, [](int, int from) { return from; });
}

template <class T>
T shuffle_xor(uint32_t mask, T value, int bits, Where where = Where::current()) {
  return shuffle_from("shuffle_xor", mask, value, bits, where, [](int lane, int by) { return lane ^ by; });
}

template <class T>
T shuffle_up(uint32_t mask, T value, unsigned distance, Where where = Where::current()) {
  return shuffle_from("shuffle_up", mask, value, distance, where, [](int lane, int by) { return lane - by; });
}

template <class T>
T shuffle_down(uint32_t mask, T value, unsigned distance, Where where = Where::current()) {
  return shuffle_from("shuffle_down", mask, value, distance, where, [](int lane, int by) { return lane + by; });
}

// The values of all lanes, the lower ones first, joined by join(a, b); the same result for each.
template <class T, class Join>
T reduce(const char* name, uint32_t mask, T value, Where where, const Join& join) {
  return host::collective<T>(name, mask, value, where, [&](const T* const* ins, T* const* outs) {
    const T* first = *std::find_if(ins, ins + 32, [](const T* in) { return in != nullptr; });
    T all = *first;
    for (int i = 0; i < 32; ++i) {
      if (ins[i] != nullptr && ins[i] != first) all = join(all, *ins[i]);
    }
    for (int i = 0; i < 32; ++i) {
      if (outs[i] != nullptr) *outs[i] = all;
    }
  });
}

inline uint32_t ballot(uint32_t mask, bool mine, Where where = Where::current()) {
  return reduce("ballot", mask, uint32_t{mine} << host::lane(), where, std::bit_or<uint32_t>());
}

inline bool vote_any(uint32_t mask, bool mine, Where where = Where::current()) {
  return reduce("vote_any", mask, uint32_t{mine}, where, std::bit_or<uint32_t>()) != 0;
}

inline bool vote_all(uint32_t mask, bool mine, Where where = Where::current()) {
  return reduce("vote_all", mask, uint32_t{mine}, where, std::bit_and<uint32_t>()) != 0;
}

template <class T>
T reduce_add(uint32_t mask, T value, Where where = Where::current()) {
  static_assert(kOneOf<T, int32_t, uint32_t>, "reduce_add has no such type");
  return static_cast<T>(reduce("reduce_add", mask, static_cast<uint32_t>(value), where, std::plus<uint32_t>()));
}

template <class T>
T reduce_min(uint32_t mask, T value, Where where = Where::current()) {
  static_assert(kOneOf<T, int32_t, uint32_t>, "reduce_min has no such type");
  return reduce("reduce_min", mask, value, where, [](T a, T b) { return std::min(a, b); });
}

template <class T>
T reduce_max(uint32_t mask, T value, Where where = Where::current()) {
  static_assert(kOneOf<T, int32_t, uint32_t>, "reduce_max has no such type");
  return reduce("reduce_max", mask, value, where, [](T a, T b) { return std::max(a, b); });
}

inline uint32_t reduce_and(uint32_t mask, uint32_t value, Where where = Where::current()) {
  return reduce("reduce_and", mask, value, where, std::bit_and<uint32_t>());
}

inline uint32_t reduce_or(uint32_t mask, uint32_t value, Where where = Where::current()) {
  return reduce("reduce_or", mask, value, where, std::bit_or<uint32_t>());
}

inline uint32_t reduce_xor(uint32_t mask, uint32_t value, Where where = Where::current()) {
  return reduce("reduce_xor", mask, value, where, std::bit_xor<uint32_t>());
}

inline void barrier_sync(unsigned barrier, unsigned threads, Where where = Where::current()) {
  host::barrier(barrier, threads, true, "barrier_sync", where);
}

inline void barrier_arrive(unsigned barrier, unsigned threads, Where where = Where::current()) {
  host::barrier(barrier, threads, false, "barrier_arrive", where);
}

inline void grid_barrier(uint32_t* counter, Where where = Where::current()) {
  host::access(host::Access::kAtomic, counter, sizeof *counter, where);
  if (*counter << 1 != 0) host::stop("grid_barrier: its counter was not zero before the launch", where);
  host::barrier_together("grid_barrier", true, where);
}

inline unsigned cluster_rank() { return host::cluster_rank(); }

inline void cluster_barrier(Where where = Where::current()) { host::barrier_together("cluster_barrier", false, where); }

template <class T>
T load_remote(const T* shared, unsigned rank, Where where = Where::current()) {
  static_assert(sizeof(T) == 4);
  return load(static_cast<const T*>(host::in_block(shared, rank, where)), where);
}

template <class T>
void store_remote(T* shared, unsigned rank, std::type_identity_t<T> value, Where where = Where::current()) {
  static_assert(sizeof(T) == 4);
  store(static_cast<T*>(host::in_block(shared, rank, where)), value, where);
}

inline void dependents_start() {}

inline void dependency_wait() { host::dependency_wait(); }

template <int Table>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t value = 0;
  for (int i = 0; i < 8; ++i) {
    if (Table >> i & 1) value |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return value;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i;
    const auto byte = static_cast<uint8_t>(bytes >> 8 * (digit & 7));
    value |= uint32_t{digit & 8 ? static_cast<uint8_t>(byte & 0x80 ? 0xff : 0) : byte} << 8 * i;
  }
  return value;
}

inline int popcount(uint32_t word) { return std::popcount(word); }

inline int highest_bit(uint32_t word) { return 31 - std::countl_zero(word); }

template <class T>
uint32_t dot_bytes(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<uint32_t>(static_cast<T>(a >> i) * static_cast<T>(b >> i));
  return sum;
}

inline int32_t dp4a(int32_t a, int32_t b, int32_t sum) {
  return static_cast<int32_t>(
      dot_bytes<int8_t>(static_cast<uint32_t>(a), static_cast<uint32_t>(b), static_cast<uint32_t>(sum)));
}

inline uint32_t dp4a(uint32_t a, uint32_t b, uint32_t sum) { return dot_bytes<uint8_t>(a, b, sum); }

template <class T>
uint32_t pack(float low, float high) {
  const auto half = [](float value) -> uint32_t { return value != value ? 0x7fff : from_float<T>(value).bits; };
  return half(low) | half(high) << 16;
}

inline uint32_t pack_fp16(float low, float high) { return pack<fp16>(low, high); }

inline uint32_t pack_bf16(float low, float high) { return pack<bf16>(low, high); }

inline float float_from_fp16(uint32_t bits) { return to_float(fp16{static_cast<uint16_t>(bits)}); }

}  // namespace burnish
