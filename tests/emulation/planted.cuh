// How the tests call kernels with planted bugs: a file of them includes this, and defines Bug and run().
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace burnish {
namespace {

enum class Bug : int;

struct Call {
  const void *a, *b;
  void *y, *scratch;
  Bug bug;

  template <class T>
  const T* in(const void* data) const {
    return static_cast<const T*>(data);
  }
  template <class T>
  T* out(void* data) const {
    return static_cast<T*>(data);
  }
};

void run(const char* name, const Call& c);

}  // namespace
}  // namespace burnish

#define EXPORT extern "C" __attribute__((visibility("default")))

// Runs kernel `name` with a seed; a message where the emulation stopped it, else null. `scratch` holds zeros.
EXPORT const char* run_planted(const char* name, int bug, uint64_t seed, const void* a, const void* b, void* y,
                               void* scratch) {
  static char message[2048];
  burnish::host::set_seed(seed);
  try {
    burnish::run(name, {a, b, y, scratch, static_cast<burnish::Bug>(bug)});
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
  return nullptr;
}

// Counts what `name` does in one run, as JSON.
EXPORT const char* count_planted(const char* name, uint64_t seed, const void* a, const void* b, void* y,
                                 void* scratch) {
  static std::string counters;
  burnish::host::set_counting(true);
  const char* message = run_planted(name, 0, seed, a, b, y, scratch);
  counters = burnish::host::take_counters();
  burnish::host::set_counting(false);
  return message != nullptr ? message : counters.c_str();
}
