// The dtypes of kernels, as plain numbers: kernels include nothing of torch.
#pragma once

#include <cstdint>

namespace grit {

enum class DType : int32_t { float32, bfloat16, float16 };

}  // namespace grit
