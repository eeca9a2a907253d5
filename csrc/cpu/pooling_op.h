#pragma once

#include <tuple>

#include "../problem.h"
#include "../torch_api.h"

namespace grit {

// Arguments of the pooling ops, see grit_kernels/pooling/problem.py.
struct PoolingProblem {
  Tensor hidden, weights, row_start, row_end, denominators;
  std::optional<Tensor> norm_weight;
  double norm_eps;
  using Fields = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, double>;

  int64_t rows() const { return hidden.size(0); }
  int64_t columns() const { return hidden.size(1); }
  int64_t samples() const { return row_start.numel(); }

  // shapes, layouts and dtypes
  void check() const {
    STD_TORCH_CHECK(hidden.dim() == 2, "hidden: expected (rows, columns), got ", hidden.dim(), " dimensions");
    STD_TORCH_CHECK(columns() == 0 || hidden.stride(1) == 1, "hidden: the last dimension must be contiguous");
    int32_data(row_start, samples(), "row_start");
    int32_data(row_end, samples(), "row_end");
    float_data(denominators, samples(), "denominators");
    float_data(weights, rows(), "weights");
  }
};

Tensor pool_forward(const PoolingProblem&);
std::tuple<Tensor, Tensor> pool_backward(const PoolingProblem&, Tensor grad_out);

}  // namespace grit
