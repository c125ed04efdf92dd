// The CPU's side of warpgroup.cuh: every wrapper by the same name, computed from what the ISA says of it. Copies and
// products are done at once or not before a wait asks for them, as the seed has it.
#pragma once

#include <bit>
#include <utility>

#include "cuda/host/machine.h"
#include "cuda/host/matrix.h"

namespace burnish {

constexpr bool kHasWarpgroups = true;

struct TileMap : TileSource {};

// Rows in the block's shared memory, counted from its start.
struct SharedTile {
  size_t offset;
  Swizzle swizzle;
};

namespace host {

// Where byte `offset` of a tile's lines lies, all counted from the start of the block's shared memory.
constexpr size_t exchanged(Swizzle swizzle, size_t offset) {
  switch (swizzle) {
    case Swizzle::k128:
      return offset ^ (offset >> 3 & 0x70);
    case Swizzle::k64:
      return offset ^ (offset >> 3 & 0x30);
    case Swizzle::k32:
      return offset ^ (offset >> 3 & 0x10);
    default:
      return offset;
  }
}

// --- tiles.cpp

TileMap checked_map(const TileSource& from);
void init(TileBarrier* barrier, unsigned arrivals, Where where);
void arrive(TileBarrier* barrier, unsigned bytes, Where where);
void wait(TileBarrier* barrier, unsigned parity, Where where);
void load_tile(unsigned char* to, const TileMap& map, int byte, int row, TileBarrier* barrier, Where where,
               unsigned blocks = 0);  // bits of the cluster's; none for the thread's own
void store_tile(const TileMap& map, const unsigned char* from, int byte, int row, Where where);

// --- products

// A warp's part of one: a's values in a row of 16 are Depth, those of b that many times as many, and column(row, i) is
// where among them the i-th of a's stands.
template <class A, int Depth, int Times, class Sum, int Words>
struct WarpProduct {
  static constexpr int kColumns = Words * 2;
  Where where;
  SharedTile a, b;  // a's rows are the warp's
  bool add;
  std::array<Sum*, 32> sums;

  const unsigned char* unit(SharedTile tile, int row, int byte) const {
    const size_t line = static_cast<size_t>(tile.swizzle), offset = tile.offset + row * line + byte;
    return static_cast<unsigned char*>(shared_memory()) + exchanged(tile.swizzle, offset);
  }

  // A row's bytes, as what goes on beside the threads reads them.
  template <class T, size_t Values>
  void read(T (&values)[Values], SharedTile tile, int row) const {
    for (size_t i = 0; i < sizeof values; i += 16) {
      const unsigned char* from = unit(tile, row, static_cast<int>(i));
      access_beside(from, 16, where);
      std::memcpy(reinterpret_cast<unsigned char*>(values) + i, from, 16);
    }
  }

  void run(const auto& column) const {
    A left[16][Depth], right[kColumns][Times * Depth];
    for (int row = 0; row < 16; ++row) read(left[row], a, row);
    for (int row = 0; row < kColumns; ++row) read(right[row], b, row);
    for (int row = 0; row < 16; ++row) {
      int columns[Depth];
      for (int i = 0; i < Depth; ++i) columns[i] = column(row, i);
      for (int n = 0; n < kColumns; ++n) {
        Sum& sum = sums[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
        auto exactly = add ? decltype(exact(A()))(sum) : 0;
        for (int i = 0; i < Depth; ++i) exactly += exact(left[row][i]) * exact(right[n][columns[i]]);
        sum = static_cast<Sum>(exactly);
      }
    }
    count_event("warpgroup_mma");
  }
};

// Runs act() for a warp, at once or when a wait asks for it.
void start_product(const Threads& warp, std::function<void()> act);

// The current thread's part of a product; columns(every lane's word) makes the product's column().
template <class A, int Times, class Sum, int Words>
void start_products(const char* name, Sum (&sum)[Words], SharedTile a, SharedTile b, uint32_t word, bool add,
                    Where where, const auto& columns) {
  if (!here().fenced) stop(where, name, " without warpgroup_fence after its sums were waited for");
  struct Lane {
    Sum* sum;
    uint32_t word;
    SharedTile a, b;
    bool add;
  } mine{sum, word, a, b, add};
  meet(name, {kFullWarp, where}, &mine, true, [&](const Threads& warp) {
    WarpProduct<A, 32 / sizeof(A), Times, Sum, Words> product{where, a, b, add, {}};
    product.a.offset += warp[0]->in_block / 32 % 4 * 16 * static_cast<size_t>(a.swizzle);
    std::array<uint32_t, 32> words;
    for (unsigned i = 0; i < 32; ++i) {
      const Lane& lane = *static_cast<const Lane*>(warp[i]->wait.brought);
      if (std::pair(lane.a.offset, lane.b.offset) != std::pair(a.offset, b.offset) || lane.add != add) {
        stop(where, name, ": the lanes of a warp name different tiles");
      }
      product.sums[i] = lane.sum;
      words[i] = lane.word;
    }
    start_product(warp, [product, column = columns(words)] { product.run(column); });
  });
}

}  // namespace host

inline TileMap tile_map(const TileSource& from) { return host::checked_map(from); }

template <class T>
T* aligned_shared_memory() {
  return shared_memory<T>();  // whatever its address is: tiles are placed from here on
}

inline void tile_barrier_init(TileBarrier* barrier, unsigned arrivals, Where where = Where::current()) {
  host::init(barrier, arrivals, where);
}

inline void tile_barriers_ready() { host::here().shown = ++host::machine->now; }

inline void tile_barrier_expect(TileBarrier* barrier, unsigned bytes, Where where = Where::current()) {
  host::arrive(barrier, bytes, where);
}

inline void tile_barrier_arrive(TileBarrier* barrier, Where where = Where::current()) {
  host::arrive(barrier, 0, where);
}

inline void tile_barrier_arrive(TileBarrier* barrier, unsigned rank, Where where = Where::current()) {
  host::arrive(static_cast<TileBarrier*>(host::in_block(barrier, rank, where)), 0, where);
}

inline void tile_barrier_arrive_remote(TileBarrier* barrier, unsigned rank, Where where = Where::current()) {
  tile_barrier_arrive(barrier, rank, where);
}

inline void tile_barrier_wait(TileBarrier* barrier, unsigned parity, Where where = Where::current()) {
  host::wait(barrier, parity, where);
}

inline void tile_barrier_wait_remote(TileBarrier* barrier, unsigned parity, Where where = Where::current()) {
  host::wait(barrier, parity, where);
}

inline void load_tile(void* shared, const TileMap& map, int byte, int row, TileBarrier* barrier,
                      Where where = Where::current()) {
  host::load_tile(static_cast<unsigned char*>(shared), map, byte, row, barrier, where);
}

inline void load_tile_to(unsigned blocks, void* shared, const TileMap& map, int byte, int row, TileBarrier* barrier,
                         Where where = Where::current()) {
  host::load_tile(static_cast<unsigned char*>(shared), map, byte, row, barrier, where, blocks);
}

template <unsigned Blocks>
void load_tile_to_all(void* shared, const TileMap& map, int byte, int row, TileBarrier* barrier,
                      Where where = Where::current()) {
  static_assert(Blocks >= 2 && Blocks <= 8);
  load_tile_to((1u << Blocks) - 1, shared, map, byte, row, barrier, where);
}

inline void store_tile(const TileMap& map, const void* shared, int byte, int row, Where where = Where::current()) {
  host::store_tile(map, static_cast<const unsigned char*>(shared), byte, row, where);
}

inline void store_tile_commit() { ++host::here().tile_group; }

template <int Pending>
void store_tile_wait() {
  host::finish(host::here().tile_stores,
               host::here().tile_group - std::min<uint64_t>(Pending, host::here().tile_group));
}

inline void copies_see_stores() { host::here().shown = ++host::machine->now; }

inline void copies_see_remote_stores() { host::here().shown = host::here().shown_remote = ++host::machine->now; }

inline void copies_see_global_stores() { host::here().shown_global = ++host::machine->now; }

template <int Registers, bool More>
void warpgroup_registers() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
}

inline void warpgroup_fence() { host::here().fenced = true; }

inline void warpgroup_commit() { ++host::here().product_group; }

template <int Pending>
void warpgroup_wait(Where where = Where::current()) {
  host::meet("warpgroup_wait", {kFullWarp, where}, nullptr, true, [](const host::Threads& warp) {
    host::Thread& first = *warp[0];
    host::finish(first.products, first.product_group - std::min<uint64_t>(Pending, first.product_group));
    for (host::Thread* thread : warp) thread->fenced &= Pending > 0;
    host::share(warp);  // more than the ISA promises: what they read themselves is known to all of them too
  });
}

template <Swizzle kSwizzle>
SharedTile shared_tile(const void* start, Where where = Where::current()) {
  static_assert(kSwizzle == Swizzle::k64 || kSwizzle == Swizzle::k128);
  return {host::shared_offset(start, where), kSwizzle};
}

template <class A, int Words>
void warpgroup_mma(float (&sum)[Words], SharedTile a, SharedTile b, bool add, Where where = Where::current()) {
  static_assert(Words == 16 || Words == 32 || Words == 64 || Words == 128);
  host::start_products<A, 1>("warpgroup_mma", sum, a, b, 0, add, where,
                             [](const auto&) { return [](int, int i) { return i; }; });
}

template <class A, int Selector = 0, class Sum, int Words>
void warpgroup_mma_sparse(Sum (&sum)[Words], SharedTile a, SharedTile b, uint32_t kept, bool add,
                          Where where = Where::current()) {
  static_assert((Words == 64 || Words == 88) && std::is_integral_v<A> == std::is_integral_v<Sum>);
  static_assert(Selector >= 0 && Selector < int(sizeof(A)));
  constexpr const char* kName = "warpgroup_mma_sparse";
  host::start_products<A, 2>(kName, sum, a, b, kept, add, where, [where](const std::array<uint32_t, 32>& words) {
    return [words, where](int row, int i) {
      return host::kept_column<A, Selector>(kName, [&](int lane) { return words[lane]; }, row, i, where);
    };
  });
}

inline void store_matrix_transposed(void* row, const uint32_t (&tile)[4], Where where = Where::current()) {
  struct Lane {
    void* row;
    const uint32_t* tile;
  };
  host::access(host::Access::kStore, row, 16, where);
  const auto compute = [](const auto& lanes) {
    uint16_t tiles[8][32];  // four tiles beside each other
    for (unsigned i = 0; i < 32; ++i) host::copy_parts<host::To::kMatrix>(tiles, lanes[i]->tile, i);
    for (unsigned i = 0; i < 32; ++i) {
      uint16_t values[8];
      for (unsigned j = 0; j < 8; ++j) values[j] = tiles[j][i / 8 * 8 + i % 8];
      std::memcpy(lanes[i]->row, values, sizeof values);
    }
  };
  host::collective("store_matrix_transposed", {kFullWarp, where}, Lane{row, tile}, compute, true);
}

}  // namespace burnish
