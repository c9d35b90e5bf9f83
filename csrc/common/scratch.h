// Scratch memory of a launcher: allocated inside it, freed by it with free().
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace genkern {
namespace GK_LEVEL {

constexpr int64_t scratch_alignment = 64;

// At least `bytes`, aligned for every vector; null where memory is out.
inline void* allocate_scratch(int64_t bytes) {
  // aligned_alloc wants a multiple of the alignment, and some libraries more than nothing.
  const int64_t whole = (bytes / scratch_alignment + 1) * scratch_alignment;
  return aligned_alloc(scratch_alignment, size_t(whole));
}

}  // namespace GK_LEVEL
}  // namespace genkern
