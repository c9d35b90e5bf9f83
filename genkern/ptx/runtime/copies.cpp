// cp.async: the bytes are in flight from the instruction to the wait that covers it. Until then the
// target may neither be read nor written; at the wait they appear, as a write of the thread.
#include "copies.h"

#include "memory.h"

namespace ptx {

namespace {

void land(Fiber& t, const PendingCopy& copy) {
  u8* to = memory.shared + (copy.to - shared_start);
  memcpy(to, copy.from, copy.source_bytes);
  memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  Cell* cell = memory.shared_cells + (copy.to - shared_start);
  const Stamp stamp = stamp_of(t, copy.line, plain);
  for (u32 i = 0; i < copy.bytes; ++i, ++cell) {
    --cell->copying;
    record_write(*cell, stamp);
  }
}

void land_first(Fiber& t, size_t count) {
  for (size_t i = 0; i < count; ++i) land(t, t.copies[i]);
  t.copies.erase(t.copies.begin(), t.copies.begin() + s64(count));
}

}  // namespace

void copy_async(Thread& thread, u64 to, u64 from, u32 bytes, u32 source_bytes, u32 line) {
  Fiber& t = fiber(thread);
  if (source_bytes > bytes)
    fail(t, line, Fault::trap, "cp.async of %u bytes with %u source bytes", bytes, source_bytes);
  check_alignment(t, from, bytes, line);
  const u8* source = nullptr;
  if (source_bytes) {
    const Region* region = find_region(from, source_bytes);
    if (!region) report_outside(t, from, source_bytes, line, "copies");
    if (region->cells) touch_for_read(t, *region, from, source_bytes, line, plain);
    source = reinterpret_cast<const u8*>(from);
    machine.launch->bytes_read += source_bytes;
  }
  if (to - shared_window < window_bytes) to -= shared_window;
  shared_place(t, to, bytes, line, "copies");
  touch_shared_for_write(t, to, bytes, line, plain, nullptr);
  for (u32 i = 0; i < bytes; ++i) ++memory.shared_cells[to - shared_start + i].copying;
  t.copies.push_back({to, source ? source : memory.shared, bytes, source_bytes, line});
}

void commit_copies(Thread& thread) {
  Fiber& t = fiber(thread);
  u32 committed = 0;
  for (u32 group : t.groups) committed += group;
  t.groups.push_back(u32(t.copies.size()) - committed);
}

void wait_for_copies(Thread& thread, u32 groups_left, bool uncommitted_too, u32) {
  Fiber& t = fiber(thread);
  size_t count = 0;
  while (t.groups.size() > groups_left) {
    count += t.groups.front();
    t.groups.erase(t.groups.begin());
  }
  land_first(t, uncommitted_too ? t.copies.size() : count);
}

void forget_copies(Fiber& t) {
  for (const PendingCopy& copy : t.copies)
    for (u32 i = 0; i < copy.bytes; ++i)
      memory.shared_cells[copy.to - shared_start + i].copying = 0;
  t.copies.clear();
  t.groups.clear();
}

}  // namespace ptx
