// Flat arrays cut into chunks that are worth a task, for kernel files that reduce or map them. The
// cut depends on the length alone, so that sums by chunk are the same on any number of threads.
#pragma once

#include <stdint.h>

namespace genkern {
namespace GK_LEVEL {

constexpr int64_t max_chunks = 256;
constexpr int64_t min_chunk = 16384;  // a multiple of every vector's lanes

inline int64_t chunk_size(int64_t count) {
  const int64_t even = (count + max_chunks - 1) / max_chunks;
  return even <= min_chunk ? min_chunk : (even + min_chunk - 1) / min_chunk * min_chunk;
}
inline int64_t chunks_of(int64_t count) {
  return count <= 0 ? 0 : (count + chunk_size(count) - 1) / chunk_size(count);
}

}  // namespace GK_LEVEL
}  // namespace genkern
