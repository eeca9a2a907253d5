// The range arithmetic of grit_kernels/visibility.py: which keys a row sees, and which rows see a key. Counted in tokens.
#pragma once

#include <cstdint>

#include "attention.h"

// always inlined: files compiled for different instruction sets must not share one copy
#ifdef __CUDACC__
#define GRIT_RANGE __host__ __device__ __forceinline__ static
#else
#define GRIT_RANGE __attribute__((always_inline)) static inline
#endif

namespace grit {

GRIT_RANGE int64_t clamp_to(int64_t value, int64_t high) { return value < 0 ? 0 : value > high ? high : value; }

// visibility.key_range: first key that row r of the sample sees
GRIT_RANGE int64_t first_key(const Sample& s, int64_t row) {
  return clamp_to(row + s.k_len - s.q_len - s.left, s.k_len);
}

// visibility.key_range: one past the last key that row r sees; per-token upper bounds replace the right bound
GRIT_RANGE int64_t last_key(const Sample& s, int64_t row) {
  return clamp_to(s.hi ? s.hi[row] : row + s.k_len - s.q_len + s.right + 1, s.k_len);
}

// visibility.row_range, visibility.transpose_hi: rows [first, last) that see any key of [begin, end), begin < end. Neither bound
// decreases from row to row, so these rows are one interval, found by bisection.
struct RowRange {
  int64_t first, last;
};

GRIT_RANGE RowRange rows_that_see(const Sample& s, int64_t begin, int64_t end) {
  int64_t low = 0, high = s.q_len;  // first row whose last key lies after begin
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (last_key(s, middle) > begin) high = middle;
    else low = middle + 1;
  }
  const int64_t first = low;
  high = s.q_len;  // first row that starts at end or after it
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (first_key(s, middle) >= end) high = middle;
    else low = middle + 1;
  }
  return {first, low};
}

}  // namespace grit
