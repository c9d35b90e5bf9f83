// The accesses that thread.h names.
#include "memory.h"

#include "order.h"

namespace ptx {

Memory memory;
ReaderSets reader_sets;

namespace {

// A kernel may take the address of a parameter; what it reads there is no global memory.
bool is_parameter(u64 address, u32 bytes) {
  const u64 at = address - reinterpret_cast<u64>(machine.launch->parameters);
  return at < machine.launch->parameter_bytes && bytes <= machine.launch->parameter_bytes - at;
}

}  // namespace

const u8* read_parameter(Thread& t, u64 address, u32 bytes, u32 line) {
  if (!is_parameter(address, bytes))
    fail(t, line, Fault::out_of_bounds,
         "reads %u bytes at byte %lld of the parameters, which have %llu bytes", bytes,
         (long long)(address - reinterpret_cast<u64>(machine.launch->parameters)),
         (unsigned long long)machine.launch->parameter_bytes);
  check_alignment(fiber(t), address, bytes, line);
  return reinterpret_cast<const u8*>(address);
}

const u8* read_global(Thread& thread, u64 address, u32 bytes, u32 line, Access access) {
  Fiber& t = fiber(thread);
  const Region* region = find_region(address, bytes);
  if (__builtin_expect(!region, 0)) report_outside(t, address, bytes, line, "reads");
  check_alignment(t, address, bytes, line);
  if (region->cells) touch_for_read(t, *region, address, bytes, line, access);
  if (access == strong) observe(t, address, relaxed);
  if (!is_parameter(address, bytes)) machine.launch->bytes_read += bytes;
  return reinterpret_cast<const u8*>(address);
}

u8* write_global(Thread& thread, u64 address, u32 bytes, u32 line, Access access, const u8* data) {
  Fiber& t = fiber(thread);
  const Region& region = region_to_write(t, address, bytes, line);
  check_alignment(t, address, bytes, line);
  touch_for_write(t, region, address, bytes, line, access, data);
  if (access == strong) publish(t, address, relaxed, true);
  machine.launch->bytes_written += bytes;
  return reinterpret_cast<u8*>(address);
}

const u8* read_shared(Thread& thread, u64 address, u32 bytes, u32 line, Access access) {
  Fiber& t = fiber(thread);
  const u8* place = shared_place(t, address, bytes, line, "reads");
  touch_shared_for_read(t, address, bytes, line, access);
  return place;
}

u8* write_shared(Thread& thread, u64 address, u32 bytes, u32 line, Access access, const u8* data) {
  Fiber& t = fiber(thread);
  u8* place = shared_place(t, address, bytes, line, "writes");
  touch_shared_for_write(t, address, bytes, line, access, data);
  return place;
}

const u8* read_local(Thread& t, u64 address, u32 bytes, u32 line, Access) {
  return local_place(fiber(t), address, bytes, line, "reads");
}

u8* write_local(Thread& t, u64 address, u32 bytes, u32 line, Access, const u8*) {
  return local_place(fiber(t), address, bytes, line, "writes");
}

const u8* read_generic(Thread& t, u64 address, u32 bytes, u32 line, Access access) {
  if (address - shared_window < window_bytes)
    return read_shared(t, address - shared_window, bytes, line, access);
  if (address - local_window < window_bytes)
    return read_local(t, address - local_window, bytes, line, access);
  return read_global(t, address, bytes, line, access);
}

u8* write_generic(Thread& t, u64 address, u32 bytes, u32 line, Access access, const u8* data) {
  if (address - shared_window < window_bytes)
    return write_shared(t, address - shared_window, bytes, line, access, data);
  if (address - local_window < window_bytes)
    return write_local(t, address - local_window, bytes, line, access, data);
  return write_global(t, address, bytes, line, access, data);
}

u32 take_local(Thread& t, u32 bytes, u32 alignment, u32 line) {
  const u32 start = (t.local_top + alignment - 1) / alignment * alignment;
  if (start + bytes > machine.launch->local_bytes)
    fail(t, line, Fault::out_of_bounds, "the calls are nested too deeply: no local memory is left");
  t.local_top = start + bytes;
  return start;
}

}  // namespace ptx
