// Steps that are checked and wait until those of an optimizer's other groups are: all are done, or none.
#pragma once

#include <functional>

namespace burnish {

// Does a step, or keeps it where this thread holds steps. Its tensors live until those are released.
void do_step(std::function<void()> step);

}  // namespace burnish
