// Which instruction set runs: the best that the CPU and the operating system have, or a lower one that
// BURNISH_CPU_ISA=generic|avx2|avx512 asks for. Decided once, at the first op. avx512 is F, BW, VL, DQ, VNNI, BF16,
// VBMI and VBMI2, as Zen 4 and Sapphire Rapids have them; a processor that lacks one of these takes avx2.
#pragma once

#include "cpu/kernels.h"

namespace burnish {

enum class Isa { generic, avx2, avx512 };

template <Isa isa>
const Kernels& kernels_of();

// The chosen level's kernels. Throws, naming the variable, when BURNISH_CPU_ISA holds another word or a level that this
// CPU lacks.
const Kernels& kernels();

}  // namespace burnish
