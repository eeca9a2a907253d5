// An attention call taken apart: checked tensors, samples, rows that no sample owns.
#pragma once

#include <vector>

#include "../torch_api.h"
#include "attention.h"

namespace grit {

// The arguments that forward and backward share, see grit_kernels/attention/op.py.
struct AttentionArguments {
  const Tensor &q, &k, &v, &q_start, &q_len, &k_start, &k_len, &left, &right;
  const std::optional<Tensor>& hi;
  double softmax_scale, softcap;
};

struct AttentionCall {
  Attention attention;
  std::vector<Sample> samples;
  int64_t rows_q, rows_k;
};

AttentionCall take_apart(const AttentionArguments&);

Rows rows_of(const Tensor&, const char* name, DType, int64_t rows, int64_t heads, int64_t dim);

// [first, last) stretches of rows that no sample owns
struct Gap {
  int64_t first, last;
};
std::vector<Gap> gaps(const AttentionCall&, bool of_keys);

// Key blocks that the attention kernels have visited since the last reset (tests read it).
void count_visited_blocks(int64_t);

}  // namespace grit
