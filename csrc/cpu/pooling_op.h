#pragma once

#include <tuple>

#include "../torch_api.h"

namespace grit {

Tensor pool_forward(Tensor hidden, Tensor weights, Tensor row_start, Tensor row_end, Tensor denominators,
                    std::optional<Tensor> norm_weight, double norm_eps);

std::tuple<Tensor, Tensor> pool_backward(Tensor grad_out, Tensor hidden, Tensor weights, Tensor row_start, Tensor row_end,
                                         Tensor denominators, std::optional<Tensor> norm_weight, double norm_eps);

}  // namespace grit
