// The CPU implementations of the ops in grit_kernels/attention/op.py.
#pragma once

#include "attention_call.h"

namespace grit {

std::tuple<Tensor, Tensor> attention_forward(const AttentionProblem&, Tensor q, Tensor k, Tensor v);

std::tuple<Tensor, Tensor, Tensor> attention_backward(const AttentionProblem&, Tensor grad_out, std::optional<Tensor> grad_lse,
                                                      Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse);

}  // namespace grit
