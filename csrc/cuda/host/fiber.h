// Fibers: contexts with a stack of their own, switched by saving the registers that a call preserves. No system call.
#pragma once

#include <cstddef>

namespace burnish::host {

// Where a suspended context left off: its stack pointer, and what AddressSanitizer must know of its stack.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Suspends `from` and resumes `to`; returns when something resumes `from`. A context that is never resumed gives up its
// fake stack with `last`.
void switch_context(Context& from, Context& to, bool last = false);

// A context that begins in entry(); it must never return from there.
void begin_context(Context& context, void* stack, size_t bytes, void (*entry)());

// To be called first thing in entry().
void entered_context();

}  // namespace burnish::host
