// Keys in pages, see grit_kernels/attention/pages.py: slot s of a sample is row s % size of page table[s / size]. Without a table,
// slots are rows.
#pragma once

#include "visibility.h"

namespace grit {

// elements from the first of x to the first of a slot
GRIT_RANGE int64_t slot_offset(const Rows& x, const Pages& pages, int64_t slot) {
  if (!pages.table) return slot * x.row;
  const uint32_t entry = (uint32_t)slot / pages.size, row = (uint32_t)slot % pages.size;
  return pages.table[entry] * x.page + row * x.row;
}

// slots from this one on that lie one row after another
GRIT_RANGE int64_t slots_in_page(const Pages& pages, int64_t slot) {
  return pages.table ? pages.size - (uint32_t)slot % pages.size : INT64_MAX;
}

}  // namespace grit
