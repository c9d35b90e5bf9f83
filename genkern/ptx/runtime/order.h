// What orders blocks: atomics on global memory, with fences around them.
#pragma once

#include "machine.h"

namespace ptx {

void reset_order();  // before a launch
void start_order();  // before a block

}  // namespace ptx
