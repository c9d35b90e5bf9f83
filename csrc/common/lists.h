// Lists of flat arrays for one CUDA launch: how they are cut into blocks, and the table that tells
// the device (lists.cuh reads it). No CUDA header takes part.
//
// An array has rows (most have one), and a block takes a run of steps of one row, one after
// another. A step is 16 bytes a thread. The cut depends on the sizes alone, so that sums come out
// alike on every GPU.
#pragma once

#include <stdint.h>
#include <string.h>

#include <vector>

namespace genkern {
namespace cuda {

constexpr int list_threads = 256;
constexpr int64_t step_bytes = 16 * list_threads;
constexpr int64_t longest_run = 32;  // steps that a thread adds up in its arithmetic type

// So few arrays go with the launch, as an argument of the kernel.
constexpr int64_t nearby_arrays = 8;

// What a launch over a list is made of.
struct ListPlan {
  std::vector<int64_t> table;  // one entry an array
  int64_t arrays = 0, blocks = 0, run = 1;
  int64_t sums = 0;                  // that each block leaves
  bool has_mean_of_nothing = false;  // whether the result is NaN for it, as PyTorch's
};

// Addresses on the device.
struct ListMemory {
  const void* table;            // the plan's, where the list has more than nearby_arrays
  unsigned long long* counter;  // zero before and after every launch; of a list with sums
  double* partials;             // [sums, blocks], written and read by a launch alone
};

// What a kernel is given.
template <class Entry>
struct List {
  ListMemory memory;
  int64_t arrays, run;
  Entry nearby[nearby_arrays];
};

template <class Entry>
List<Entry> list_of(const ListPlan& plan, const ListMemory& memory) {
  List<Entry> list{memory, plan.arrays, plan.run, {}};
  if (plan.arrays <= nearby_arrays)
    memcpy(list.nearby, plan.table.data(), size_t(plan.arrays) * sizeof(Entry));
  return list;
}

// Makes plans: first `count` all arrays, then `add` their entries in the same order, or the blocks
// alone of an array that needs no entry.
class ListPlanner {
 public:
  ListPlanner(int64_t element_bytes, int64_t blocks_aim, int64_t sums)
      : step_(step_bytes / element_bytes), aim_(blocks_aim) {
    plan_.sums = sums;
  }

  void count(int64_t size, int64_t rows = 1) {
    steps_ += steps_of(size) * rows;
    plan_.run = 1;
    while (plan_.run < longest_run && plan_.run * aim_ < steps_) plan_.run *= 2;
  }

  int64_t blocks_of_row(int64_t size) const { return (steps_of(size) + plan_.run - 1) / plan_.run; }
  int64_t next_block() const { return plan_.blocks; }

  // `Entry` is made of eight-byte members, the first of which is next_block().
  template <class Entry>
  void add(const Entry& entry, int64_t blocks) {
    static_assert(sizeof(Entry) % sizeof(int64_t) == 0, "an entry is a row of the table");
    const size_t end = plan_.table.size();
    plan_.table.resize(end + sizeof(Entry) / sizeof(int64_t));
    memcpy(plan_.table.data() + end, &entry, sizeof(Entry));
    ++plan_.arrays;
    add_blocks(blocks);
  }
  void add_blocks(int64_t blocks) { plan_.blocks += blocks; }

  void mean_of_nothing() { plan_.has_mean_of_nothing = true; }

  // Even of nothing there is a result to be written.
  ListPlan finish() {
    if (plan_.blocks == 0) plan_.blocks = 1;
    return plan_;
  }

 private:
  ListPlan plan_;
  int64_t step_, aim_, steps_ = 0;

  int64_t steps_of(int64_t size) const { return size <= 0 ? 0 : (size + step_ - 1) / step_; }
};

}  // namespace cuda
}  // namespace genkern
