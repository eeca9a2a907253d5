// Work on torch's own threads, and memory that lives for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../torch_api.h"
#include "kernels.h"

namespace grit {

constexpr int64_t LARGE_PAGE = 2 << 20;

// Asks for large pages wherever fresh memory covers whole ones: its first use then costs a page fault per 2 MB instead of one per
// 4 KB, which takes longer than the writing itself. Where the system has none to offer, nothing changes.
inline void use_large_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t first = ((uintptr_t)p + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  const uintptr_t end = ((uintptr_t)p + (uintptr_t)bytes) / LARGE_PAGE * LARGE_PAGE;
  if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}

// Memory of at least 2 * LARGE_PAGE and at most MOST_KEPT is kept for the next call: the system zeroes fresh pages, which takes a
// fifth of the backward pass of short samples.
constexpr int64_t MOST_KEPT = 128 << 20, HEADER = 64;
static_assert(HEADER % 64 == 0, "what follows the header is aligned as the block is");

inline std::atomic<void*> kept{nullptr};  // one block, or null; its first word holds its size

struct Free {
  void operator()(void* p) const {
    void* block = (char*)p - HEADER;
    const int64_t bytes = *(int64_t*)block;
    std::free(bytes >= 2 * LARGE_PAGE && bytes <= MOST_KEPT ? kept.exchange(block) : block);
  }
};
using Memory = std::unique_ptr<void, Free>;

// `bytes` of uninitialised memory, aligned to 64 bytes
inline Memory allocate(int64_t bytes) {
  bytes += HEADER;
  const bool large = bytes >= 2 * LARGE_PAGE;
  void* block = large ? kept.exchange(nullptr) : nullptr;
  if (block && *(int64_t*)block < bytes) {
    std::free(block);
    block = nullptr;
  }
  if (!block) {
    const int64_t alignment = large ? LARGE_PAGE : 64;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    block = std::aligned_alloc((size_t)alignment, (size_t)bytes);
    if (!block) throw std::bad_alloc();
    if (large) use_large_pages(block, bytes);
    *(int64_t*)block = bytes;
  }
  return Memory((char*)block + HEADER);
}

// Sets up a thread's state while it runs kernels of a set.
class Entered {
 public:
  explicit Entered(const ThreadState& state) : state(state) {
    if (state.enter) state.enter();
  }
  ~Entered() {
    if (state.leave) state.leave();
  }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  const ThreadState& state;
};

// Calls f(index, scratch) for every index below count, each once, in any order, on torch's threads; scratch: `bytes` per thread.
// Items are handed out one by one, so put the longest first. `state`: of the set whose kernels f runs.
template <class Function>
void run_items(const ThreadState& state, int64_t count, int64_t scratch_bytes, const Function& f) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    // an exception must not cross torch's C interface
    try {
      Memory scratch = allocate(scratch_bytes);
      Entered entered(state);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i, scratch.get());
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

template <class Function>
void run_items(int64_t count, int64_t scratch_bytes, const Function& f) {
  run_items({}, count, scratch_bytes, f);
}

}  // namespace grit
