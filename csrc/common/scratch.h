// Scratch memory of a launcher: allocated inside it, freed by it with free(); or kept by the
// calling thread for its next call.
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
inline void allow(void* from, int64_t bytes) { ASAN_UNPOISON_MEMORY_REGION(from, size_t(bytes)); }
#else
constexpr int64_t scratch_gap = 0;
inline void forbid(void* /*from*/, int64_t /*bytes*/) {}
inline void allow(void* /*from*/, int64_t /*bytes*/) {}
#endif

// At least `bytes`, aligned for every vector; null where memory is out.
inline void* allocate_scratch(int64_t bytes) {
  // aligned_alloc wants a multiple of the alignment, and some libraries more than nothing.
  const int64_t whole = (bytes / scratch_alignment + 1) * scratch_alignment;
  return aligned_alloc(scratch_alignment, size_t(whole));
}

// One block that a thread keeps between calls. Above 32 MB the C library maps memory anew for each
// allocation, and to have its pages zeroed can take as long as the work that they are for.
class KeptScratch {
 public:
  KeptScratch() {}
  ~KeptScratch() { drop(); }
  KeptScratch(const KeptScratch&) = delete;
  KeptScratch& operator=(const KeptScratch&) = delete;

  // At least `bytes`, until `give_back`; null where memory is out.
  void* take(int64_t bytes) {
    if (bytes > size || !block) {
      drop();
      block = allocate_scratch(bytes);
      size = block ? bytes : 0;
    }
    return block;
  }
  void give_back() {
    if (block) allow(block, size);
    if (size > most) drop();
  }

 private:
  static constexpr int64_t most = int64_t(64) << 20;

  void drop() {
    free(block);
    block = nullptr;
    size = 0;
  }

  void* block = nullptr;
  int64_t size = 0;
};

inline KeptScratch& kept_scratch() {
  static thread_local KeptScratch kept;
  return kept;
}

}  // namespace GK_LEVEL
}  // namespace genkern
