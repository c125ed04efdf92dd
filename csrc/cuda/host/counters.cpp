// Counters of a launch. They do not depend on the order in which threads ran: the n-th access of each lane of a warp at
// one place in the source is one request, as on hardware where the warp runs it as one instruction.
#include <algorithm>
#include <bit>
#include <map>
#include <set>
#include <sstream>
#include <tuple>
#include <unordered_set>

#include "cuda/host/machine.h"
#include "cuda/host/state.h"

namespace burnish::host {
namespace {

constexpr size_t kSector = 32;
constexpr size_t kBanks = 32;

// One lane's part of a request: its `turn`-th access at this place.
struct Part {
  unsigned warp;
  uintptr_t place;  // in the source
  bool shared;
  Access kind;
  unsigned lane, turn;
  uintptr_t address;
  size_t bytes;

  auto site() const { return std::tie(warp, place, shared, kind); }
  auto request() const { return std::tuple_cat(site(), std::tie(turn)); }
};

struct Counters {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;
  std::map<std::string, uint64_t> count;
  std::unordered_set<uintptr_t> read, written;  // sectors
};

thread_local bool counting = false;
thread_local std::vector<Counters> launches;
thread_local std::vector<Part> parts;

// The extra passes of a shared request: lanes go together as long as they make 128 bytes, and each bank gives one word.
uint64_t bank_conflicts(const Part* from, const Part* to) {
  const auto group = static_cast<unsigned>(128 / std::max<size_t>(4, from->bytes));
  uint64_t extra = 0;
  while (from != to) {
    std::set<uintptr_t> banks[kBanks];
    const unsigned first = from->lane / group;
    for (; from != to && from->lane / group == first; ++from) {
      for (uintptr_t word = from->address / 4; word * 4 < from->address + from->bytes; ++word) {
        banks[word % kBanks].insert(word);
      }
    }
    size_t passes = 1;
    for (const auto& bank : banks) passes = std::max(passes, bank.size());
    extra += passes - 1;
  }
  return extra;
}

void count_request(Counters& c, const Part* from, const Part* to) {
  static constexpr const char* kNames[] = {"load", "load", "load", "load", "store", "copy", "atomic", "atomic"};
  const std::string name = (from->shared ? "shared_" : "global_") + std::string(kNames[static_cast<int>(from->kind)]);
  ++c.count[name + "_requests"];
  if (from->shared) {
    c.count["bank_conflicts"] += bank_conflicts(from, to);
    return;
  }
  std::set<uintptr_t> sectors;
  for (const Part* part = from; part != to; ++part) {
    c.count[name + "_bytes"] += part->bytes;
    sectors.insert(part->address / kSector);
  }
  c.count[name + "_sectors"] += sectors.size();
  if (from->kind != Access::kStore) c.read.insert(sectors.begin(), sectors.end());
  if (from->kind >= Access::kStore) c.written.insert(sectors.begin(), sectors.end());
}

}  // namespace

void set_counting(bool on) {
  counting = on;
  launches.clear();
}

std::string take_counters() {
  std::ostringstream out;
  out << "[";
  const auto size = [](const dim3& d) {
    return std::string("[") + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]";
  };
  for (const Counters& c : launches) {
    out << (&c == launches.data() ? "" : ",\n") << "{\"kernel\": \"" << c.kernel << "\", \"grid\": " << size(c.grid)
        << ", \"block\": " << size(c.block) << ", \"shared_bytes\": " << c.shared_bytes;
    for (const auto& [name, value] : c.count) out << ", \"" << name << "\": " << value;
    out << ", \"read_bytes\": " << c.read.size() * kSector << ", \"written_bytes\": " << c.written.size() * kSector
        << "}";
  }
  out << "]";
  launches.clear();
  return out.str();
}

void count_launch(const Launch& launch) {
  parts.clear();
  if (!counting) return;
  launches.push_back({kernel_name(launch.kernel), launch.grid, launch.block, launch.shared_bytes, {}, {}, {}});
}

void count_access(Access kind, bool shared, const void* address, size_t bytes, Where where) {
  if (!counting) return;
  const unsigned warps = (machine->block_threads + kWarp - 1) / kWarp, warp = in_own_block() / kWarp;
  parts.push_back({here().block * warps + warp, std::bit_cast<uintptr_t>(where), shared, kind, lane(), 0,
                   reinterpret_cast<uintptr_t>(address), bytes});
}

void count_event(const char* name) {
  if (counting) ++launches.back().count[name];
}

void count_blocks() {
  if (!counting) return;
  // a lane's accesses at one place are in its program's order: number them, then bring the warp's lanes together
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
    return std::tuple_cat(a.site(), std::tie(a.lane)) < std::tuple_cat(b.site(), std::tie(b.lane));
  });
  for (size_t i = 1; i < parts.size(); ++i) {
    const Part& before = parts[i - 1];
    if (before.site() == parts[i].site() && before.lane == parts[i].lane) parts[i].turn = before.turn + 1;
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.request() < b.request(); });
  for (auto from = parts.begin(); from != parts.end();) {
    const auto to =
        std::find_if(from, parts.end(), [&](const Part& part) { return part.request() != from->request(); });
    count_request(launches.back(), &*from, &*from + (to - from));
    from = to;
  }
  parts.clear();
}

}  // namespace burnish::host
