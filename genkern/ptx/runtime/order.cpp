// Blocks run here one after another; on a GPU nothing orders them. What one block wrote, another
// may touch only if an atomic carried the news: the writer's thread made a fence and then an atomic
// at some address, the reader's thread made an atomic at the same address and then a fence. Threads
// of the reader's block that pass a barrier afterwards may touch it as well.
#include "order.h"

#include "memory.h"

namespace ptx {

namespace {

// Everything in the generations from `first` up to `end`, and what `thread` did in `end` itself.
struct Published {
  u32 first, end;
  u16 thread;
};
// What a thread of this block has learned by an atomic. Fenced: plain accesses may rely on it.
struct Learned {
  std::vector<Published> news;
  u32 thread, generation;
  bool fenced;
};

std::unordered_map<u64, std::vector<Published>> published;  // at each atomic's address
std::vector<Learned> learned;
std::vector<u32> block_starts, block_numbers;  // the first generation of each block, in order

bool covers(const Published& p, const Stamp& stamp) {
  return (stamp.generation >= p.first && stamp.generation < p.end) ||
         (stamp.generation == p.end && stamp.thread == p.thread);
}
bool reaches(const Learned& l, const Fiber& t) {
  return l.thread == t.index || l.generation < machine.generation;
}

void atomic_at(Fiber& t, u64 address, Semantics semantics) {
  std::vector<Published>& here = published[address];
  if (!here.empty())
    learned.push_back({here, t.index, machine.generation, bool(semantics & acquire)});
  const u32 end = semantics & release ? machine.generation : t.fenced_generation;
  if (end == 0) return;
  here.push_back({machine.block_start, end, u16(t.index)});
  for (const Learned& l : learned)
    if (l.fenced && reaches(l, t) && &l != &learned.back())
      here.insert(here.end(), l.news.begin(), l.news.end());
}

}  // namespace

void reset_order() {
  published.clear();
  block_starts.clear();
  block_numbers.clear();
}

void start_order() {
  learned.clear();
  block_starts.push_back(machine.block_start);
  block_numbers.push_back(machine.block_index);
}

void fence_device(Thread& thread) {
  Fiber& t = fiber(thread);
  t.fenced_generation = machine.generation;
  for (Learned& l : learned)
    if (l.thread == t.index) l.fenced = true, l.generation = machine.generation;
}

void check_other_block(Fiber& t, const Stamp& other, Access access, u32 line, const char* mine,
                       const char* theirs, u64 address) {
  if (access == strong && other.access == strong) return;
  bool unfenced = false;
  for (const Learned& l : learned) {
    if (!reaches(l, t)) continue;
    for (const Published& p : l.news)
      if (covers(p, other)) {
        if (l.fenced || access == strong) return;
        unfenced = true;
      }
  }
  const size_t place =
      size_t(std::upper_bound(block_starts.begin(), block_starts.end(), other.generation) -
             block_starts.begin()) -
      1;
  const u32 number = block_numbers[place], *grid = machine.launch->grid;
  fail(t, line, Fault::race,
       "%s a byte of global memory (%#llx) that block (%u, %u, %u), %s, %s in PTX line %u; %s",
       mine, (unsigned long long)address, number % grid[0], number / grid[0] % grid[1],
       number / grid[0] / grid[1], name_of(other.thread), theirs, other.line,
       unfenced ? "an atomic told of it, but no fence follows that atomic"
                : "no fence and atomic order the two blocks");
}

u8* atomic_global(Thread& thread, u64 address, u32 bytes, u32 line, Semantics semantics) {
  Fiber& t = fiber(thread);
  const Region& region = region_to_write(t, address, bytes, line);
  check_alignment(t, address, bytes, line);
  touch_for_write(t, region, address, bytes, line, strong, nullptr);
  atomic_at(t, address, semantics);
  machine.launch->bytes_read += bytes;
  machine.launch->bytes_written += bytes;
  return reinterpret_cast<u8*>(address);
}

u8* atomic_shared(Thread& thread, u64 address, u32 bytes, u32 line, Semantics) {
  Fiber& t = fiber(thread);
  u8* place = shared_place(t, address, bytes, line, "changes");
  touch_shared_for_read(t, address, bytes, line, strong);
  touch_shared_for_write(t, address, bytes, line, strong, nullptr);
  return place;
}

u8* atomic_generic(Thread& t, u64 address, u32 bytes, u32 line, Semantics semantics) {
  if (address - shared_window < window_bytes)
    return atomic_shared(t, address - shared_window, bytes, line, semantics);
  return atomic_global(t, address, bytes, line, semantics);
}

}  // namespace ptx
