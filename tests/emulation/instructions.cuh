// What the kernels that show an instruction have in common.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace burnish {
namespace {

// What a kernel reads and writes.
struct Data {
  const uint32_t *a, *b, *c;
  uint32_t* y;
};

Data data_of(const void* a, const void* b, const void* c, void* y) {
  const auto words = [](const void* data) { return static_cast<const uint32_t*>(data); };
  return {words(a), words(b), words(c), static_cast<uint32_t*>(y)};
}

// start(the instruction of this name) and wait for it; a message where that failed, else null.
template <class Start>
const char* attempt(const std::map<std::string, Start>& all, const char* name, uint64_t seed, const auto& start) {
  static char message[2048];
  try {
#ifndef __CUDACC__
    host::set_seed(seed);
#endif
    const auto found = all.find(name);
    if (found == all.end()) throw std::invalid_argument(std::string("no instruction is called ") + name);
    start(found->second);
#ifdef __CUDACC__
    (void)seed;
    check(cudaDeviceSynchronize(), name);
#endif
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
  return nullptr;
}

}  // namespace
}  // namespace burnish

#define EXPORT extern "C" __attribute__((visibility("default")))
