// The switch itself: assembly for x86-64 and aarch64, ucontext elsewhere.
#include "fiber.h"

#if defined(__x86_64__)

asm(R"(
.text
.p2align 4
.globl ptx_switch_stack
.hidden ptx_switch_stack
.type ptx_switch_stack, @function
ptx_switch_stack:
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
.size ptx_switch_stack, .-ptx_switch_stack
)");

namespace ptx {
constexpr int kept_words = 6;

void* new_fiber(uint8_t* top, void (*start)()) {
  uint64_t* sp = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--sp = 0;  // a return address that is never used; it also aligns the stack
  *--sp = reinterpret_cast<uint64_t>(start);
  for (int i = 0; i < kept_words; ++i) *--sp = 0;
  return sp;
}
}  // namespace ptx

#elif defined(__aarch64__)

asm(R"(
.text
.p2align 4
.globl ptx_switch_stack
.hidden ptx_switch_stack
.type ptx_switch_stack, %function
ptx_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size ptx_switch_stack, .-ptx_switch_stack
)");

namespace ptx {
void* new_fiber(uint8_t* top, void (*start)()) {
  uint64_t* sp = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  sp -= 20;
  for (int i = 0; i < 20; ++i) sp[i] = 0;
  sp[11] = reinterpret_cast<uint64_t>(start);  // x30, where `ret` goes
  return sp;
}
}  // namespace ptx

#else

#include <ucontext.h>

#include <new>

// The stack pointer is that of a ucontext_t at the top of the fiber's stack.
extern "C" void ptx_switch_stack(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

namespace ptx {
void* new_fiber(uint8_t* top, void (*start)()) {
  constexpr size_t room = 64 * 1024;
  ucontext_t* context = reinterpret_cast<ucontext_t*>(
      (reinterpret_cast<uintptr_t>(top) - sizeof(ucontext_t)) & ~uintptr_t(63));
  getcontext(context);
  context->uc_stack.ss_sp = reinterpret_cast<uint8_t*>(context) - room;
  context->uc_stack.ss_size = room;
  context->uc_link = nullptr;
  makecontext(context, start, 0);
  return context;
}
}  // namespace ptx

#endif
