// parallel_for over torch's threads, which also works in a child forked after the threads were started.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace burnish {

// Whether this process was forked after parallel_for first ran. An OpenMP pool does not survive a fork: using it again
// would wait forever for threads that are not there, as torch's own ops then do. Work runs on one thread instead.
bool lost_threads();
void note_parallel_region();

// f(begin, end) over shares of [begin, end) that are at least `grain` long. Results may not depend on the split.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (lost_threads()) {
    if (begin < end) f(begin, end);
    return;
  }
  note_parallel_region();
  torch::stable::parallel_for(begin, end, grain, f);
}

inline int64_t num_threads() { return lost_threads() ? 1 : torch::stable::get_num_threads(); }

// As parallel_for, in many shares that are at least `grain` long: each thread has a range of its own and, after it,
// helps the others with theirs, so that a core that is slow or busy elsewhere does not keep all waiting.
template <class F>
void balanced_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int64_t kShares = 16;  // of each thread
  const int64_t share = std::max(grain, (end - begin) / (kShares * num_threads()));
  const int64_t shares = (end - begin + share - 1) / share, threads = std::min(num_threads(), shares);
  std::vector<Range> ranges(static_cast<size_t>(std::max<int64_t>(0, threads)));
  for (int64_t i = 0; i < threads; ++i) {
    ranges[static_cast<size_t>(i)].next = begin + shares * i / threads * share;
    ranges[static_cast<size_t>(i)].end = std::min(end, begin + shares * (i + 1) / threads * share);
  }
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t turn = 0; turn < threads + last - first - 1; ++turn) {
      Range& range = ranges[static_cast<size_t>((first + turn) % threads)];
      int64_t at;
      while ((at = range.next.fetch_add(share, std::memory_order_relaxed)) < range.end) {
        f(at, std::min(at + share, range.end));
      }
    }
  });
}

}  // namespace burnish
