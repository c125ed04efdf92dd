// parallel_for over torch's threads, which also works in a child forked after the threads were started.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

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

}  // namespace burnish
