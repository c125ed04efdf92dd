#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>

namespace burnish {
namespace {

std::atomic<bool> started{false};
std::atomic<bool> lost{false};

const int registered = pthread_atfork(nullptr, nullptr, [] { lost = started.load(); });

}  // namespace

bool lost_threads() { return lost.load(std::memory_order_relaxed); }

void note_parallel_region() {
  (void)registered;
  if (!started.load(std::memory_order_relaxed)) started = true;
}

}  // namespace burnish
