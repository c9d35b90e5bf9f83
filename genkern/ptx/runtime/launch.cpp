// A launch: its memory, its blocks one after another, and the word for what went wrong.
#include <time.h>

#include "barriers.h"
#include "copies.h"
#include "memory.h"
#include "order.h"
#include "warps.h"

namespace ptx {

Machine machine;

namespace {

constexpr s32 patience = 1 << 14;       // backward jumps
constexpr u64 patience_of_all = 20000;  // turns in which nobody exits or passes a barrier

void finish(Fiber& t) {
  forget_copies(t);
  t.state = State::done;
  machine.turns = 0;
  --machine.alive;
  Fiber* other = next_fiber();
  machine.running = other;
  void* never;
  ptx_switch_stack(&never, other ? other->stack : machine.stack);
}

void start_fiber() {
  Fiber& t = *machine.running;
  machine.launch->kernel(t, machine.launch->parameters);
  finish(t);
}

void prepare(const Launch& launch) {
  Machine& m = machine;
  m.threads = launch.block[0] * launch.block[1] * launch.block[2];
  m.fibers.clear();
  m.fibers.resize(m.threads);
  m.known.assign(size_t(m.threads) * m.threads, 0);
  m.local.assign(launch.local_bytes * m.threads, 0);
  m.generation = m.block_start = 1;
  m.random = launch.schedule;
  // Stacks a little apart from multiples of a page, or they would share the lines of the cache.
  const u64 stack = launch.stack_bytes + 64 * 61;
  if (m.stacks_bytes < stack * m.threads) {
    if (m.stacks) munmap(m.stacks, m.stacks_bytes);
    m.stacks_bytes = stack * m.threads;
    m.stacks = static_cast<u8*>(mmap(nullptr, m.stacks_bytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  for (u32 i = 0; i < m.threads; ++i) {
    Fiber& t = m.fibers[i];
    t.index = i, t.lane = i % 32, t.warp = i / 32;
    const u32 size[3] = {launch.block[0], launch.block[1], launch.block[2]};
    t.tid[0] = i % size[0], t.tid[1] = i / size[0] % size[1], t.tid[2] = i / size[0] / size[1];
    for (int axis = 0; axis < 3; ++axis)
      t.ntid[axis] = size[axis], t.nctaid[axis] = launch.grid[axis];
    t.symbols = launch.symbols;
    t.known = m.known.data() + size_t(i) * m.threads;
    t.shared_bytes = launch.static_bytes + launch.dynamic_bytes;
    t.dynamic_bytes = launch.dynamic_bytes;
  }
}

void prepare_memory(const Launch& launch) {
  memory.writable.clear();
  memory.read_only.clear();
  memory.last = nullptr;
  const auto by_address = [](const Region& a, const Region& b) { return a.address < b.address; };
  for (u64 i = 0; i < launch.buffer_count; ++i) {
    const Buffer& b = launch.buffers[i];
    if (b.bytes == 0) continue;
    (b.writable ? memory.writable : memory.read_only)
        .push_back({b.address, b.bytes, b.name, nullptr});
  }
  std::sort(memory.writable.begin(), memory.writable.end(), by_address);
  std::sort(memory.read_only.begin(), memory.read_only.end(), by_address);
  const u64 shared = launch.static_bytes + launch.dynamic_bytes;
  memory.shared_end = shared_start + shared;
  memory.shared_pages.acquire(shared + 16);
  memory.shared_cell_pages.acquire((shared + 16) * sizeof(Cell));
  memory.shared = memory.shared_pages.start();
  memory.shared_cells = reinterpret_cast<Cell*>(memory.shared_cell_pages.start());
  for (u64 i = 0; i < launch.hole_count; ++i)
    for (u32 at = launch.holes[2 * i]; at < launch.holes[2 * i + 1]; ++at)
      memory.shared_cells[at].copying = nobody;
}

Fiber* stuck;
alignas(16) u8 report_stack[64 * 1024];
void report_fiber() {
  if (stuck->state == State::in_warp) report_lanes(*stuck);
  report_barrier(stuck->waits_at_barrier);
}
void report_stuck(Fiber& t) {
  stuck = &t;
  ptx_switch_stack(&machine.stack,
                   new_fiber(report_stack + sizeof(report_stack) - 64, report_fiber));
}

void run_block(u64 number) {
  Machine& m = machine;
  Launch& launch = *m.launch;
  m.block_index = u32(number);
  m.block_start = ++m.generation;
  m.alive = m.threads;
  m.turns = 0;
  m.ready.clear(), m.next.clear();
  m.position = 0;
  reset_barriers();
  reset_warps();
  start_order();
  const u64 stack = launch.stack_bytes + 64 * 61;
  for (Fiber& t : m.fibers) {
    t.ctaid[0] = u32(number % launch.grid[0]);
    t.ctaid[1] = u32(number / launch.grid[0] % launch.grid[1]);
    t.ctaid[2] = u32(number / launch.grid[0] / launch.grid[1]);
    t.patience = patience;
    t.local_top = 0, t.carry = 0, t.tick = 0, t.known_generation = 0, t.fence = {};
    u8* top = m.stacks + (t.index + 1) * stack - 64 * (t.index % 61);
    t.stack = new_fiber(top, start_fiber);
    make_ready(t);
  }
  m.running = next_fiber();
  ptx_switch_stack(&m.stack, m.running->stack);
  if (launch.failure.fault >= 0 || m.alive == 0) return;
  // Nobody is ready and somebody is left: the report is written as by a fiber, and comes back here.
  for (Fiber& t : m.fibers)
    if (t.state == State::in_warp) {
      report_stuck(t);
      return;
    }
  for (Fiber& t : m.fibers)
    if (t.state == State::at_barrier) {
      report_stuck(t);
      return;
    }
}

}  // namespace

void exit_thread(Thread& t) {
  finish(fiber(t));
  __builtin_unreachable();
}

void fail(Thread& t, u32 line, Fault fault, const char* format, ...) {
  Failure& failure = machine.launch->failure;
  failure.fault = s32(fault);
  for (int axis = 0; axis < 3; ++axis)
    failure.block[axis] = t.ctaid[axis], failure.thread[axis] = t.tid[axis];
  failure.line = line;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(failure.message, sizeof(failure.message), format, arguments);
  va_end(arguments);
  void* never;
  ptx_switch_stack(&never, machine.stack);
  __builtin_unreachable();
}

void take_turns(Thread& thread, u32 line) {
  Fiber& t = fiber(thread);
  t.patience = patience;
  if (++machine.turns > patience_of_all)
    fail(t, line, Fault::deadlock,
         "runs in circles: %llu backward jumps in this block and no thread exited or passed a "
         "barrier",
         (unsigned long long)(patience_of_all * u64(patience)));
  make_ready(t);
  suspend(t);
}

u64 clock_now() {
  u64 steps = 0;
  for (const Fiber& t : machine.fibers) steps += t.steps;
  return steps;
}

}  // namespace ptx

extern "C" int ptx_launch(ptx::Launch* launch) {
  using namespace ptx;
  machine.launch = launch;
  launch->failure.fault = -1;
  launch->instructions = launch->barriers = launch->bytes_read = launch->bytes_written = 0;
  prepare(*launch);
  prepare_memory(*launch);
  std::vector<Pages> shadows(memory.writable.size());
  for (size_t i = 0; i < shadows.size(); ++i) {
    shadows[i].acquire(memory.writable[i].bytes * sizeof(Cell));
    memory.writable[i].cells = reinterpret_cast<Cell*>(shadows[i].start());
  }
  reset_order();
  reader_sets.forget();
  const u64 blocks = u64(launch->grid[0]) * launch->grid[1] * launch->grid[2];
  std::vector<u64> order(blocks);
  for (u64 i = 0; i < blocks; ++i) order[i] = launch->schedule == 1 ? blocks - 1 - i : i;
  if (launch->schedule > 1) shuffle_order(order);
  for (u64 number : order) {
    run_block(number);
    if (launch->failure.fault >= 0) break;
  }
  for (Fiber& t : machine.fibers) {
    launch->instructions += t.steps;
    if (!t.copies.empty()) t.copies.clear();
  }
  memory.shared_pages.release();
  memory.shared_cell_pages.release();
  return launch->failure.fault;
}
