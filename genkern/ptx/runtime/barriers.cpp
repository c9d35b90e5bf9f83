// bar.sync and its kin: who has come, who is missing, and what a barrier orders.
#include "barriers.h"

#include "machine.h"

namespace ptx {

namespace {

struct Arrival {
  Fiber* thread;
  u32 line;
  bool waits;
};

struct Barrier {
  u32 expected = 0;
  bool aligned = false;
  Reduction reduction = no_reduction;
  u32 true_values = 0;
  std::vector<Arrival> arrivals;
  std::vector<u16> joined;  // what the threads knew that arrived without waiting
  u32 joined_generation = 0;
};

Barrier barriers[16];

// Every lane of a warp has come, and to the same instruction.
void check_aligned(const Barrier& barrier) {
  const u32 warps = (machine.threads + 31) / 32;
  static std::vector<u32> line_of, count_of_warp;
  line_of.assign(warps, 0);
  count_of_warp.assign(warps, 0);
  for (const Arrival& a : barrier.arrivals) {
    u32& line = line_of[a.thread->warp];
    if (line && line != a.line)
      fail(*a.thread, a.line, Fault::divergence,
           "lanes of one warp meet at a barrier in different places, PTX lines %u and %u", line,
           a.line);
    line = a.line;
    ++count_of_warp[a.thread->warp];
  }
  for (const Arrival& a : barrier.arrivals) {
    const u32 lanes = std::min(32u, machine.threads - 32 * a.thread->warp);
    if (count_of_warp[a.thread->warp] != lanes)
      fail(*a.thread, a.line, Fault::divergence,
           "%u of the %u lanes of a warp came to the barrier; it needs all of them",
           count_of_warp[a.thread->warp], lanes);
  }
}

void join(std::vector<u16>& joined, Fiber& t) {
  const u16* known = knowledge(t);
  for (u32 i = 0; i < machine.threads; ++i) joined[i] = std::max(joined[i], known[i]);
  joined[t.index] = std::max(joined[t.index], u16(t.tick + 1));
}

void order_some(Barrier& barrier) {
  if (barrier.joined_generation != machine.generation) {
    barrier.joined.assign(machine.threads, 0);
    barrier.joined_generation = machine.generation;
  }
  for (const Arrival& a : barrier.arrivals)
    if (a.waits) join(barrier.joined, *a.thread);
  for (const Arrival& a : barrier.arrivals) {
    if (!a.waits) continue;
    std::copy(barrier.joined.begin(), barrier.joined.end(), knowledge(*a.thread));
    ++a.thread->tick;
  }
}

void order_all() {
  ++machine.generation;
  for (Fiber& t : machine.fibers) t.tick = 0;
}

void complete(Barrier& barrier, Fiber& last) {
  if (barrier.aligned) check_aligned(barrier);
  u32 waiting = 0;
  for (const Arrival& a : barrier.arrivals) waiting += a.waits;
  if (waiting == machine.threads)
    order_all();
  else
    order_some(barrier);
  const u32 result = barrier.reduction == all_of   ? barrier.true_values == waiting
                     : barrier.reduction == any_of ? barrier.true_values != 0
                                                   : barrier.true_values;
  machine.turns = 0;
  for (const Arrival& a : barrier.arrivals) {
    a.thread->barrier_result = result;
    if (a.waits && a.thread != &last) make_ready(*a.thread);
  }
  barrier.arrivals.clear();
  barrier.expected = 0;
  barrier.true_values = 0;
}

Barrier& arrive(Fiber& t, u32 id, u32 count, bool aligned, Reduction reduction, bool value,
                bool waits, u32 line) {
  if (id > 15) fail(t, line, Fault::trap, "there are barriers 0 to 15, not %u", id);
  if (count % 32 && count)
    fail(t, line, Fault::trap, "a barrier's count of threads is a multiple of 32, not %u", count);
  Barrier& barrier = barriers[id];
  const u32 expected = count ? count : machine.threads;
  if (barrier.arrivals.empty()) {
    barrier.expected = expected, barrier.aligned = aligned, barrier.reduction = reduction;
  } else if (barrier.expected != expected || (barrier.reduction != reduction && waits)) {
    fail(t, line, Fault::divergence,
         "waits at barrier %u for %u threads where %s, in PTX line %u, waits for %u", id, expected,
         name_of(barrier.arrivals[0].thread->index), barrier.arrivals[0].line, barrier.expected);
  }
  barrier.arrivals.push_back({&t, line, waits});
  barrier.true_values += value;
  ++machine.launch->barriers;
  return barrier;
}

}  // namespace

u32 barrier(Thread& thread, u32 id, u32 count, bool aligned, Reduction reduction, bool value,
            u32 line) {
  Fiber& t = fiber(thread);
  Barrier& barrier = arrive(t, id, count, aligned, reduction, value, true, line);
  if (barrier.arrivals.size() == barrier.expected) {
    complete(barrier, t);
    make_ready(t);  // its turn comes with the others'
    suspend(t);
  } else {
    t.state = State::at_barrier;
    t.waits_at_barrier = u8(id), t.waits_in_line = line;
    suspend(t);
  }
  return t.barrier_result;
}

void barrier_arrive(Thread& thread, u32 id, u32 count, bool aligned, u32 line) {
  Fiber& t = fiber(thread);
  Barrier& barrier = arrive(t, id, count, aligned, no_reduction, false, false, line);
  if (barrier.joined_generation != machine.generation) {
    barrier.joined.assign(machine.threads, 0);
    barrier.joined_generation = machine.generation;
  }
  join(barrier.joined, t);
  ++t.tick;
  if (barrier.arrivals.size() == barrier.expected) complete(barrier, t);
}

void reset_barriers() {
  for (Barrier& barrier : barriers) {
    barrier.arrivals.clear();
    barrier.expected = barrier.true_values = barrier.joined_generation = 0;
  }
}

void report_barrier(u32 id) {
  const Barrier& barrier = barriers[id];
  for (Fiber& t : machine.fibers) {
    if (t.state == State::at_barrier && t.waits_at_barrier == id) continue;
    const char* where = t.state == State::done         ? "has exited"
                        : t.state == State::at_barrier ? "waits at another barrier"
                                                       : "waits for lanes of its warp";
    const Arrival& first = barrier.arrivals[0];
    fail(*first.thread, first.line, Fault::divergence,
         "waits at barrier %u for %u threads and %zu came: %s %s%s", id, barrier.expected,
         barrier.arrivals.size(), name_of(t.index), where,
         t.state == State::done ? "" : " in line ");
  }
  const Arrival& first = barrier.arrivals[0];
  fail(*first.thread, first.line, Fault::divergence,
       "waits at barrier %u for %u threads and %zu came", id, barrier.expected,
       barrier.arrivals.size());
}

}  // namespace ptx
