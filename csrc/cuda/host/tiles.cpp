// Copies of tiles, the barriers in shared memory that count their bytes, and the order in which all of that ends.
#include <algorithm>
#include <bit>
#include <cstring>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/warpgroup.cuh"

namespace burnish::host {
namespace {

constexpr int kUnit = 16;  // bytes

Phases& phases_of(TileBarrier* barrier, Where where) {
  access(Access::kLoad, barrier, sizeof *barrier, where);
  const auto found = machine->phases.find(barrier);
  if (found == machine->phases.end()) stop(where, "a barrier of tiles that no tile_barrier_init made");
  return found->second;
}

void end_if_complete(Phases& phases) {
  if (phases.lacking > 0 || phases.bytes != 0) return;
  ++phases.ended;
  phases.lacking = phases.expected;
  phases.published.join(phases.known);
  Threads waiting;
  for (Thread& thread : machine->threads) {
    if (thread.wait.barrier == &phases) waiting.push_back(&thread);
  }
  release(waiting);
  count_event("tile_barriers");
}

void arrive_at(Phases& phases) {
  --phases.lacking;
  share({&here()});
  phases.known.join(*here().clock);
  end_if_complete(phases);
}

void wait_at(Phases& phases, unsigned parity, const char* name, Where where) {
  pause(where);
  while (phases.ended % 2 == parity) wait_for(&phases, name, where);
  share({&here()}, phases.published);
}

// A tile arrives beside the threads, so that none of them takes an exception: the launch ends when the next one would
// run.
void late(Where where) try { stop(where, "a tile arrives in a block that has ended"); } catch (...) {
  machine->error = std::current_exception();
  machine->ready.clear();
}

unsigned char* in_tile(unsigned char* tile, const TileMap& map, int row, int byte) {
  unsigned char* const shared = static_cast<unsigned char*>(shared_memory());
  const size_t offset = static_cast<size_t>(tile - shared) + static_cast<size_t>(row) * map.tile_bytes + byte;
  return shared + exchanged(map.swizzle, offset);
}

void check_tile(const char* name, const unsigned char* tile, const TileMap& map, int byte, Where where) {
  const size_t line = static_cast<size_t>(map.swizzle), lines = map.swizzle == Swizzle::kNone ? 128 : 8 * line;
  if (shared_offset(tile, where) % lines != 0) stop(where, name, ": the tile is not aligned to ", lines, " bytes");
  if (byte % kUnit != 0) stop(where, name, ": a line starts at byte ", byte, ", no multiple of 16");
}

// fn(row, byte, where it is in global memory, how many of its bytes there are) for each unit of a tile.
void each_unit(const TileMap& map, int byte, int row, const auto& fn) {
  for (int r = 0; r < static_cast<int>(map.tile_rows); ++r) {
    for (int b = 0; b < static_cast<int>(map.tile_bytes); b += kUnit) {
      const bool inside = row + r >= 0 && row + r < map.rows && byte + b >= 0 && byte + b < map.width;
      const int64_t left = inside ? std::min<int64_t>(kUnit, map.width - (byte + b)) : 0;
      const auto* first = static_cast<const unsigned char*>(map.data);
      fn(r, b, inside ? first + (row + r) * map.stride + byte + b : first, static_cast<size_t>(left));
    }
  }
}

// fn(address, bytes) for a unit in global memory, or for each byte of what there is of one.
void each_part(const unsigned char* unit, size_t bytes, const auto& fn) {
  const size_t step = bytes == kUnit ? kUnit : 1;
  for (size_t i = 0; i < bytes; i += step) fn(unit + i, step);
}

}  // namespace

TileMap checked_map(const TileSource& from) {
  const auto line = static_cast<unsigned>(from.swizzle);
  const bool aligned = reinterpret_cast<uintptr_t>(from.data) % kUnit == 0 && from.stride % kUnit == 0;
  if (!aligned || from.rows <= 0 || from.width <= 0 || from.width > from.stride || from.tile_rows == 0 ||
      from.tile_rows > 256 || from.tile_bytes != line) {
    throw std::runtime_error(say("no map of tiles: ", from.rows, " rows of ", from.width, " bytes, ", from.stride,
                                 " apart, in tiles of ", from.tile_rows, " by ", from.tile_bytes));
  }
  return {from};
}

void init(TileBarrier* barrier, unsigned arrivals, Where where) {
  access(Access::kStore, barrier, sizeof *barrier, where);
  machine->phases[barrier] = {arrivals, arrivals, 0, 0, {}, {}};
}

void arrive(TileBarrier* barrier, unsigned bytes, Where where) {
  Phases& phases = phases_of(barrier, where);
  if (phases.lacking == 0) stop(where, "arrives at a barrier of tiles for which all have arrived");
  phases.bytes += bytes;
  arrive_at(phases);
}

void wait(TileBarrier* barrier, unsigned parity, Where where) {
  Phases& phases = phases_of(barrier, where);
  if (draw() & 1) one_arrives();
  wait_at(phases, parity, "tile_barrier_wait", where);
}

void grid_arrive(uint32_t* counter, Where where) {
  access(Access::kAtomic, counter, sizeof *counter, where);
  if (!machine->launch->cooperative) stop(where, "grid_arrive in a launch that is not cooperative");
  const auto blocks = static_cast<unsigned>(volume(machine->launch->grid));
  const auto [found, first] = machine->phases.try_emplace(counter, Phases{blocks, blocks, 0, 0, {}, {}});
  if (first && *counter << 1 != 0) stop(where, "grid_arrive: its counter was not zero before the launch");
  if (found->second.ended > 0) stop(where, "grid_arrive: all blocks have arrived before");
  if (here().block == 0) *counter ^= 0x80000000u;
  arrive_at(found->second);
}

void grid_wait(const uint32_t* counter, Where where) {
  const auto found = machine->phases.find(counter);
  if (found == machine->phases.end()) stop(where, "grid_wait before any grid_arrive");
  wait_at(found->second, 0, "grid_wait", where);
}

void load_tile(unsigned char* to, const TileMap& map, int byte, int row, TileBarrier* barrier, Where where,
               unsigned blocks) {
  check_tile("load_tile", to, map, byte, where);
  struct Unit {
    unsigned char* to;
    const unsigned char* from;
    size_t bytes;
  };
  std::vector<Unit> units;
  each_unit(map, byte, row, [&](int r, int b, const unsigned char* from, size_t bytes) {
    units.push_back({in_tile(to, map, r, b), from, bytes});
    each_part(from, bytes, [&](const unsigned char* part, size_t size) { access_beside(part, size, where); });
    count_tile(Access::kTileLoad, from, bytes);
  });
  const uint32_t number = here().number;
  for (unsigned block = 0; block < std::bit_width(std::max(blocks, 1u)); ++block) {
    if (blocks > 0 && (blocks >> block & 1) == 0) continue;
    const auto there = [&](auto* own) { return static_cast<decltype(own)>(in_block(own, block, where)); };
    std::vector<Unit> arriving = units;
    if (blocks > 0) {
      for (Unit& unit : arriving) unit.to = there(unit.to);
    }
    TileBarrier* const counts = blocks > 0 ? there(barrier) : barrier;
    Phases& phases = phases_of(counts, where);
    access_beside(counts, sizeof *counts, where);
    for (const Unit& unit : arriving) access(Access::kTileCopy, unit.to, kUnit, where);
    const unsigned cluster = machine->launch->cluster, own = here().block;
    const unsigned to_block = blocks > 0 ? own / cluster * cluster + block : own;
    machine->arriving.push_back([units = std::move(arriving), number, &phases, to_block, where] {
      if (has_ended(to_block)) return late(where);
      for (const Unit& unit : units) {
        std::memset(unit.to, 0, kUnit);
        std::memcpy(unit.to, unit.from, unit.bytes);
        arrived(unit.to, kUnit);
      }
      phases.bytes -= static_cast<int64_t>(units.size()) * kUnit;
      phases.known.join(Clock({number}, machine->now++));
      end_if_complete(phases);
    });
    if (draw() & 1) one_arrives();
  }
}

void store_tile(const TileMap& map, const unsigned char* from, int byte, int row, Where where) {
  check_tile("store_tile", from, map, byte, where);
  const auto act = [=] {
    each_unit(map, byte, row, [&](int r, int b, const unsigned char* to, size_t bytes) {
      if (bytes == 0) return;
      const unsigned char* unit = in_tile(const_cast<unsigned char*>(from), map, r, b);
      access_beside(unit, kUnit, where);
      each_part(to, bytes,
                [&](const unsigned char* part, size_t size) { access(Access::kTileCopy, part, size, where); });
      count_tile(Access::kTileCopy, to, bytes);
      std::memcpy(const_cast<unsigned char*>(to), unit, bytes);
    });
  };
  here().tile_stores.push_back({here().tile_group, act});
  if (draw() & 1) finish(here().tile_stores, here().tile_group + 1);
}

bool one_arrives() {
  auto& arriving = machine->arriving;
  if (arriving.empty()) return false;
  std::swap(arriving[draw() % arriving.size()], arriving.back());
  const std::function<void()> act = std::move(arriving.back());
  arriving.pop_back();
  act();
  return true;
}

void finish(std::vector<Deferred>& all, uint64_t groups) {
  while (!all.empty() && all.front().group < groups) {
    const std::function<void()> act = std::move(all.front().act);
    all.erase(all.begin());
    act();
  }
}

void start_product(const Threads& warp, std::function<void()> act) {
  Thread& first = *warp[0];
  first.products.push_back({first.product_group, std::move(act)});
  if (draw() & 1) finish(first.products, first.product_group + 1);
}

}  // namespace burnish::host
