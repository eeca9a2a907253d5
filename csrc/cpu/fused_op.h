#pragma once

#include <tuple>

#include "../torch_api.h"

namespace grit {

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, std::optional<Tensor> residual, double eps, double offset,
                                            ScalarType out_dtype);

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_out, std::optional<Tensor> grad_total, Tensor total, Tensor weight,
                                             double eps, double offset, bool need_weight);

std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed);

Tensor gated_forward(Tensor gate, Tensor up, int64_t kind);

std::tuple<Tensor, Tensor> gated_backward(Tensor grad, Tensor gate, Tensor up, int64_t kind);

}  // namespace grit
