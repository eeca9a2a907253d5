// The part of torch's stable ABI that the ops use. Only torch/csrc/stable and torch/headeronly may be included: they are
// headers over a C interface, so one library serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "dtype.h"

namespace grit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
      return DType::float32;
  }
}

inline const int32_t* int32_data(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == count, name,
                  ": expected a contiguous int32 tensor of ", count, " elements");
  return t.const_data_ptr<int32_t>();
}

inline const float* float_data(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count, name,
                  ": expected a contiguous float32 tensor of ", count, " elements");
  return t.const_data_ptr<float>();
}

}  // namespace grit
