#include "cuda/host/fiber.h"

#include <cstdint>

#if !defined(__x86_64__)
#error "fibers are written for x86-64"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(stack, bytes)
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace burnish::host {
namespace {

thread_local Context* running_from = nullptr;  // who switched here last: AddressSanitizer reports its stack

// Saves the registers that the System V ABI asks a callee to preserve, swaps stacks, restores them.
[[gnu::naked, gnu::noinline]] void switch_stack(void** /*save*/, void* /*load*/) {
  asm(R"(
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
  )");
}

}  // namespace

void switch_context(Context& from, Context& to, bool last) {
  running_from = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  switch_stack(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(from.fake_stack, &running_from->stack, &running_from->stack_bytes);
}

void begin_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);  // whoever had the stack before never returned
  auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, padding: aligned as by a call
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  context = {frame, stack, bytes, nullptr};
}

void entered_context() { __sanitizer_finish_switch_fiber(nullptr, &running_from->stack, &running_from->stack_bytes); }

}  // namespace burnish::host
