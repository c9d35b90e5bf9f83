// Huge pages for large fresh outputs, for kernel files (compiled once per level).
//
// The first write to a fresh page is a page fault, and at 4 KiB a page those faults take longer
// than the kernel that fills them. Advice before the first write makes them 512 times fewer.
#pragma once

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace genkern {
namespace GK_LEVEL {

// Call before the first write. Does nothing where no whole huge page fits in the range.
inline void advise_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, huge = uintptr_t(2) << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(start);
  const uintptr_t last = first + uintptr_t(bytes < 0 ? 0 : bytes);
  if ((first + huge - 1) / huge >= last / huge) return;
  // Whole pages inwards: madvise refuses other addresses. A failure costs speed only.
  const uintptr_t from = (first + page - 1) / page * page, to = last / page * page;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace GK_LEVEL
}  // namespace genkern
