// Counters of a launch. They do not depend on the order in which threads ran: the n-th access of each lane of a warp at
// one place in the source is one request, as on hardware where the warp runs it as one instruction.
#include <bit>
#include <set>
#include <unordered_set>

#include "cuda/host/machine.h"

namespace burnish::host {
namespace {

constexpr size_t kSector = 32, kBanks = 32;

// What the accesses of one instruction have in common.
struct Site {
  const Thread* warp;
  uintptr_t place;  // in the source
  bool shared;
  Access kind;
  auto operator<=>(const Site&) const = default;
};

// A lane's part of a request.
struct Part {
  unsigned lane;
  uintptr_t address;
  size_t bytes;
};

using Request = std::vector<Part>;

// What one instruction did: each lane's n-th access is part of its n-th request.
struct Requests {
  std::array<size_t, kWarp> turns;
  std::vector<Request> all;
};

struct Counters {
  std::string launch;  // in JSON, without what was counted
  std::map<std::string, uint64_t> count;
  std::unordered_set<uintptr_t> read, written;  // sectors
};

thread_local bool counting = false;
thread_local std::vector<Counters> launches;
thread_local std::map<Site, Requests> sites;

// The extra passes of a shared request: lanes go together as long as they make 128 bytes, and each bank gives one word.
uint64_t bank_conflicts(const Request& request) {
  const auto lanes = static_cast<unsigned>(128 / std::max<size_t>(4, request[0].bytes));
  std::map<unsigned, std::array<std::set<uintptr_t>, kBanks>> words;
  for (const Part& part : request) {
    for (uintptr_t word = part.address / 4; word * 4 < part.address + part.bytes; ++word) {
      words[part.lane / lanes][word % kBanks].insert(word);
    }
  }
  uint64_t extra = 0;
  for (const auto& [lane, banks] : words) {
    extra += std::ranges::max_element(banks, {}, &std::set<uintptr_t>::size)->size() - 1;
  }
  return extra;
}

void count_request(Counters& c, const Site& site, const Request& request) {
  // tiles are counted as wholes
  static constexpr const char* kNames[] = {"load", "load", "load", "load", "", "store", "copy", "", "atomic", "atomic"};
  const std::string name = say(site.shared ? "shared_" : "global_", kNames[static_cast<int>(site.kind)]);
  ++c.count[name + "_requests"];
  if (site.shared) {
    c.count["bank_conflicts"] += bank_conflicts(request);
    return;
  }
  std::set<uintptr_t> sectors;
  for (const Part& part : request) {
    c.count[name + "_bytes"] += part.bytes;
    sectors.insert(part.address / kSector);
  }
  c.count[name + "_sectors"] += sectors.size();
  if (site.kind != Access::kStore) c.read.insert(sectors.begin(), sectors.end());
  if (writes(site.kind)) c.written.insert(sectors.begin(), sectors.end());
}

}  // namespace

void set_counting(bool on) {
  counting = on;
  launches.clear();
}

std::string take_counters() {
  std::string text;
  for (const Counters& c : launches) {
    text += (text.empty() ? "" : ",\n") + c.launch;
    for (const auto& [name, value] : c.count) text += say(", \"", name, "\": ", value);
    text += "}";
  }
  launches.clear();
  return "[" + text + "]";
}

void count_launch() {
  sites.clear();
  if (!counting) return;
  const Launch& launch = *machine->launch;
  const auto list = [](const dim3& size) { return say('[', size.x, ", ", size.y, ", ", size.z, ']'); };
  Counters& c = launches.emplace_back();
  c.launch = say("{\"kernel\": \"", kernel_name(launch.kernel), "\", \"grid\": ", list(launch.grid),
                 ", \"block\": ", list(launch.block));
  c.count["shared_bytes"] = launch.shared_bytes;
}

void count_access(Access kind, bool shared, const void* address, size_t bytes, Where where) {
  if (!counting || kind == Access::kTileLoad || kind == Access::kTileCopy) return;
  auto& [turns, all] = sites[{&here() - lane(), std::bit_cast<uintptr_t>(where), shared, kind}];
  const size_t turn = turns[lane()]++;
  if (turn == all.size()) all.emplace_back();
  all[turn].push_back({lane(), reinterpret_cast<uintptr_t>(address), bytes});
}

void count_tile(Access kind, const void* address, size_t bytes) {
  if (!counting || bytes == 0) return;
  Counters& c = launches.back();
  c.count[writes(kind) ? "tile_store_bytes" : "tile_load_bytes"] += bytes;
  const auto first = reinterpret_cast<uintptr_t>(address);
  auto& sectors = writes(kind) ? c.written : c.read;
  for (uintptr_t sector = first / kSector; sector * kSector < first + bytes; ++sector) sectors.insert(sector);
}

void count_event(const char* name) {
  if (counting) ++launches.back().count[name];
}

void count_blocks() {
  if (!counting) return;
  Counters& c = launches.back();
  for (const auto& [site, requests] : sites) {
    for (const Request& request : requests.all) count_request(c, site, request);
  }
  sites.clear();
  c.count["read_bytes"] = c.read.size() * kSector;
  c.count["written_bytes"] = c.written.size() * kSector;
}

}  // namespace burnish::host
