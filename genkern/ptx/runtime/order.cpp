// Blocks run here one after another; on a GPU nothing orders them. What one block wrote, another
// may touch only if an atomic (or a strong store and a strong load) carried the news, with fences
// around it. There are two ways, as in PTX's memory model:
// - A release pattern and an acquire pattern: the writer's thread, or one that a barrier orders
//   after it, made a fence and then an atomic at some address; the reader's thread an atomic at the
//   same address and then a fence. Threads of its block that pass a barrier afterwards may read
//   too.
// - Two fence.sc, which all stand in one order: the writer made one, a barrier, and then any thread
//   of its block the atomic; or the other way round for the reader. Had the reader's fence come
//   first, its atomic could not have seen the writer's. (__threadfence is a membar, hence .sc.)
#include "order.h"

#include <map>

#include "memory.h"

namespace ptx {

namespace {

// One thread's fence, or the fence.sc of many in one generation: everything in the generations from
// `first` up to `end`, and in `end` itself what its threads did before the ticks.
struct Published {
  u32 first, end;
  u16 thread, tick;
  Ticks ticks;
  bool releases;    // the thread itself made the atomic after its fence
  bool sequential;  // by fence.sc
};
constexpr u16 many = 0xffff;  // for the thread

class News {
 public:
  // A later fence of the same thread takes the place of the earlier.
  void add(const Published& p) { by_fence_[{p.end, p.thread}] = p; }
  bool has(const Published& p) const {
    const auto at = by_fence_.find({p.end, p.thread});
    return at != by_fence_.end() && at->second.tick >= p.tick;
  }
  auto begin() const { return by_fence_.begin(); }
  auto end() const { return by_fence_.end(); }

 private:
  std::map<std::pair<u32, u16>, Published> by_fence_;
};

struct Place {
  std::shared_ptr<News> news = std::make_shared<News>();
  u64 version = 0;  // of the news
};

// What a thread of this block has learned by an atomic.
struct Learned {
  std::shared_ptr<const News> news;
  u64 version;
  u32 thread, atomic_in, generation;  // of the atomic; and since when the rest holds
  bool acquires;                      // the thread made a fence after its atomic
  bool sequential;                    // that, or one of a thread behind a barrier, was a fence.sc
};

// The fence.sc of this block in one generation: up to where, for each thread.
struct Fences {
  u32 generation = 0;
  Ticks ticks;
};

std::unordered_map<u64, Place> published;        // at each atomic's address
std::map<std::pair<u32, u64>, Learned> learned;  // by thread and address
std::vector<u32> block_starts, block_numbers;    // the first generation of each block, in order
Fences latest_fences, fences_before;
u64 versions = 0;

// A thread that fences in circles must not use up the ticks: past these, a fence is taken to cover
// what its thread does next, too.
constexpr u16 ticks_for_fences = 0x8000;

bool covers(const Published& p, const Stamp& stamp) {
  if (stamp.generation != p.end) return stamp.generation >= p.first && stamp.generation < p.end;
  if (stamp.thread == p.thread) return stamp.tick < p.tick;
  return p.ticks && (*p.ticks)[stamp.thread] > stamp.tick;
}
bool reaches(const Learned& l, const Fiber& t) {
  return l.thread == t.index || l.generation < machine.generation;
}
bool orders(const Published& p, const Learned& l) {
  return (p.releases && l.acquires) || (p.sequential && l.sequential);
}

// The end of what the thread has done so far, in ticks; what it does next comes after it.
u16 close_tick(Fiber& t) {
  if (t.tick >= ticks_for_fences) return t.tick + 1;
  return ++t.tick;
}
// What the thread knows of the others, to be kept.
Ticks known_now(const Fiber& t) {
  if (t.known_generation != machine.generation) return nullptr;
  return std::make_shared<std::vector<u16>>(t.known, t.known + machine.threads);
}

void add_sequential_fence(const Fiber& t) {
  Fences& fences = latest_fences;
  if (fences.generation != machine.generation) {
    fences_before = fences;
    fences = {machine.generation, std::make_shared<std::vector<u16>>(machine.threads, u16(0))};
  }
  std::vector<u16>& ticks = *fences.ticks;
  ticks[t.index] = t.fence.tick;
  if (t.fence.known)
    for (u32 i = 0; i < machine.threads; ++i) ticks[i] = std::max(ticks[i], (*t.fence.known)[i]);
}

// The latest fence.sc of the block that a barrier orders before now; generation 0: none.
const Fences& ordered_fences() {
  return latest_fences.generation < machine.generation ? latest_fences : fences_before;
}

}  // namespace

void reset_order() {
  published.clear();
  block_starts.clear();
  block_numbers.clear();
}

void start_order() {
  learned.clear();
  latest_fences = fences_before = {};
  block_starts.push_back(machine.block_start);
  block_numbers.push_back(machine.block_index);
}

void observe(Fiber& t, u64 address, Semantics semantics) {
  const auto here = published.find(address);
  if (here == published.end()) return;
  const Place& place = here->second;
  const bool acquires = semantics & acquire;
  const auto [known, is_new] = learned.insert({{t.index, address}, {}});
  Learned& l = known->second;
  // Again and again the same news, as a thread that spins has them.
  if (!is_new && l.version == place.version && l.acquires >= acquires) return;
  const u32 now = machine.generation;
  l = {place.news, place.version, t.index, now, now, acquires, false};
}

void publish(Fiber& t, u64 address, Semantics semantics, bool replaces) {
  if (replaces) published.erase(address);
  Fence fence = t.fence;
  if (semantics & release) fence = {machine.generation, close_tick(t), known_now(t), false};
  const Fences& others = ordered_fences();
  if (!fence.generation && !others.generation) return;
  Place& place = published[address];
  const auto add = [&place](const Published& p) {
    if (place.news->has(p)) return;
    // Who has learned the news so far keeps them as they are.
    if (place.news.use_count() > 1) place.news = std::make_shared<News>(*place.news);
    place.news->add(p);
    place.version = ++versions;
  };
  if (others.generation)
    add({machine.block_start, others.generation, many, 0, others.ticks, false, true});
  if (!fence.generation) return;
  add({machine.block_start, fence.generation, u16(t.index), fence.tick, fence.known, true,
       fence.sequential});
  for (const auto& [from, l] : learned)
    if ((replaces || from.second != address) && reaches(l, t))
      for (const auto& [key, p] : *l.news)
        if (orders(p, l)) add(p);
}

void fence_device(Thread& thread, bool sequential) {
  Fiber& t = fiber(thread);
  t.fence = {machine.generation, close_tick(t), known_now(t), sequential};
  if (sequential) add_sequential_fence(t);
  for (auto& [from, l] : learned) {
    if (l.thread == t.index) {
      if (l.acquires && l.sequential >= sequential) continue;
      l.acquires = true, l.sequential |= sequential, l.generation = machine.generation;
    } else if (sequential && l.atomic_in < machine.generation && !(l.sequential && reaches(l, t))) {
      const u32 now = machine.generation;
      learned.insert({{t.index, from.second}, {l.news, l.version, t.index, now, now, false, true}});
    }
  }
}

void check_other_block(Fiber& t, const Stamp& other, Access access, u32 line, const char* mine,
                       const char* theirs, u64 address) {
  if (access == strong && other.access == strong) return;
  const char* missing = "no fence and atomic order the two blocks";
  for (const auto& [from, l] : learned) {
    if (!reaches(l, t)) continue;
    for (const auto& [key, p] : *l.news)
      if (covers(p, other)) {
        if (orders(p, l) || access == strong) return;
        missing = l.acquires || l.sequential
                      ? "an atomic told of it, but its thread made no fence before, and not both "
                        "sides made a fence.sc"
                      : "an atomic told of it, but no fence follows that atomic";
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
       number / grid[0] / grid[1], name_of(other.thread), theirs, other.line, missing);
}

u8* atomic_global(Thread& thread, u64 address, u32 bytes, u32 line, Semantics semantics) {
  Fiber& t = fiber(thread);
  const Region& region = region_to_write(t, address, bytes, line);
  check_alignment(t, address, bytes, line);
  touch_for_write(t, region, address, bytes, line, strong, nullptr);
  // News that it finds and hands on stay at the address; those it has just found are there already.
  publish(t, address, semantics, false);
  observe(t, address, semantics);
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
