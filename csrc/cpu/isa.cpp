#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include "check.h"

namespace burnish {
namespace {

// GCC's builtin also asks the operating system (xgetbv) whether it saves the wide registers.
bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    case Isa::avx2:
      return avx2;
    default:
      return true;
  }
#else
  return isa == Isa::generic;
#endif
}

const Kernels& table(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return kernels_of<Isa::avx512>();
    case Isa::avx2:
      return kernels_of<Isa::avx2>();
    default:
      return kernels_of<Isa::generic>();
  }
}

const Kernels& choose() {
  constexpr Isa kLevels[] = {Isa::avx512, Isa::avx2, Isa::generic};
  const char* variable = std::getenv("BURNISH_CPU_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  for (const Isa isa : kLevels) {
    if (wanted.empty() ? has(isa) : wanted == table(isa).name) {
      BURNISH_CHECK(has(isa), "BURNISH_CPU_ISA is '", wanted, "', but this CPU or operating system lacks it");
      return table(isa);
    }
  }
  BURNISH_CHECK(false, "BURNISH_CPU_ISA is '", wanted, "', expected one of: generic, avx2, avx512");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace burnish
