// The element formats of float tensors.
#pragma once

#include <cstdint>

namespace burnish {

enum class Format : int { kFloat = 0, kBf16 = 1, kFp16 = 2 };

inline int64_t size_of(Format format) { return format == Format::kFloat ? 4 : 2; }

}  // namespace burnish
