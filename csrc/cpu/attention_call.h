// An attention call, checked: its tensors, its samples, and the rows that no sample owns.
#pragma once

#include <tuple>
#include <vector>

#include "../problem.h"
#include "../torch_api.h"
#include "attention.h"

namespace grit {

// See grit_kernels/attention/problem.py.
struct AttentionProblem {
  Tensor q_start, q_len, k_start, k_len, left, right;
  std::optional<Tensor> hi;
  int64_t q_rows, k_rows, max_q, max_k;
  double softmax_scale, softcap;
  using Fields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, int64_t, int64_t, int64_t,
                            int64_t, double, double>;
};

struct AttentionCall {
  Attention attention;
  std::vector<Sample> samples;
  int64_t rows_q, rows_k;
};

AttentionCall take_apart(const AttentionProblem&, const Tensor& q, const Tensor& k, const Tensor& v);

Rows rows_of(const Tensor&, const char* name, DType, int64_t rows, int64_t heads, int64_t dim);

// ranges [first, last) of rows that no sample owns
struct Gap {
  int64_t first, last;
};
std::vector<Gap> gaps(const AttentionCall&, bool of_keys);

// Key blocks that the attention kernels have visited since the last reset; tests read it.
void count_visited_blocks(int64_t);

}  // namespace grit
