// Memory that a thread keeps, under AddressSanitizer: touches what it must not, by the name of the deed, and is to be
// stopped; without a name it touches what it may.
#include "cpu/scratch.h"

#include <cmath>
#include <string>

int main(int count, char** arguments) {
  const std::string deed = count > 1 ? arguments[1] : "";
  burnish::Scratch scratch;
  scratch.reserve(1 << 20);  // an earlier call needed more
  scratch.reserve(2 * burnish::Scratch::bytes<float>(16));
  volatile float* first = scratch.take<float>(16);
  volatile float* second = scratch.take<float>(15);
  const bool unwritten = std::isnan(second[0]);
  first[15] = 1.0f;
  second[14] = 1.0f;
  if (deed == "between") first[16] = 1.0f;
  if (deed == "beyond") second[15] = 1.0f;
  if (deed == "unreserved") scratch.take<float>(1);
  scratch.reserve(2 * burnish::Scratch::bytes<float>(16));
  if (deed == "stale") second[0] = 1.0f;
  return unwritten ? 0 : 1;
}
