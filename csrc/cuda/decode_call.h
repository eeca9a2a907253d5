// The ops attention_decode_cuda and attention_decode_paged_cuda, checked and cut into blocks; what runs these is a GPU or the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../attention_problem.h"
#include "decode.h"

namespace grit {

constexpr int64_t MOST_PAIRS = 8;       // of a block, fewer where a lane has more than one load of columns
constexpr int64_t KEYS_PER_PART = 256;  // at least, where the keys of a sample are split
constexpr int64_t MOST_PARTS = 64;

constexpr int64_t most_pairs(int64_t dim) { return MOST_PAIRS / loads(dim); }

// whose registers a multiprocessor holds at the same time
constexpr int64_t blocks_per_processor(int64_t pairs, int64_t dim) {
  const int64_t held = pairs * loads(dim);
  return held >= 8 ? 2 : held >= 4 ? 3 : 4;
}

// A call; `tensors` keeps what the arguments point to.
struct DecodeCall {
  DecodeArguments arguments;
  DType dtype;
  int64_t heads_kv, pairs, tiles;  // pairs of a block, and blocks per part, sample and head of keys
  Tensor out, lse, tensors[4];
};

// with every head of a key at a multiple of 16 bytes
inline Tensor aligned_keys(const Tensor& x) {
  const int64_t step = x.scalar_type() == ScalarType::Float ? 4 : 8;
  auto whole = [&](const Tensor& t) {
    bool all = (size_t)t.const_data_ptr() % 16 == 0;
    for (int64_t i = 0; i + 1 < t.dim(); ++i) all = all && t.stride(i) % step == 0;
    return all;
  };
  return whole(x) ? x : torch::stable::contiguous(torch::stable::clone(x));
}

// (rows, heads, dim), or the first of the pages (blocks, page, heads, dim)
inline Rows rows_to_read(const Tensor& t, const char* name, const Tensor& q, int64_t heads) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last - 1) == heads && t.size(last) == q.size(2) && t.scalar_type() == q.scalar_type(), name,
                  ": expected (rows, ", heads, ", ", q.size(2), ") in the dtype of q");
  STD_TORCH_CHECK(t.stride(last) == 1 || t.numel() == 0, name, ": the last dimension must be contiguous");
  return {t.const_data_ptr(), t.stride(last - 2), t.stride(last - 1), t.stride(0)};
}

inline DecodeCall take_decode_apart(const AttentionProblem& x, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const std::optional<Tensor>& used, const std::optional<Tensor>& table,
                                    const std::optional<Tensor>& sinks, int64_t processors) {
  DecodeCall call{};
  DecodeArguments& a = call.arguments;
  call.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == (table ? 4 : 3),
                  "q, k: expected (rows, heads, dim) tensors, k in pages beside block_table");
  a.dim = q.size(2);
  a.heads = q.size(1);
  call.heads_kv = k.size(k.dim() - 2);
  STD_TORCH_CHECK(a.dim > 0 && a.dim <= LARGEST_HEAD_DIM && a.dim % COLUMNS == 0,
                  "q: expected a head dim that is a multiple of 8 up to ", LARGEST_HEAD_DIM, ", got ", a.dim);
  STD_TORCH_CHECK(call.heads_kv > 0 && a.heads % call.heads_kv == 0, "q: expected a multiple of k's ", call.heads_kv,
                  " heads, got ", a.heads);
  a.group = (int32_t)(a.heads / call.heads_kv);
  STD_TORCH_CHECK(v.dim() == k.dim() && v.size(0) == k.size(0), "v: expected the ", k.size(0), table ? " pages of k" : " rows of k");
  STD_TORCH_CHECK(!table || v.size(1) == k.size(1), "v: expected pages of ", k.size(1), " slots");
  call.tensors[0] = aligned_keys(k);
  call.tensors[1] = aligned_keys(v);
  a.q = rows_to_read(q, "q", q, a.heads);
  a.k = rows_to_read(call.tensors[0], "k", q, call.heads_kv);
  a.v = rows_to_read(call.tensors[1], "v", q, call.heads_kv);
  a.samples = x.q_start.numel();
  STD_TORCH_CHECK(a.samples < 65536 && call.heads_kv < 65536, "q: expected up to 65535 samples and heads of keys");
  a.q_start = int32_data(x.q_start, a.samples, "q_start");
  a.q_len = int32_data(x.q_len, a.samples, "q_len");
  a.k_start = int32_data(x.k_start, a.samples, "k_start");
  a.k_len = int32_data(x.k_len, a.samples, "k_len");
  a.left = int32_data(x.left, a.samples, "left");
  a.right = int32_data(x.right, a.samples, "right");
  a.hi = x.hi ? int32_data(*x.hi, q.size(0), "hi") : nullptr;
  if (table) {
    STD_TORCH_CHECK(table->scalar_type() == ScalarType::Int && table->dim() == 2 && table->size(0) == a.samples &&
                        (table->stride(1) == 1 || table->size(1) < 2),
                    "block_table: expected int32 (", a.samples, ", max_blocks) whose last dimension is contiguous");
    STD_TORCH_CHECK(k.size(0) > 0 && k.size(1) > 0 && k.size(1) * std::max<int64_t>(1, table->size(1)) < (int64_t)1 << 31,
                    "k_cache: expected pages of 1 to 2^31 - 1 slots, and as many in a row of block_table");
    a.pages = {table->const_data_ptr<int32_t>(), (uint32_t)k.size(1)};
    a.entries = table->stride(0);
  }
  if (used) {
    STD_TORCH_CHECK(used->scalar_type() == ScalarType::Bool && used->dim() == 2 && used->size(0) == a.samples &&
                        used->size(1) >= x.max_k && used->is_contiguous(),
                    "used: expected a contiguous bool tensor (", a.samples, ", ", x.max_k, ")");
    a.used = (const uint8_t*)used->const_data_ptr();
    a.slots = used->size(1);
  }
  if (sinks) {
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == a.heads && sinks->is_contiguous(),
                    "sinks: expected a contiguous tensor (", a.heads, ")");
    a.sinks = sinks->const_data_ptr();
    a.sinks_dtype = dtype_of(*sinks, "sinks");
  }
  const double log2_e = 1.4426950408889634;
  a.q_factor = (float)(x.softcap > 0 ? x.softmax_scale / x.softcap : x.softmax_scale * log2_e);
  a.cap = x.softcap > 0 ? (float)(x.softcap * log2_e) : 0.0f;
  a.q_rows = x.q_rows;
  a.most_rows = std::max(x.q_rows, x.max_q);
  const int64_t of_sample = a.most_rows * a.group;
  call.pairs = 1;
  while (call.pairs < std::min(of_sample, most_pairs(a.dim))) call.pairs *= 2;
  call.tiles = (of_sample + call.pairs - 1) / call.pairs;
  const int64_t blocks = std::max<int64_t>(1, call.tiles * call.heads_kv * a.samples);
  const int64_t wanted = (processors * blocks_per_processor(call.pairs, a.dim) + blocks - 1) / blocks;
  const int64_t useful = (x.max_k + KEYS_PER_PART - 1) / KEYS_PER_PART;
  a.splits = (int32_t)std::clamp<int64_t>(std::min(wanted, useful), 1, MOST_PARTS);
  STD_TORCH_CHECK(call.tiles * a.splits < (int64_t)1 << 31, "q: expected fewer rows");
  const auto device = q.device();
  call.out = torch::stable::empty({q.size(0), a.heads, a.dim}, q.scalar_type(), std::nullopt, device);
  call.lse = torch::stable::empty({q.size(0), a.heads}, ScalarType::Float, std::nullopt, device);
  a.out = call.out.mutable_data_ptr();
  a.lse = (float*)call.lse.mutable_data_ptr();
  if (a.splits > 1) {
    const int64_t rows = a.splits * a.samples * a.most_rows * a.heads;
    call.tensors[2] = torch::stable::empty({rows * a.dim}, ScalarType::Float, std::nullopt, device);
    call.tensors[3] = torch::stable::empty({rows}, ScalarType::Float, std::nullopt, device);
    a.part_out = (float*)call.tensors[2].mutable_data_ptr();
    a.part_lse = (float*)call.tensors[3].mutable_data_ptr();
  }
  return call;
}

// run(T{}, integral_constant of DIM, of PAIRS) with the template arguments of the call
template <class Run>
void with_templates(const DecodeCall& call, Run&& run) {
  auto pairs = [&](auto type, auto dim) {
    switch (call.pairs) {
      case 1:
        return run(type, dim, std::integral_constant<int, 1>{});
      case 2:
        return run(type, dim, std::integral_constant<int, 2>{});
      case 4:
        return run(type, dim, std::integral_constant<int, 4>{});
      default:
        return run(type, dim, std::integral_constant<int, (int)most_pairs(decltype(dim)::value)>{});
    }
  };
  auto dim = [&](auto type) {
    const int64_t least = call.arguments.dim;
    if (least <= 32) return pairs(type, std::integral_constant<int, 32>{});
    if (least <= 64) return pairs(type, std::integral_constant<int, 64>{});
    if (least <= 128) return pairs(type, std::integral_constant<int, 128>{});
    if (least <= 256) return pairs(type, std::integral_constant<int, 256>{});
    return pairs(type, std::integral_constant<int, (int)LARGEST_HEAD_DIM>{});
  };
  switch (call.dtype) {
    case DType::float32:
      return dim(float{});
    case DType::bfloat16:
      return dim(torch::headeronly::BFloat16{});
    case DType::float16:
      return dim(torch::headeronly::Half{});
  }
}

}  // namespace grit
