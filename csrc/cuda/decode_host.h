#pragma once

#include <tuple>

#include "../attention_problem.h"

namespace grit {

std::tuple<Tensor, Tensor> attention_decode_on_host(const AttentionProblem&, Tensor q, Tensor k, Tensor v,
                                                    std::optional<Tensor> used, std::optional<Tensor> sinks);

std::tuple<Tensor, Tensor> attention_decode_paged_on_host(const AttentionProblem&, Tensor q, Tensor k_cache, Tensor v_cache,
                                                          Tensor block_table, std::optional<Tensor> sinks);

}  // namespace grit
