// The CPU implementations of the ops in grit_kernels/attention/op.py.
#pragma once

#include "attention_call.h"

namespace grit {

// plan and deterministic are for GPUs: here the order of the work depends on shapes alone
std::tuple<Tensor, Tensor> attention_forward(const AttentionProblem&, Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                             std::optional<Tensor> plan, bool deterministic);

// the same of keys in pages (num_blocks, block_size, heads, dim), whose slots the problem counts; reads them where they are
std::tuple<Tensor, Tensor> attention_decode_paged(const AttentionProblem&, Tensor q, Tensor k_cache, Tensor v_cache,
                                                  Tensor block_table, std::optional<Tensor> sinks);

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const AttentionProblem&, Tensor grad_out,
                                                              std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v,
                                                              Tensor out, Tensor lse, std::optional<Tensor> sinks,
                                                              std::optional<Tensor> plan, bool deterministic);

}  // namespace grit
