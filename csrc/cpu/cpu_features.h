// What this CPU and operating system offer.
#pragma once

namespace grit {

struct CpuFeatures {
  bool avx2, avx512, avx512_bf16;
  bool amx;  // bfloat16 tile products that this process may use
  // FP32 products are at least as fast as those of bfloat16 pairs: Intel's CPUs multiply pairs at half that rate, where
  // other CPUs multiply them at twice the rate
  bool slow_bf16_pairs;
  const char* amx_reason;  // why amx is false, or empty
};

// Asks the kernel for the tile registers on the first call, when the CPU has them.
const CpuFeatures& cpu_features();

}  // namespace grit
