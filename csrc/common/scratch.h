// Scratch memory of a launcher: allocated inside it, freed by it with free().
#pragma once

#include <stdint.h>
#include <stdlib.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace genkern {
namespace GK_LEVEL {

constexpr int64_t scratch_alignment = 64;

// Between the pieces that a launcher makes of its scratch lie gaps under AddressSanitizer, which
// sees only the ends of whole allocations otherwise.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t scratch_gap = scratch_alignment;
inline void forbid(void* from, int64_t bytes) { ASAN_POISON_MEMORY_REGION(from, size_t(bytes)); }
#else
constexpr int64_t scratch_gap = 0;
inline void forbid(void* /*from*/, int64_t /*bytes*/) {}
#endif

// At least `bytes`, aligned for every vector; null where memory is out.
inline void* allocate_scratch(int64_t bytes) {
  // aligned_alloc wants a multiple of the alignment, and some libraries more than nothing.
  const int64_t whole = (bytes / scratch_alignment + 1) * scratch_alignment;
  return aligned_alloc(scratch_alignment, size_t(whole));
}

}  // namespace GK_LEVEL
}  // namespace genkern
