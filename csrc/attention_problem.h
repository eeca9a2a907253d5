// Arguments of the attention ops, see grit_kernels/attention/problem.py.
#pragma once

#include <tuple>

#include "problem.h"
#include "torch_api.h"

namespace grit {

struct AttentionProblem {
  Tensor q_start, q_len, k_start, k_len, left, right;
  std::optional<Tensor> hi;
  int64_t q_rows, k_rows, max_q, max_k;
  double softmax_scale, softcap;
  using Fields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, int64_t, int64_t, int64_t,
                            int64_t, double, double>;
};

}  // namespace grit
