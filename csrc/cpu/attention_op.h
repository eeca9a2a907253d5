// The CPU implementations of the ops in grit_kernels/attention/op.py.
#pragma once

#include <tuple>

#include "../torch_api.h"

namespace grit {

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, Tensor q_start, Tensor q_len, Tensor k_start,
                                             Tensor k_len, Tensor left, Tensor right, std::optional<Tensor> hi, int64_t q_rows,
                                             int64_t k_rows, int64_t max_q, int64_t max_k, double softmax_scale, double softcap);

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                                      Tensor v, Tensor out, Tensor lse, Tensor q_start, Tensor q_len,
                                                      Tensor k_start, Tensor k_len, Tensor left, Tensor right,
                                                      std::optional<Tensor> hi, int64_t q_rows, int64_t k_rows, int64_t max_q,
                                                      int64_t max_k, double softmax_scale, double softcap);

}  // namespace grit
