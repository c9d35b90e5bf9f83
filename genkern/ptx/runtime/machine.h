// One block of threads at a time: its fibers, who runs next, and the clocks that say what comes
// before what.
//
// Order in memory. `generation` counts the barriers that every thread of a block passed: what lies
// in an earlier generation comes before everything now. Inside a generation a thread counts its
// partial barriers (bar.warp.sync, named barriers) and its fences in `tick` and knows, in `known`,
// how many ticks of every other thread come before it: a vector clock.
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "thread.h"

namespace ptx {

// When and by whom a byte was touched.
struct Stamp {
  u32 generation;  // 0: never
  u16 thread, tick;
  u32 line : 30, access : 2;
};

enum class State : u8 { ready, at_barrier, in_warp, done };

struct PendingCopy {
  u64 to;
  const u8* from;
  u32 bytes, source_bytes, line;
};

using Ticks = std::shared_ptr<std::vector<u16>>;

// A fence publishes what its thread did in `generation` before the tick, what it knew of the others
// then, and all that came before that generation. Generation 0: there was none.
struct Fence {
  u32 generation = 0;
  u16 tick = 0;
  Ticks known;
  bool sequential = false;
};

struct Fiber : Thread {
  void* stack;
  State state;
  u8 waits_at_barrier;
  u32 waits_in_line, waits_for_mask;
  u32 barrier_result;
  u16 tick;
  u32 known_generation;  // `known` is all zero in any other one
  u16* known;
  Fence fence;  // the last one
  std::vector<PendingCopy> copies;
  std::vector<u32> groups;  // copies of each committed group, oldest first
};

struct Failure {
  s32 fault;  // -1: none
  u32 block[3], thread[3], line;
  char message[1000];
};

struct Buffer {
  u64 address, bytes;
  u64 writable;
  const char* name;
};

// The arguments of a launch, as execute.py fills them.
struct Launch {
  void (*kernel)(Thread&, const u8* parameters);
  const u8* parameters;
  u64 parameter_bytes;
  const u64* symbols;
  const Buffer* buffers;
  u64 buffer_count;
  const u32* holes;  // start and end of each, from shared_start: bytes that nobody may touch
  u64 hole_count;
  u32 grid[3], block[3];
  u32 static_bytes, dynamic_bytes;
  u64 stack_bytes, local_bytes;
  u64 schedule;  // 0 sequential, 1 reversed, else a seed
  u64 instructions, barriers, bytes_read, bytes_written;
  Failure failure;
};

struct Machine {
  Launch* launch = nullptr;
  void* stack = nullptr;  // the scheduler's, while a fiber runs
  Fiber* running = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready, next;
  size_t position = 0;
  u32 threads = 0, alive = 0;
  u32 generation = 1, block_start = 1;
  u64 turns = 0;  // taken since anything moved on
  u64 random = 0;
  u32 block_index = 0;
  u8* stacks = nullptr;
  u64 stacks_bytes = 0;
  std::vector<u16> known;
  std::vector<u8> local;
};

extern Machine machine;

inline Fiber& fiber(Thread& t) { return static_cast<Fiber&>(t); }

// Splitmix, so that a seed gives the same schedule everywhere.
inline u64 random_number() {
  u64 x = machine.random += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

template <class T>
void shuffle_order(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_number() % i]);
}

inline void arrange(std::vector<Fiber*>& fibers) {
  const auto by_index = [](const Fiber* a, const Fiber* b) { return a->index < b->index; };
  const auto backward = [](const Fiber* a, const Fiber* b) { return a->index > b->index; };
  const u64 schedule = machine.launch->schedule;
  if (schedule == 1) {
    if (!std::is_sorted(fibers.begin(), fibers.end(), backward))
      std::sort(fibers.begin(), fibers.end(), backward);
    return;
  }
  if (!std::is_sorted(fibers.begin(), fibers.end(), by_index))
    std::sort(fibers.begin(), fibers.end(), by_index);
  if (schedule > 1) shuffle_order(fibers);
}

inline Fiber* next_fiber() {
  Machine& m = machine;
  if (m.position == m.ready.size()) {
    m.ready.clear();
    m.position = 0;
    if (m.next.empty()) return nullptr;
    m.ready.swap(m.next);
    arrange(m.ready);
  }
  return m.ready[m.position++];
}

inline void make_ready(Fiber& t) {
  t.state = State::ready;
  machine.next.push_back(&t);
}

// Hands the processor on; returns when somebody has made this thread ready and it is its turn.
inline void suspend(Fiber& t) {
  Fiber* other = next_fiber();
  if (other == &t) return;
  machine.running = other;
  ptx_switch_stack(&t.stack, other ? other->stack : machine.stack);
}

inline bool comes_before(const Stamp& stamp, const Fiber& t) {
  if (stamp.generation != machine.generation) return true;
  if (stamp.thread == t.index) return true;
  return t.known_generation == machine.generation && t.known[stamp.thread] > stamp.tick;
}

inline Stamp stamp_of(const Fiber& t, u32 line, Access access) {
  Stamp stamp;
  stamp.generation = machine.generation;
  stamp.thread = u16(t.index);
  stamp.tick = t.tick;
  stamp.line = line;
  stamp.access = access;
  return stamp;
}

// What the thread knows of the others in this generation, zeroed at its first use.
inline u16* knowledge(Fiber& t) {
  if (t.known_generation != machine.generation) {
    std::fill(t.known, t.known + machine.threads, u16(0));
    t.known_generation = machine.generation;
  }
  return t.known;
}

// "thread (3, 0, 0)", for messages; a ring of texts so that one message may name several.
inline const char* name_of(u32 index) {
  static char texts[8][48];
  static int turn = 0;
  char* text = texts[turn++ & 7];
  const Fiber& t = machine.fibers[index];
  snprintf(text, sizeof(texts[0]), "thread (%u, %u, %u)", t.tid[0], t.tid[1], t.tid[2]);
  return text;
}

}  // namespace ptx
