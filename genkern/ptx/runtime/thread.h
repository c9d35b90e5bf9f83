// What a translated kernel sees of the machine: its thread, memory, barriers and its warp.
//
// A PTX thread is a fiber: a function on a stack of its own that hands the processor on when it
// waits. Shared and local memory have windows in the generic address space far above any pointer.
#pragma once

#include "types.h"

namespace ptx {

constexpr u64 shared_window = u64(1) << 56;
constexpr u64 local_window = u64(2) << 56;
constexpr u64 window_bytes = u64(1) << 32;
// Shared memory starts here, as on the hardware: address 0 is nobody's.
constexpr u32 shared_start = 1024;

// The order of FAULTS in errors.py.
enum class Fault : s32 {
  out_of_bounds,
  read_only,
  misaligned,
  uninitialised,
  divergence,
  absent_lane,
  race,
  deadlock,
  trap,
};

// plain: may not meet another thread's write. strong: volatile, relaxed, acquire or release; it may
// meet other strong accesses and atomics.
enum Access : u32 { plain, strong };

struct Thread {
  u32 tid[3], ntid[3], ctaid[3], nctaid[3];
  u32 index, lane, warp;  // in the block; in the warp; of the block
  s32 patience;           // backward jumps until another thread gets its turn
  u64 steps;              // instructions
  u32 carry;              // CC.CF
  u32 local_top;          // bytes of local memory that the called functions have taken
  const u64* symbols;     // addresses of the module's variables
  u32 shared_bytes, dynamic_bytes;
};

void fail(Thread&, u32 line, Fault, const char* format, ...)
    __attribute__((noreturn, format(printf, 4, 5)));

void exit_thread(Thread&) __attribute__((noreturn));

// Called on every 2^14th backward jump: others run, and a run-away kernel is stopped.
void take_turns(Thread&, u32 line);
inline void jump_back(Thread& t, u32 line) {
  if (__builtin_expect(--t.patience < 0, 0)) take_turns(t, line);
}

// Memory: each checks the access and gives the place of its bytes. A generic address may lie in
// any window. The line is the instruction's in the PTX.
const u8* read_global(Thread&, u64 address, u32 bytes, u32 line, Access);
u8* write_global(Thread&, u64 address, u32 bytes, u32 line, Access, const u8* data);
const u8* read_parameter(Thread&, u64 address, u32 bytes, u32 line);
const u8* read_shared(Thread&, u64 address, u32 bytes, u32 line, Access);
u8* write_shared(Thread&, u64 address, u32 bytes, u32 line, Access, const u8* data);
const u8* read_local(Thread&, u64 address, u32 bytes, u32 line, Access);
u8* write_local(Thread&, u64 address, u32 bytes, u32 line, Access, const u8* data);
const u8* read_generic(Thread&, u64 address, u32 bytes, u32 line, Access);
u8* write_generic(Thread&, u64 address, u32 bytes, u32 line, Access, const u8* data);
// An atomic reads and writes, and orders memory as its semantics say.
enum Semantics : u32 { relaxed = 0, acquire = 1, release = 2, acq_rel = 3 };
u8* atomic_global(Thread&, u64 address, u32 bytes, u32 line, Semantics);
u8* atomic_shared(Thread&, u64 address, u32 bytes, u32 line, Semantics);
u8* atomic_generic(Thread&, u64 address, u32 bytes, u32 line, Semantics);
void fence_device(Thread&, bool sequential = false);

template <class T>
inline T loaded(const u8* from) {
  T value;
  memcpy(&value, from, sizeof(value));
  return value;
}
template <class T>
inline void stored(u8* to, T value) {
  memcpy(to, &value, sizeof(value));
}

// A function's local memory: taken when it is called, given back when it returns.
u32 take_local(Thread&, u32 bytes, u32 alignment, u32 line);

// Asynchronous copies from global to shared memory, whose bytes appear at the wait.
void copy_async(Thread&, u64 to, u64 from, u32 bytes, u32 source_bytes, u32 line);
void commit_copies(Thread&);
void wait_for_copies(Thread&, u32 groups_left, bool uncommitted_too, u32 line);

// Barriers. count 0: all threads of the block. Reductions over the threads' predicates.
enum Reduction : u32 { no_reduction, all_of, any_of, count_of };
u32 barrier(Thread&, u32 id, u32 count, bool aligned, Reduction, bool value, u32 line);
void barrier_arrive(Thread&, u32 id, u32 count, bool aligned, u32 line);

// Instructions of a whole warp: the lanes that the mask names meet, the last computes for all.
void warp_barrier(Thread&, u32 mask, u32 line);
enum Shuffle : u32 { up, down, bfly, idx };
u32 shuffle(Thread&, Shuffle, u32 value, u32 lane, u32 clamp, u32 mask, bool* in_range, u32 line);
u32 vote_ballot(Thread&, bool value, u32 mask, u32 line);
u32 match_any(Thread&, u64 value, u32 mask, u32 line);
u32 match_all(Thread&, u64 value, u32 mask, bool* equal, u32 line);
enum Reduce : u32 { sum_u32, min_u32, max_u32, min_s32, max_s32, and_b32, or_b32, xor_b32 };
u32 reduce(Thread&, Reduce, u32 value, u32 mask, u32 line);
u32 reduce_f32(Thread&, u32 value, bool greatest, bool absolute_values, bool nan, u32 mask,
               u32 line);
u32 elect(Thread&, u32 mask, bool* elected, u32 line);

// Tensor cores and their loads; registers by their 32-bit words.
void load_matrices(Thread&, u64 address, u32 count, bool transposed, u32* out, u32 line);
void store_matrices(Thread&, u64 address, u32 count, bool transposed, const u32* in, u32 line);
enum Element : u32 { element_f16, element_bf16, element_tf32, element_f64 };
void multiply_matrices(Thread&, Element, u32 k, bool half_sums, const u32* a, const u32* b,
                       const u32* c, u32* d, u32 line);
void multiply_matrices_f64(Thread&, u32 m, u32 k, const u64* a, const u64* b, const u64* c, u64* d,
                           u32 line);

u64 clock_now();

}  // namespace ptx
