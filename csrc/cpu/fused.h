// What lies between the matrix products of a decoder layer, one row at a time: RMSNorm with the residual addition before it,
// rotary embedding of all heads of a token, gate activation times up projection. All arithmetic is FP32.
#pragma once

#include <cstdint>

#include "attention.h"

namespace grit {

// total = x + residual, rounded to its dtype (without a residual, x itself is the total and nothing is stored);
// out = total * rsqrt(mean(total^2) + eps) * gain
struct NormRow {
  const void *x, *residual;  // residual may be null
  void *total, *out;         // total: null without a residual
  const float* gain;
  int64_t columns;
  float eps;
  DType x_dtype, residual_dtype, total_dtype, out_dtype;
};

// grad_gain (columns) is added to, unless null; grad_total: the total's gradient from its other uses, or null
struct NormGradientRow {
  const void *grad_out, *total, *grad_total;
  void* grad_x;  // in the total's dtype, like grad_total
  const float* gain;
  float* grad_gain;
  int64_t columns;
  float eps;
  DType out_dtype, total_dtype;
};

// `heads` vectors of dim elements, the first `rotated` of which are rotated: with halves x1, x2 and c1, c2, s1, s2 of cos and sin
// out = (x1 c1 - x2 s1, x2 c2 + x1 s2), or transposed, for the gradient, (x1 c1 + x2 s2, x2 c2 - x1 s1)
struct RotaryRow {
  const void* x;
  void* out;
  const void *cos, *sin;            // (rotated)
  int64_t heads, x_head, out_head;  // strides in elements
  int64_t dim, rotated;
  DType dtype, table_dtype;
  bool transposed;
};

enum class Gate : int64_t { silu, gelu_tanh };

// out = act(gate) * up; with gradients: grad_gate = grad * up * act'(gate), grad_up = grad * act(gate)
struct GatedRow {
  const void *gate, *up, *grad;
  void *out, *grad_gate, *grad_up;
  int64_t columns;
  DType dtype;
  Gate kind;
};

struct FusedKernels {
  void (*norm)(const NormRow&);
  void (*norm_backward)(const NormGradientRow&);
  void (*rotary)(const RotaryRow&);
  void (*gated)(const GatedRow&);
  void (*gated_backward)(const GatedRow&);
};

}  // namespace grit
