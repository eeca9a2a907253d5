// pool_forward on CUDA: out[b] = sum_t weights[t] * r_t * hidden[t] * norm_weight / denominators[b], see pooling/reference.py.
//
// A block owns COLUMNS columns of one sample and a share of its rows: each thread takes VECTOR columns, the warps of the block
// stride over the rows. With a fused norm, every row's factor r_t is computed first, by one block per row. A second kernel sums
// the shares of a sample in a fixed order: results do not depend on scheduling.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../pooling_problem.h"

namespace grit {
namespace {

constexpr int VECTOR = 8;   // columns per thread: one 16-byte load of 16-bit values
constexpr int WARPS = 8;    // rows in flight per block
constexpr int COLUMNS = 32 * VECTOR;

template <class T>
__device__ inline void load_columns(const T* p, int64_t left, bool aligned, float* x) {
  if (aligned && left >= VECTOR) {
    alignas(16) T raw[VECTOR];
#pragma unroll
    for (int i = 0; i < (int)(VECTOR * sizeof(T) / 16); ++i) ((uint4*)raw)[i] = ((const uint4*)p)[i];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[i] = (float)raw[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) x[i] = i < left ? (float)p[i] : 0.0f;
}

// factor[t] = weights[t] * rsqrt(mean(hidden[t]^2) + eps); one block per row, 0 for rows that are not pooled
template <class T>
__global__ void norm_factors(const T* hidden, int64_t row_stride, int64_t columns, const float* weights, float eps,
                             float* factor) {
  const int64_t t = blockIdx.x;
  if (weights[t] == 0) {
    if (threadIdx.x == 0) factor[t] = 0;
    return;
  }
  float sum = 0;
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
    float x = (float)hidden[t * row_stride + c];
    sum += x * x;
  }
  __shared__ float of_warp[32];
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < (int)blockDim.x / 32; ++w) total += of_warp[w];
    factor[t] = weights[t] * rsqrtf(total / (float)columns + eps);
  }
}

template <class T>
__global__ void pool_share(const T* hidden, int64_t row_stride, int64_t columns, const float* factor,
                           const int32_t* row_start, const int32_t* row_end, const float* denominators, int shares,
                           bool aligned, float* partial) {
  const int64_t sample = blockIdx.z;
  const int share = blockIdx.y, warp = threadIdx.y;
  const int64_t column = (int64_t)blockIdx.x * COLUMNS + threadIdx.x * VECTOR;
  float sum[VECTOR] = {};
  const int64_t first = row_start[sample], last = denominators[sample] > 0 ? row_end[sample] : first;
  const int64_t per_share = (last - first + shares - 1) / shares;
  const int64_t begin = first + share * per_share, end = min(last, begin + per_share);
  if (column < columns) {
    for (int64_t t = begin + warp; t < end; t += WARPS) {
      const float w = factor[t];
      if (w == 0) continue;
      float x[VECTOR];
      load_columns(hidden + t * row_stride + column, columns - column, aligned, x);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sum[i] += w * x[i];
    }
  }
  __shared__ float of_warp[WARPS][COLUMNS];
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) of_warp[warp][threadIdx.x * VECTOR + i] = sum[i];
  __syncthreads();
  const int c = warp * 32 + threadIdx.x;
  if ((int64_t)blockIdx.x * COLUMNS + c < columns) {
    float total = 0;
    for (int w = 0; w < WARPS; ++w) total += of_warp[w][c];
    partial[(sample * shares + share) * columns + (int64_t)blockIdx.x * COLUMNS + c] = total;
  }
}

template <class G>
__global__ void pool_finish(const float* partial, int shares, int64_t columns, const float* denominators, const G* gain,
                            float* out) {
  const int64_t sample = blockIdx.y, c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  const float denominator = denominators[sample];
  float total = 0;
  if (denominator > 0) {
    for (int s = 0; s < shares; ++s) total += partial[(sample * shares + s) * columns + c];
    if (gain) total *= (float)gain[c];
    total /= denominator;
  }
  out[sample * columns + c] = total;
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

struct Call {
  const PoolingProblem& problem;
  Tensor out;
  cudaStream_t stream;
};

template <class T>
void launch(const Call& call) {
  const PoolingProblem& problem = call.problem;
  const int64_t rows = problem.rows(), columns = problem.columns(), batch = problem.samples();
  const T* hidden = (const T*)problem.hidden.const_data_ptr();
  const int64_t row_stride = problem.hidden.stride(0);
  const float* factor = problem.weights.const_data_ptr<float>();
  auto scratch = [&](int64_t count) {
    return torch::stable::empty({count}, ScalarType::Float, std::nullopt, problem.hidden.device());
  };
  Tensor factors = problem.weights;
  if (problem.norm_weight && rows) {
    factors = scratch(rows);
    norm_factors<T><<<(unsigned)rows, 256, 0, call.stream>>>(hidden, row_stride, columns, factor, (float)problem.norm_eps,
                                                             (float*)factors.mutable_data_ptr());
    check(cudaGetLastError());
    factor = (const float*)factors.const_data_ptr();
  }
  // enough blocks to fill a GPU however few samples there are, at least 64 rows per share; depends on shapes alone, not on values
  const int64_t column_blocks = (columns + COLUMNS - 1) / COLUMNS;
  const int64_t wanted = (2048 + batch * column_blocks - 1) / (batch * column_blocks);
  const int64_t useful = std::max<int64_t>(1, rows / batch / 64);
  const int shares = (int)std::max<int64_t>(1, std::min<int64_t>({wanted, useful, 1024}));
  Tensor partial = scratch(batch * shares * columns);
  const bool aligned = (size_t)hidden % 16 == 0 && (row_stride * sizeof(T)) % 16 == 0;
  const dim3 grid((unsigned)column_blocks, (unsigned)shares, (unsigned)batch);
  pool_share<T><<<grid, dim3(32, WARPS), 0, call.stream>>>(
      hidden, row_stride, columns, factor, (const int32_t*)problem.row_start.const_data_ptr(),
      (const int32_t*)problem.row_end.const_data_ptr(), (const float*)problem.denominators.const_data_ptr(), shares, aligned,
      (float*)partial.mutable_data_ptr());
  check(cudaGetLastError());
  const dim3 finish((unsigned)((columns + 255) / 256), (unsigned)batch);
  auto run_finish = [&](auto* gain) {
    pool_finish<<<finish, 256, 0, call.stream>>>((const float*)partial.const_data_ptr(), shares, columns,
                                                 (const float*)problem.denominators.const_data_ptr(), gain,
                                                 (float*)call.out.mutable_data_ptr());
  };
  if (!problem.norm_weight) {
    run_finish((const float*)nullptr);
  } else if (problem.norm_weight->scalar_type() == ScalarType::Float) {
    run_finish((const float*)problem.norm_weight->const_data_ptr());
  } else if (problem.norm_weight->scalar_type() == ScalarType::BFloat16) {
    run_finish((const __nv_bfloat16*)problem.norm_weight->const_data_ptr());
  } else {
    STD_TORCH_CHECK(problem.norm_weight->scalar_type() == ScalarType::Half,
                    "norm_weight: expected float32, bfloat16 or float16");
    run_finish((const __half*)problem.norm_weight->const_data_ptr());
  }
  check(cudaGetLastError());
}

// Makes a device the current one until the end of the scope, even if a launch throws.
struct DeviceGuard {
  int previous = 0;
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous); }
  DeviceGuard(const DeviceGuard&) = delete;
};

}  // namespace

Tensor pool_forward_cuda(const PoolingProblem& problem) {
  problem.check();
  const Tensor& hidden = problem.hidden;
  const std::optional<Tensor>& norm_weight = problem.norm_weight;
  const int64_t rows = problem.rows(), columns = problem.columns(), batch = problem.samples();
  STD_TORCH_CHECK(batch < 65536 && rows < (int64_t)1 << 31, "row_start: expected up to 65535 samples of 2**31 rows");
  if (norm_weight)
    STD_TORCH_CHECK(norm_weight->is_contiguous() && norm_weight->numel() == columns,
                    "norm_weight: expected a contiguous tensor of ", columns, " elements");
  Tensor out = torch::stable::empty({batch, columns}, ScalarType::Float, std::nullopt, hidden.device());
  if (batch == 0 || columns == 0) return out;
  const DeviceGuard guard(hidden.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(hidden.get_device_index(), &stream) == 0, "CUDA: no current stream");
  const Call call{problem, out, (cudaStream_t)stream};
  switch (hidden.scalar_type()) {
    case ScalarType::Float:
      launch<float>(call);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16>(call);
      break;
    case ScalarType::Half:
      launch<__half>(call);
      break;
    default:
      STD_TORCH_CHECK(false, "hidden: expected float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace grit

STABLE_TORCH_LIBRARY_IMPL(grit_kernels, CUDA, m) { m.impl("pool_forward_cuda", TORCH_BOX((&grit::Flat<&grit::pool_forward_cuda, 0>::call))); }
