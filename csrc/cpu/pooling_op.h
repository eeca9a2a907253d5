#pragma once

#include "../pooling_problem.h"

namespace grit {

Tensor pool_forward(const PoolingProblem&);
std::tuple<Tensor, Tensor> pool_backward(const PoolingProblem&, Tensor grad_out);

}  // namespace grit
