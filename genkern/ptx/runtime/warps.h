// Instructions that several lanes of a warp execute together.
//
// Each lane brings a request and waits; the last of the lanes that the mask names computes for all
// of them. They order nothing in memory, bar.warp.sync alone does.
#pragma once

#include "machine.h"

namespace ptx {

// kind: which instruction with which qualifiers; all lanes must agree on it.
struct Request {
  u32 kind, mask, line;
  bool aligned;  // all lanes must be at the same instruction
};

enum Kind : u32 {
  kind_barrier,
  kind_shuffle,
  kind_vote,
  kind_match,
  kind_reduce,
  kind_elect,
  kind_load_matrices,
  kind_store_matrices,
  kind_multiply,
};
inline u32 kind_of(Kind kind, u32 qualifiers) { return u32(kind) << 24 | qualifiers; }

// lanes[i]: the request of lane i, for the lanes in the mask. `compute` runs once.
void meet(Fiber&, Request&, void (*compute)(Request** lanes, u32 mask, Fiber& last));

void reset_warps();
// Nobody can go on and somebody waits for lanes that do not come: says which.
[[noreturn]] void report_lanes(Fiber& waiting);

}  // namespace ptx
