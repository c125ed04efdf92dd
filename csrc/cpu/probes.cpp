// What the library says of the machine: the instruction set in use, and measured ceilings for the bench.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace burnish {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string cpu_isa() { return kernels().name; }

// The sum over all threads of what `work` returns, a second, repeated for at least `millis`.
template <class F>
double rate(int64_t millis, const F& work) {
  const int64_t threads = num_threads();
  double total = 0.0;
  const Clock::time_point start = Clock::now();
  do {
    std::atomic<int64_t> done{0};
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) done += static_cast<int64_t>(work(thread, threads));
    });
    total += static_cast<double>(done.load());
  } while (seconds_since(start) * 1e3 < static_cast<double>(millis));
  return total / seconds_since(start);
}

// Bytes that a streaming read walks over: beyond any cache.
constexpr int64_t kReadBytes = int64_t{256} << 20;

struct Free {
  void operator()(char* block) const { std::free(block); }
};

double read_rate(int64_t millis) {
  static const std::unique_ptr<char, Free> block = [] {
    std::unique_ptr<char, Free> memory(static_cast<char*>(std::aligned_alloc(4096, kReadBytes)));
    if (memory != nullptr) std::memset(memory.get(), 1, kReadBytes);  // real pages, not the shared zero page
    return memory;
  }();
  BURNISH_CHECK(block != nullptr, "cpu_peak: no memory for the ", kReadBytes >> 20, " MiB that 'read' walks over");
  static std::atomic<uint64_t> sink;
  return rate(millis, [&](int64_t thread, int64_t threads) {
    const int64_t share = kReadBytes / threads / 4096 * 4096;
    sink += kernels().read(block.get() + thread * share, share);
    return static_cast<double>(share);
  });
}

// Operations (multiply and add count two) or bytes a second over all of torch's threads: kind is int8, bf16, fp32 or
// read.
double cpu_peak(const std::string& kind, int64_t millis) {
  BURNISH_CHECK(millis > 0, "cpu_peak: millis is ", millis, ", expected more than 0");
  if (kind == "read") return read_rate(millis);
  const Kernels& level = kernels();
  const auto peak = kind == "int8"   ? level.peak_int8
                    : kind == "fp32" ? level.peak_fp32
                    : kind == "bf16" ? level.peak_bf16
                                     : nullptr;
  BURNISH_CHECK(peak != nullptr, "cpu_peak: kind is '", kind, "', expected int8, bf16, fp32 or read");
  return rate(millis, [&](int64_t, int64_t) { return peak(200000); });
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&burnish::cpu_isa));
  m.impl("cpu_peak", TORCH_BOX(&burnish::cpu_peak));
}
