// The CPU's side of ptx.cuh: every wrapper by the same name, computed from what the ISA says of it.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "cuda/host/machine.h"
#include "cuda/host/matrix.h"

namespace burnish {

using host::Access;
using host::lane;
using host::Mask;
using host::Where;

// The types that ptx.cuh names; what nvcc would refuse is refused here too.
template <class T, class... Allowed>
concept OneOf = (std::is_same_v<T, Allowed> || ...);
template <class T>
concept Integer = OneOf<T, int32_t, uint32_t>;
template <class T>
concept AtomicInteger = Integer<T> || OneOf<T, unsigned long long>;
template <class T>
concept Accessed = sizeof(T) <= 16 && sizeof(T) == alignof(T);  // by a single access

// --- memory

template <Accessed T>
T load(const T* address, Where where = Where::current(), Access kind = Access::kLoad) {
  host::access(kind, address, sizeof(T), where);
  return *address;
}

template <Accessed T>
void store(T* address, const std::type_identity_t<T>& value, Where where = Where::current()) {
  host::access(Access::kStore, address, sizeof(T), where);
  *address = value;
}

auto load_global(const auto* address, Where where = Where::current()) { return load(address, where); }

void store_global(auto* address, const auto& value, Where where = Where::current()) { store(address, value, where); }

inline Bytes16 load_streaming(const void* address, Where where = Where::current()) {
  return load(static_cast<const Bytes16*>(address), where, Access::kStreamingLoad);
}

template <OneOf<Bytes16, int32_t, float> T>
T load_coherent(const T* address, Where where = Where::current()) {
  host::pause(where);
  return load(address, where, Access::kCoherentLoad);
}

inline uint64_t evict_first_policy() { return 0; }

inline void copy_async16(void* shared, const void* global, bool valid, uint64_t = 0, Where where = Where::current()) {
  host::copy_async(shared, global, 16, valid, where);
}

template <int Bytes>
void copy_async(void* shared, const void* global, bool valid, Where where = Where::current()) {
  static_assert(Bytes == 4 || Bytes == 8);
  host::copy_async(shared, global, Bytes, valid, where);
}

inline void copy_async_commit() { ++host::here().group; }

template <int Pending>
void copy_async_wait(Where where = Where::current()) {
  host::copy_wait(Pending, where);
}

// What atomics and reductions make of two values.
constexpr auto least = [](auto a, auto b) { return std::min(a, b); };
constexpr auto largest = [](auto a, auto b) { return std::max(a, b); };
constexpr auto later = [](auto, auto b) { return b; };
constexpr auto wrapping_sum = [](auto a, auto b) {
  using Unsigned = std::make_unsigned_t<decltype(a)>;
  return static_cast<decltype(a)>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
};

// join(old, value) is stored, old returned. Other threads may come before.
template <class T>
T update(T* address, std::type_identity_t<T> value, Where where, const auto& join, Access kind = Access::kAtomic) {
  host::pause(where);
  host::access(kind, address, sizeof(T), where);
  const T old = std::exchange(*address, join(*address, value));
  if (std::memcmp(&old, address, sizeof(T)) != 0) host::machine->idle = 0;
  return old;
}

auto atomic_add(AtomicInteger auto* address, auto value, Where where = Where::current()) {
  return update(address, value, where, wrapping_sum);
}

// In global memory subnormals count as zeros of their sign, before and after.
inline float atomic_add(float* address, float value, Where where = Where::current()) {
  const bool shared = host::in_shared(address);
  const auto kept = [=](float x) { return shared || std::fpclassify(x) != FP_SUBNORMAL ? x : std::copysign(0.f, x); };
  return update(address, value, where, [=](float a, float b) { return kept(kept(a) + kept(b)); });
}

auto atomic_max(AtomicInteger auto* address, auto value, Where where = Where::current()) {
  return update(address, value, where, largest);
}

auto atomic_min(AtomicInteger auto* address, auto value, Where where = Where::current()) {
  return update(address, value, where, least);
}

auto atomic_exchange(AtomicInteger auto* address, auto value, Where where = Where::current()) {
  return update(address, value, where, later);
}

template <AtomicInteger T>
T atomic_compare_exchange(T* address, T expected, T value, Where where = Where::current()) {
  return update(address, value, where, [=](T old, T other) { return old == expected ? other : old; });
}

inline uint32_t draw_ticket(uint32_t* counter, Where where = Where::current()) {
  return update(counter, 1, where, wrapping_sum, Access::kTicket);
}

// --- warps

// Lane `wanted` gives its value, to a lane that wants one outside the warp its own; `by` is what the call asked for.
template <class T>
T take(const char* name, Mask mask, T value, int64_t by, unsigned wanted) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 4 or 8 bytes");
  const unsigned from = wanted < 32 ? wanted : lane();
  if (by < 0 || by > 31) host::stop(mask.where, name, " by ", by, ": only 0 to 31 mean something");
  if ((mask.value >> from & 1) == 0) host::stop(mask.where, name, ": lane ", from, " is not in the mask");
  struct Lane {
    T value, got;
    int from;  // of the lanes in the mask
  };
  const Lane mine{value, {}, std::popcount(mask.value & ((1u << from) - 1))};
  const auto exchange = [](const auto& lanes) {
    for (Lane* lane : lanes) lane->got = lanes[lane->from]->value;
  };
  return host::collective(name, mask, mine, exchange).got;
}

auto shuffle(Mask mask, auto value, int lane) { return take("shuffle", mask, value, lane, lane); }

auto shuffle_xor(Mask mask, auto value, int bits) { return take("shuffle_xor", mask, value, bits, lane() ^ bits); }

auto shuffle_up(Mask mask, auto value, unsigned by) { return take("shuffle_up", mask, value, by, lane() - by); }

auto shuffle_down(Mask mask, auto value, unsigned by) { return take("shuffle_down", mask, value, by, lane() + by); }

// The values of all lanes, the lower ones first, joined by join(a, b); the same result for each.
template <class T>
T reduce(const char* name, Mask mask, T value, const auto& join) {
  return host::collective(name, mask, value, [&join](const auto& lanes) {
    for (size_t i = 1; i < lanes.size(); ++i) *lanes[i] = join(*lanes[i - 1], *lanes[i]);
    for (T* lane : lanes) *lane = *lanes.back();
  });
}

inline uint32_t ballot(Mask mask, bool mine) { return reduce("ballot", mask, uint32_t{mine} << lane(), std::bit_or()); }

inline bool vote_any(Mask mask, bool mine) { return reduce("vote_any", mask, mine, std::logical_or()); }

inline bool vote_all(Mask mask, bool mine) { return reduce("vote_all", mask, mine, std::logical_and()); }

auto reduce_add(Mask mask, Integer auto value) { return reduce("reduce_add", mask, value, wrapping_sum); }

auto reduce_min(Mask mask, Integer auto value) { return reduce("reduce_min", mask, value, least); }

auto reduce_max(Mask mask, Integer auto value) { return reduce("reduce_max", mask, value, largest); }

inline uint32_t reduce_and(Mask mask, uint32_t value) { return reduce("reduce_and", mask, value, std::bit_and()); }

inline uint32_t reduce_or(Mask mask, uint32_t value) { return reduce("reduce_or", mask, value, std::bit_or()); }

inline uint32_t reduce_xor(Mask mask, uint32_t value) { return reduce("reduce_xor", mask, value, std::bit_xor()); }

// --- blocks

inline void barrier_sync(unsigned barrier, unsigned threads, Where where = Where::current()) {
  host::barrier(barrier, threads, true, "barrier_sync", where);
}

inline void barrier_arrive(unsigned barrier, unsigned threads, Where where = Where::current()) {
  host::barrier(barrier, threads, false, "barrier_arrive", where);
}

inline uint32_t grid_arrive(uint32_t* counter, Where where = Where::current()) {
  host::grid_arrive(counter, where);
  return 0;
}

inline void grid_wait(const uint32_t* counter, uint32_t, Where where = Where::current()) {
  host::grid_wait(counter, where);
}

inline void grid_barrier(uint32_t* counter, Where where = Where::current()) {
  host::access(Access::kAtomic, counter, sizeof *counter, where);
  if (*counter << 1 != 0) host::stop(where, "grid_barrier: its counter was not zero before the launch");
  const unsigned thread = threadIdx.x + threadIdx.y + threadIdx.z, block = blockIdx.x + blockIdx.y + blockIdx.z;
  if (thread + block == 0) *counter ^= 0x80000000u;
  host::grid_barrier(where);
}

inline unsigned cluster_rank() { return host::here().block % host::machine->launch->cluster; }

inline void cluster_barrier(Where where = Where::current()) { host::cluster_barrier(where); }

auto load_remote(const auto* shared, unsigned rank, Where where = Where::current()) {
  static_assert(sizeof *shared == 4 || sizeof *shared == 16);
  return load(static_cast<decltype(shared)>(host::in_block(shared, rank, where)), where);
}

void store_remote(auto* shared, unsigned rank, auto value, Where where = Where::current()) {
  static_assert(sizeof *shared == 4 || sizeof *shared == 8 || sizeof *shared == 16);
  store(static_cast<decltype(shared)>(host::in_block(shared, rank, where)), value, where);
}

inline void dependents_start() {}

using host::dependency_wait;

// --- words

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

template <Integer T>
T dp4a(T a, T b, T sum) {
  using Byte = std::conditional_t<std::is_signed_v<T>, int8_t, uint8_t>;
  for (int i = 0; i < 32; i += 8) sum = wrapping_sum(sum, T{static_cast<Byte>(a >> i)} * T{static_cast<Byte>(b >> i)});
  return sum;
}

template <class T>
uint32_t pack(float low, float high) {
  const auto half = [](float value) -> uint32_t { return value != value ? 0x7fff : from_float<T>(value).bits; };
  return half(low) | half(high) << 16;
}

inline uint32_t pack_fp16(float low, float high) { return pack<fp16>(low, high); }

inline uint32_t pack_bf16(float low, float high) { return pack<bf16>(low, high); }

inline float float_from_fp16(uint32_t bits) { return to_float(fp16{static_cast<uint16_t>(bits)}); }

}  // namespace burnish
