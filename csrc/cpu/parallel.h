// Work on torch's own threads, and memory that lives for one call.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../torch_api.h"

namespace grit {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

inline Memory allocate(int64_t bytes) {
  void* p = std::aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64 + 64));
  if (!p) throw std::bad_alloc();
  return Memory(p);
}

// Calls f(index, scratch) for every index below count, each once, in any order, on torch's threads; scratch: `bytes` per thread.
// Items are handed out one by one, so put the longest first.
template <class Function>
void run_items(int64_t count, int64_t scratch_bytes, const Function& f) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    // an exception must not cross torch's C interface
    try {
      Memory scratch = allocate(scratch_bytes);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i, scratch.get());
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

}  // namespace grit
