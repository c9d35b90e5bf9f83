// What the launch asks of the barriers.
#pragma once

#include "types.h"

namespace ptx {

void reset_barriers();
// Nobody can go on and somebody waits at this barrier: says who is missing.
[[noreturn]] void report_barrier(u32 id);

}  // namespace ptx
