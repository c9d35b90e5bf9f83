// Every access of every thread goes through here: where do its bytes lie, and may it?
#pragma once

#include "shadow.h"

namespace ptx {

// Zeroed pages that cost nothing until they are touched.
class Pages {
 public:
  Pages() = default;
  Pages(const Pages&) = delete;
  ~Pages() { release(); }
  void acquire(u64 bytes) {
    release();
    if (bytes == 0) return;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    start_ = at == MAP_FAILED ? nullptr : static_cast<u8*>(at);
    bytes_ = start_ ? bytes : 0;
  }
  void release() {
    if (start_) munmap(start_, bytes_);
    start_ = nullptr, bytes_ = 0;
  }
  u8* start() const { return start_; }
  u64 bytes() const { return bytes_; }

 private:
  u8* start_ = nullptr;
  u64 bytes_ = 0;
};

// A stretch of global memory; only writable ones have a shadow, since nothing races on the others.
struct Region {
  u64 address, bytes;
  const char* name;
  Cell* cells;
};

struct Memory {
  std::vector<Region> writable, read_only;  // by address
  const Region* last = nullptr;
  std::vector<Cell*> held;  // shadows of this launch
  std::vector<u64> held_bytes;
  u64 shared_end = shared_start;
  u8* shared = nullptr;
  Cell* shared_cells = nullptr;
  Pages shared_pages, shared_cell_pages;
};
extern Memory memory;

inline const Region* region_in(const std::vector<Region>& regions, u64 address, u32 bytes) {
  auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                [](u64 at, const Region& r) { return at < r.address; });
  // Buffers may overlap, so a longer one further down may hold the bytes.
  while (after != regions.begin()) {
    --after;
    if (address - after->address < after->bytes &&
        bytes <= after->bytes - (address - after->address))
      return &*after;
  }
  return nullptr;
}

inline const Region* find_region(u64 address, u32 bytes) {
  const Region* last = memory.last;
  if (last && address - last->address < last->bytes &&
      bytes <= last->bytes - (address - last->address))
    return last;
  const Region* found = region_in(memory.writable, address, bytes);
  if (!found) found = region_in(memory.read_only, address, bytes);
  if (found) memory.last = found;
  return found;
}

[[noreturn]] inline void report_outside(Fiber& t, u64 address, u32 bytes, u32 line,
                                        const char* what) {
  const Region* nearest = nullptr;
  u64 distance = ~u64(0);
  for (const auto* regions : {&memory.writable, &memory.read_only})
    for (const Region& r : *regions) {
      const u64 end = r.address + r.bytes;
      const u64 away = address < r.address ? r.address - address : address + bytes - end;
      if (away < distance) distance = away, nearest = &r;
    }
  if (!nearest || distance > (u64(1) << 32))
    fail(t, line, Fault::out_of_bounds, "%s %u bytes at %#llx, far from every buffer", what, bytes,
         (unsigned long long)address);
  fail(t, line, Fault::out_of_bounds, "%s %u bytes at byte %lld of a buffer of %llu bytes (%s)",
       what, bytes, (long long)(address - nearest->address), (unsigned long long)nearest->bytes,
       nearest->name);
}

inline void check_alignment(Fiber& t, u64 address, u32 bytes, u32 line) {
  if (__builtin_expect(address & (bytes - 1), 0))
    fail(t, line, Fault::misaligned, "accesses %u bytes at %#llx, which is no multiple of %u",
         bytes, (unsigned long long)address, bytes);
}

// Blocks run one after another, yet on a GPU nothing orders them but atomics: see order.h.
void check_other_block(Fiber& t, const Stamp& other, Access access, u32 line, const char* mine,
                       const char* theirs, u64 address);

inline void touch_for_read(Fiber& t, const Region& region, u64 address, u32 bytes, u32 line,
                           Access access) {
  Cell* cell = region.cells + (address - region.address);
  const Stamp stamp = stamp_of(t, line, access);
  for (u32 i = 0; i < bytes; ++i, ++cell) {
    if (cell->write.generation && cell->write.generation < machine.block_start)
      check_other_block(t, cell->write, access, line, "reads", "wrote", address + i);
    check_read(t, *cell, line, access, "global", address + i);
    record_read(t, *cell, stamp);
  }
}

// `data`: what is going to be written; null where that is not known yet.
inline void touch_for_write(Fiber& t, const Region& region, u64 address, u32 bytes, u32 line,
                            Access access, const u8* data) {
  const u8* before = reinterpret_cast<const u8*>(address);
  Cell* cell = region.cells + (address - region.address);
  const Stamp stamp = stamp_of(t, line, access);
  for (u32 i = 0; i < bytes; ++i, ++cell) {
    if (cell->write.generation && cell->write.generation < machine.block_start)
      check_other_block(t, cell->write, access, line, "writes", "wrote", address + i);
    if (cell->read.generation && cell->read.generation < machine.block_start)
      check_other_block(t, cell->read, access, line, "writes", "read", address + i);
    check_write(t, *cell, line, access, "global", address + i, data && before[i] == data[i]);
    record_write(*cell, stamp);
  }
}

inline const Region& region_to_write(Fiber& t, u64 address, u32 bytes, u32 line) {
  const Region* region = find_region(address, bytes);
  if (!region) report_outside(t, address, bytes, line, "writes");
  if (!region->cells)
    fail(t, line, Fault::read_only,
         "writes %u bytes at byte %llu of a buffer of %llu bytes that may "
         "only be read (%s)",
         bytes, (unsigned long long)(address - region->address), (unsigned long long)region->bytes,
         region->name);
  return *region;
}

inline u8* shared_place(Fiber& t, u64 address, u32 bytes, u32 line, const char* what) {
  if (address < shared_start || address > memory.shared_end - bytes || memory.shared_end < bytes)
    fail(t, line, Fault::out_of_bounds,
         "%s %u bytes at byte %lld of shared memory, which has %llu bytes (%u of them dynamic)",
         what, bytes, (long long)(address - shared_start),
         (unsigned long long)(memory.shared_end - shared_start), t.dynamic_bytes);
  check_alignment(t, address, bytes, line);
  return memory.shared + (address - shared_start);
}

inline void touch_shared_for_read(Fiber& t, u64 address, u32 bytes, u32 line, Access access) {
  Cell* cell = memory.shared_cells + (address - shared_start);
  const Stamp stamp = stamp_of(t, line, access);
  for (u32 i = 0; i < bytes; ++i, ++cell) {
    if (__builtin_expect(cell->write.generation < machine.block_start, 0) && !cell->copying)
      fail(t, line, Fault::uninitialised,
           "reads %u bytes of shared memory at %#llx: nothing has written byte %u of them", bytes,
           (unsigned long long)address, i);
    check_read(t, *cell, line, access, "shared", address + i);
    record_read(t, *cell, stamp);
  }
}

inline void touch_shared_for_write(Fiber& t, u64 address, u32 bytes, u32 line, Access access,
                                   const u8* data) {
  const u8* before = memory.shared + (address - shared_start);
  Cell* cell = memory.shared_cells + (address - shared_start);
  const Stamp stamp = stamp_of(t, line, access);
  for (u32 i = 0; i < bytes; ++i, ++cell) {
    check_write(t, *cell, line, access, "shared", address + i, data && before[i] == data[i]);
    record_write(*cell, stamp);
  }
}

inline u8* local_place(Fiber& t, u64 address, u32 bytes, u32 line, const char* what) {
  if (address + bytes > t.local_top || address > t.local_top)
    fail(t, line, Fault::out_of_bounds,
         "%s %u bytes at byte %lld of local memory, which has %u bytes", what, bytes,
         (long long)address, t.local_top);
  check_alignment(t, address, bytes, line);
  return machine.local.data() + u64(t.index) * machine.launch->local_bytes + address;
}

}  // namespace ptx
