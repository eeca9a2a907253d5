#pragma once

#include <tuple>

#include "../attention_problem.h"

namespace grit {

std::tuple<Tensor, Tensor> attention_decode_on_host(const AttentionProblem&, Tensor q, Tensor k, Tensor v,
                                                    std::optional<Tensor> used, std::optional<Tensor> sinks);

}  // namespace grit
