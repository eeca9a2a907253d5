// What one instruction set's object files offer to the code that is compiled for every CPU.
#pragma once

#include <cstdint>

namespace grit {

enum class DType : int32_t { float32, bfloat16, float16 };

// out (columns) = sum over rows first <= t < last with weights[t] != 0 of weights[t] * r_t * hidden[t]
// r_t = 1, or rsqrt(mean(hidden[t]^2) + eps) when normed; rows of weight 0 are never read
struct PoolRows {
  const void* hidden;  // row 0
  DType dtype;
  int64_t row_stride;  // elements
  const float* weights;
  int64_t first, last, columns;
  bool normed;
  float eps;
  float* out;
};

struct Kernels {
  const char* name;
  void (*pool_rows)(const PoolRows&);
};

// The best set this CPU runs, or the one that GRIT_KERNELS_CPU_ISA names.
const Kernels& kernels();

}  // namespace grit
