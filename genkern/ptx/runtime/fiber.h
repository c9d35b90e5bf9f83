// Switching between stacks. A fiber is nothing but a stack pointer; what the calling convention
// lets a function keep lies on its stack.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Goes on where `load` was saved; returns when somebody loads what it saved.
extern "C" void ptx_switch_stack(void** save, void* load);

namespace ptx {

// A stack that, when switched to, calls a function that never returns.
void* new_fiber(uint8_t* top, void (*start)());

}  // namespace ptx
