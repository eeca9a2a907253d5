// attention_decode_cuda and attention_decode_paged_cuda on a GPU, see decode.h.
#include <cuda_runtime.h>

#include "decode_call.h"
#include "../signatures.h"

namespace grit {
namespace {

// grid: (parts * tiles, heads of keys, samples)
template <class T, int DIM, int PAIRS>
__global__ void __launch_bounds__(THREADS, blocks_per_processor(PAIRS, DIM)) decode_kernel(const DecodeArguments a) {
  using Block = Decode<GpuWarp, T, DIM, PAIRS>;
  __shared__ typename Block::Shared shared;
  const auto tile = Block::tile_of(a, (int32_t)blockIdx.x, blockIdx.y, blockIdx.z);
  Block::read_keys(a, tile, (int)threadIdx.x / LANES, shared);
  __syncthreads();
  Block::finish(a, tile, (int)threadIdx.x, shared);
}

// grid: (most_rows * heads, samples), a thread per column
template <class T>
__global__ void merge_kernel(const DecodeArguments a) {
  if (threadIdx.x < a.dim) merge_column<T>(a, blockIdx.y, blockIdx.x / a.heads, blockIdx.x % a.heads, threadIdx.x);
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

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

std::tuple<Tensor, Tensor> run(const AttentionProblem& problem, const Tensor& q, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& used, const std::optional<Tensor>& table,
                               const std::optional<Tensor>& sinks) {
  const int device = q.get_device_index();
  const DeviceGuard guard(device);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const DecodeCall call = take_decode_apart(problem, q, k, v, used, table, sinks, processors);
  const DecodeArguments& a = call.arguments;
  if (call.out.numel() == 0 || call.tiles == 0 || a.samples == 0) return {call.out, call.lse};
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "CUDA: no current stream");
  with_templates(call, [&](auto type, auto dim, auto pairs) {
    using T = decltype(type);
    const dim3 grid((unsigned)(a.splits * call.tiles), (unsigned)call.heads_kv, (unsigned)a.samples);
    decode_kernel<T, decltype(dim)::value, decltype(pairs)::value><<<grid, THREADS, 0, (cudaStream_t)stream>>>(a);
    check(cudaGetLastError());
    if (a.splits > 1) {
      const dim3 places((unsigned)(a.most_rows * a.heads), (unsigned)a.samples);
      merge_kernel<T><<<places, (unsigned)((a.dim + LANES - 1) / LANES * LANES), 0, (cudaStream_t)stream>>>(a);
      check(cudaGetLastError());
    }
  });
  return {call.out, call.lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_decode_cuda(const AttentionProblem& problem, Tensor q, Tensor k, Tensor v,
                                                 std::optional<Tensor> used, std::optional<Tensor> sinks) {
  return run(problem, q, k, v, used, std::nullopt, sinks);
}

std::tuple<Tensor, Tensor> attention_decode_paged_cuda(const AttentionProblem& problem, Tensor q, Tensor k_cache, Tensor v_cache,
                                                       Tensor block_table, std::optional<Tensor> sinks) {
  return run(problem, q, k_cache, v_cache, std::nullopt, block_table, sinks);
}

}  // namespace grit

STABLE_TORCH_LIBRARY_IMPL(grit_kernels, CUDA, m) {
  GRIT_OP(m, "attention_decode_cuda", &grit::Flat<&grit::attention_decode_cuda, 5>::call);
  GRIT_OP(m, "attention_decode_paged_cuda", &grit::Flat<&grit::attention_decode_paged_cuda, 5>::call);
}

GRIT_EXPORT_SIGNATURES
