// Shadow memory: for every byte of shared memory and of the writable buffers, who touched it last.
// From it come the races and the uninitialised reads, byte by byte.
//
// A byte knows its last write and its reads since. Two accesses of one byte by different threads,
// one of them a write, race where neither comes before the other (machine.h) and they are not both
// strong. Several unordered readers form a set; equal sets are stored once, since the bytes of an
// array are mostly read by the same threads.
#pragma once

#include "machine.h"

namespace ptx {

struct Cell {
  Stamp write, read;
  u32 readers;  // more readers of read.generation: a set in `reader_sets`; 0: none
  u32 copying;  // cp.async that still write here, or `nobody`
};
// Between two variables: a byte that nobody may touch.
constexpr u32 nobody = ~0u;

class ReaderSets {
 public:
  // The set with this reader, or the same set where the reader is in it already.
  u32 with(u32 set, const Stamp& reader, const Fiber& t) {
    if (generation_ != machine.generation) start();
    if (set == last_set_ && reader.thread == last_thread_ && reader.tick == last_tick_)
      return last_result_;
    last_set_ = set, last_thread_ = reader.thread, last_tick_ = reader.tick;
    return last_result_ = found(set, reader, t);
  }
  // The first reader in the set that comes not before the thread; null where there is none.
  const Stamp* unordered(u32 set, const Fiber& t, bool strong) const {
    for (; set; set = nodes_[set].parent) {
      const Stamp& reader = nodes_[set].reader;
      if (!comes_before(reader, t) && !(strong && reader.access == Access::strong)) return &reader;
    }
    return nullptr;
  }

 private:
  struct Node {
    u32 parent;
    Stamp reader;
  };

  void start() {
    generation_ = machine.generation;
    words_ = (machine.threads + 63) / 64;
    nodes_.resize(1);
    members_.assign(words_, 0);
    children_.clear();
    last_set_ = ~0u;
  }
  u32 found(u32 set, const Stamp& reader, const Fiber&) {
    const u64 bit = u64(1) << (reader.thread & 63);
    if (set && members_[size_t(set) * words_ + reader.thread / 64] & bit) {
      if (reader.tick == 0) return set;
      for (u32 at = set; at; at = nodes_[at].parent)
        if (nodes_[at].reader.thread == reader.thread) {
          if (nodes_[at].reader.tick == reader.tick) return set;
          break;
        }
    }
    const u64 key = u64(set) << 32 | u32(reader.thread) << 16 | reader.tick;
    u32& child = children_[key];
    if (!child) {
      child = u32(nodes_.size());
      nodes_.push_back({set, reader});
      members_.resize(nodes_.size() * words_);
      std::copy_n(members_.begin() + size_t(set) * words_, words_, members_.end() - words_);
      members_[size_t(child) * words_ + reader.thread / 64] |= bit;
    }
    return child;
  }

  u32 generation_ = 0, words_ = 0;
  std::vector<Node> nodes_;
  std::vector<u64> members_;
  std::unordered_map<u64, u32> children_;
  u32 last_set_ = ~0u, last_thread_ = 0, last_tick_ = 0, last_result_ = 0;
};

extern ReaderSets reader_sets;

[[noreturn]] inline void report_race(Fiber& t, u32 line, const char* mine, const Stamp& other,
                                     const char* theirs, const char* space, u64 address) {
  fail(t, line, Fault::race,
       "%s a byte that %s %s in PTX line %u with nothing between that orders them (%s memory, "
       "address %#llx)",
       mine, name_of(other.thread), theirs, other.line, space, (unsigned long long)address);
}

[[noreturn]] inline void report_copying(Fiber& t, u32 line, const Cell& cell, u64 address) {
  if (cell.copying == nobody)
    fail(t, line, Fault::out_of_bounds, "touches shared memory at %#llx, between two variables",
         (unsigned long long)address);
  fail(t, line, Fault::uninitialised,
       "touches shared memory at %#llx while the cp.async of %s in PTX line %u has not been waited "
       "for",
       (unsigned long long)address, name_of(cell.write.thread), cell.write.line);
}

inline bool conflict(const Stamp& other, const Fiber& t, Access access) {
  return !comes_before(other, t) && !(access == strong && other.access == strong);
}

inline void check_read(Fiber& t, Cell& cell, u32 line, Access access, const char* space,
                       u64 address) {
  if (__builtin_expect(cell.copying, 0)) report_copying(t, line, cell, address);
  if (conflict(cell.write, t, access))
    report_race(t, line, "reads", cell.write, "wrote", space, address);
}

inline void record_read(Fiber& t, Cell& cell, const Stamp& stamp) {
  if (cell.read.generation != stamp.generation) {
    cell.read = stamp;
    cell.readers = 0;
  } else if (cell.readers == 0 &&
             (cell.read.thread == stamp.thread || (stamp.tick && comes_before(cell.read, t)))) {
    cell.read = stamp;
  } else if (cell.read.thread != stamp.thread || cell.read.tick != stamp.tick) {
    cell.readers = reader_sets.with(cell.readers, stamp, t);
  }
}

// `rewrites`: the byte has the value already. Threads that hold the same numbers, as Triton's
// layouts have it, may then write them in the same instruction: whoever is last, memory is the
// same.
inline void check_write(Fiber& t, Cell& cell, u32 line, Access access, const char* space,
                        u64 address, bool rewrites) {
  if (__builtin_expect(cell.copying, 0)) report_copying(t, line, cell, address);
  if (conflict(cell.write, t, access) && !(rewrites && cell.write.line == line))
    report_race(t, line, "writes", cell.write, "wrote", space, address);
  if (cell.read.generation == machine.generation) {
    if (conflict(cell.read, t, access))
      report_race(t, line, "writes", cell.read, "read", space, address);
    if (cell.readers)
      if (const Stamp* reader = reader_sets.unordered(cell.readers, t, access == strong))
        report_race(t, line, "writes", *reader, "read", space, address);
  }
}

inline void record_write(Cell& cell, const Stamp& stamp) {
  cell.write = stamp;
  cell.read.generation = 0;
  cell.readers = 0;
}

}  // namespace ptx
