// Tensors as the plain arguments of kernels.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../torch_api.h"
#include "kernels.h"

namespace grit {

// a small contiguous tensor, copied to FP32
inline std::vector<float> as_floats(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count, name, ": expected a contiguous tensor of ", count, " elements");
  std::vector<float> values(count);
  switch (dtype_of(t, name)) {
    case DType::float32:
      std::memcpy(values.data(), t.const_data_ptr(), (size_t)count * sizeof(float));
      break;
    case DType::bfloat16: {
      auto* p = (const torch::headeronly::BFloat16*)t.const_data_ptr();
      for (int64_t i = 0; i < count; ++i) values[i] = (float)p[i];
      break;
    }
    case DType::float16: {
      auto* p = (const torch::headeronly::Half*)t.const_data_ptr();
      for (int64_t i = 0; i < count; ++i) values[i] = (float)p[i];
      break;
    }
  }
  return values;
}

// to a small contiguous tensor, each rounded once
inline void write_floats(const std::vector<double>& values, Tensor& t, const char* name) {
  void* data = t.mutable_data_ptr();
  switch (dtype_of(t, name)) {
    case DType::float32:
      std::copy(values.begin(), values.end(), (float*)data);
      break;
    case DType::bfloat16:
      for (size_t i = 0; i < values.size(); ++i) ((torch::headeronly::BFloat16*)data)[i] = (float)values[i];
      break;
    case DType::float16:
      for (size_t i = 0; i < values.size(); ++i) ((torch::headeronly::Half*)data)[i] = (float)values[i];
      break;
  }
}

}  // namespace grit
