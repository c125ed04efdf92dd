#include "cuda/host/fiber.h"

#include <cstdint>

#if !defined(__x86_64__)
#error "fibers are written for x86-64"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// Saves the registers that the System V ABI asks a callee to preserve, swaps stacks, restores them.
extern "C" void burnish_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden burnish_switch_stack
.globl burnish_switch_stack
.type burnish_switch_stack, @function
burnish_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size burnish_switch_stack, .-burnish_switch_stack
)");

namespace burnish::host {
namespace {

thread_local Context* running_from = nullptr;  // who switched here last: AddressSanitizer reports its stack

}  // namespace

void switch_context(Context& from, Context& to, bool last) {
  running_from = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#else
  (void)last;
#endif
  burnish_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, &running_from->stack, &running_from->stack_bytes);
#endif
}

void begin_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
  context.stack = stack;
  context.stack_bytes = bytes;
  context.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);  // whoever had the stack before never returned
#endif
  auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, padding: aligned as by a call
  for (int i = 0; i < 6; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  frame[7] = nullptr;
  context.stack_pointer = frame;
}

void entered_context() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &running_from->stack, &running_from->stack_bytes);
#endif
}

}  // namespace burnish::host
