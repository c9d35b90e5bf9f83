// What the launch asks of the asynchronous copies.
#pragma once

#include "machine.h"

namespace ptx {

// The thread has ended, or the launch: nothing is in flight any more.
void forget_copies(Fiber&);

}  // namespace ptx
