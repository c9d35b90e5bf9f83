// Rows of numbers cut into tasks, for kernel files whose work is one pass over memory.
//
// A row is cut into pieces of at most `piece` numbers; a task is one piece, or as many whole rows
// as make a piece. The cut depends on the sizes alone, so that partial sums that belong to a piece
// or a task come out alike on any number of threads.
#pragma once

#include <stdint.h>

namespace genkern {
namespace GK_LEVEL {

constexpr int64_t piece = 32768;  // a multiple of every vector's lanes

struct Cut {
  int64_t rows, size;  // numbers of a row
  int64_t pieces;      // of a row
  int64_t together;    // rows in a task, where a row is one piece
  int64_t tasks;

  int64_t in_piece(int64_t part) const {
    const int64_t rest = size - part * piece;
    return rest < piece ? rest : piece;
  }

  // body(row, part) for every piece of a task.
  template <class Body>
  void in_task(int64_t task, const Body& body) const {
    if (pieces > 1) {
      body(task / pieces, task % pieces);
      return;
    }
    const int64_t begin = task * together;
    for (int64_t row = begin; row < begin + together && row < rows; ++row) body(row, int64_t(0));
  }
};

inline Cut cut_of(int64_t rows, int64_t size) {
  const int64_t pieces = size <= piece ? 1 : (size + piece - 1) / piece;
  if (pieces > 1) return {rows, size, pieces, 1, rows * pieces};
  const int64_t together = size > 0 ? piece / size : piece;
  return {rows, size, 1, together, (rows + together - 1) / together};
}

}  // namespace GK_LEVEL
}  // namespace genkern
