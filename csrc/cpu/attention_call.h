// An attention call, checked: its tensors, its samples, and the rows that no sample owns.
#pragma once

#include <vector>

#include "../attention_problem.h"
#include "attention.h"

namespace grit {

struct AttentionCall {
  Attention attention;
  std::vector<Sample> samples;
  std::vector<float> sinks_log2;
  int64_t rows_q, rows_k;
};

// block_table: k and v lie in pages (num_blocks, block_size, heads, dim)
AttentionCall take_apart(const AttentionProblem&, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& sinks, const Tensor* block_table = nullptr);

Rows rows_of(const Tensor&, const char* name, DType, int64_t rows, int64_t heads, int64_t dim);

// ranges [first, last) of rows that no sample owns
struct Gap {
  int64_t first, last;
};
std::vector<Gap> gaps(const AttentionCall&, bool of_keys);

// Key blocks that the attention kernels have visited since the last reset; tests read it.
void count_visited_blocks(int64_t);

}  // namespace grit
