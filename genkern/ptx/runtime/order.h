// What orders blocks: atomics on global memory, with fences around them.
#pragma once

#include "machine.h"

namespace ptx {

void reset_order();  // before a launch
void start_order();  // before a block

// A strong access to global memory: it learns what was published at the address, and publishes what
// its thread fenced. A store, unlike an atomic, replaces what was there.
void observe(Fiber&, u64 address, Semantics);
void publish(Fiber&, u64 address, Semantics, bool replaces);

}  // namespace ptx
