// BURNISH_CHECK(condition, parts...): throws std::runtime_error with the parts as one sentence, nothing before it: what
// a user reads begins with the op's name. PyTorch turns it into RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace burnish {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace burnish

#define BURNISH_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) [[unlikely]]    \
      burnish::fail(__VA_ARGS__);     \
  } while (false)
