// What is known of the order of accesses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

namespace burnish::host {

// For every thread of a launch, by its number, up to which time its accesses come before what the clock's holder does
// next. Neighbours are mostly known up to the same time: kept are the numbers where the time changes.
class Clock {
 public:
  Clock() = default;

  // Knows these threads, in ascending order, up to `time`.
  Clock(const std::vector<uint32_t>& threads, uint64_t time) {
    for (const uint32_t thread : threads) {
      if (!steps_.empty() && steps_.back().first == thread) {
        steps_.pop_back();
      } else {
        steps_.emplace_back(thread, time);
      }
      steps_.emplace_back(thread + 1, 0);
    }
  }

  uint64_t operator[](uint32_t thread) const {
    const auto after = std::upper_bound(steps_.begin(), steps_.end(), Step(thread, ~uint64_t{0}));
    return after == steps_.begin() ? 0 : std::prev(after)->second;
  }

  // Takes up what `other` knows.
  void join(const Clock& other) {
    std::vector<Step> all;
    std::merge(steps_.begin(), steps_.end(), other.steps_.begin(), other.steps_.end(), std::back_inserter(all));
    for (auto& [thread, time] : all) time = std::max((*this)[thread], other[thread]);
    const auto same_time = [](const Step& a, const Step& b) { return a.second == b.second; };
    all.erase(std::unique(all.begin(), all.end(), same_time), all.end());
    steps_ = std::move(all);
  }

 private:
  using Step = std::pair<uint32_t, uint64_t>;  // from which thread on, up to which time
  std::vector<Step> steps_;
};

}  // namespace burnish::host
