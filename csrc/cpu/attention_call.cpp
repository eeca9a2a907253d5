#include "attention_call.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>

#include "convert.h"

namespace grit {
namespace {

std::atomic<int64_t> visited{0};

}  // namespace

void count_visited_blocks(int64_t blocks) { visited.fetch_add(blocks, std::memory_order_relaxed); }

Rows rows_of(const Tensor& t, const char* name, DType dtype, int64_t rows, int64_t heads, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == rows && t.size(1) == heads && t.size(2) == dim, name, ": expected (", rows,
                  ", ", heads, ", ", dim, ")");
  STD_TORCH_CHECK(t.stride(2) == 1 || t.numel() == 0, name, ": the last dimension must be contiguous");
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, ": its dtype differs from that of q");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

namespace {

Rows pages_of(const Tensor& t, const char* name, DType dtype, const Tensor& k_cache, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == k_cache.size(0) && t.size(1) == k_cache.size(1) && t.size(2) == k_cache.size(2) &&
                      t.size(3) == dim,
                  name, ": expected (", k_cache.size(0), ", ", k_cache.size(1), ", ", k_cache.size(2), ", ", dim, ")");
  STD_TORCH_CHECK(t.stride(3) == 1 || t.numel() == 0, name, ": the last dimension must be contiguous");
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, ": its dtype differs from that of q");
  return {t.const_data_ptr(), t.stride(1), t.stride(2), t.stride(0)};
}

// the pages of sample b, whose slots [first, end) lie in blocks of the cache
Pages pages_of(const Tensor& block_table, const Tensor& k_cache, int64_t b, int64_t first, int64_t end) {
  const int32_t* table = block_table.const_data_ptr<int32_t>() + b * block_table.stride(0);
  const int64_t blocks = k_cache.size(0), size = k_cache.size(1);
  for (int64_t entry = first / std::max<int64_t>(size, 1); entry * size < end && first < end; ++entry)
    STD_TORCH_CHECK(table[entry] >= 0 && table[entry] < blocks, "block_table: expected entries in 0..", blocks - 1,
                    ", the blocks of k_cache, got ", table[entry], " as entry ", entry, " of sample ", b);
  return {table, (uint32_t)std::min<int64_t>(size, UINT32_MAX)};
}

}  // namespace

AttentionCall take_apart(const AttentionProblem& x, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& sinks, const Tensor* block_table) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == (block_table ? 4 : 3),
                  "q, k: expected (rows, heads, dim) tensors, k in pages beside block_table");
  AttentionCall call;
  Attention& a = call.attention;
  a = {};
  a.dtype = dtype_of(q, "q");
  a.dim = q.size(2);
  a.heads_q = q.size(1);
  a.heads_kv = k.size(block_table ? 2 : 1);
  STD_TORCH_CHECK(a.dim > 0 && a.dim <= LARGEST_HEAD_DIM && a.dim % 8 == 0, "q: expected a head dim that is a multiple of 8 up to ",
                  LARGEST_HEAD_DIM, ", got ", a.dim);
  STD_TORCH_CHECK(a.heads_kv > 0 && a.heads_q % a.heads_kv == 0, "q: expected a multiple of k's ", a.heads_kv, " heads, got ", a.heads_q);
  a.group = a.heads_q / a.heads_kv;
  call.rows_q = q.size(0);
  a.q = rows_of(q, "q", a.dtype, call.rows_q, a.heads_q, a.dim);
  const int64_t batch = x.q_start.numel();
  if (block_table) {
    STD_TORCH_CHECK(block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2 && block_table->size(0) == batch &&
                        (block_table->stride(1) == 1 || block_table->size(1) < 2),
                    "block_table: expected int32 (", batch, ", max_blocks) whose last dimension is contiguous");
    call.rows_k = block_table->size(1) * k.size(1);
    a.k = pages_of(k, "k_cache", a.dtype, k, a.dim);
    a.v = pages_of(v, "v_cache", a.dtype, k, a.dim);
  } else {
    call.rows_k = k.size(0);
    a.k = rows_of(k, "k", a.dtype, call.rows_k, a.heads_kv, a.dim);
    a.v = rows_of(v, "v", a.dtype, call.rows_k, a.heads_kv, a.dim);
  }
  const double magnitude = std::abs(x.softmax_scale), log2_e = 1.4426950408889634;
  a.negate = x.softmax_scale < 0;
  // a scale of 0 would turn the -inf of a masked score into NaN; one this small changes no score
  a.scale_log2 = std::max((float)(magnitude * log2_e), FLT_MIN);
  a.capped = x.softcap > 0;
  a.cap_in = a.capped ? (float)(magnitude / x.softcap) : 0;
  a.cap_out = (float)(x.softcap * log2_e);
  if (sinks) {
    call.sinks_log2 = as_floats(sinks->is_contiguous() ? *sinks : torch::stable::contiguous(*sinks), a.heads_q, "sinks");
    for (float& sink : call.sinks_log2) sink = (float)(sink * log2_e);
    a.sinks_log2 = call.sinks_log2.data();
  }

  const int32_t* q_start = int32_data(x.q_start, batch, "q_start");
  const int32_t* q_len = int32_data(x.q_len, batch, "q_len");
  const int32_t* k_start = int32_data(x.k_start, batch, "k_start");
  const int32_t* k_len = int32_data(x.k_len, batch, "k_len");
  const int32_t* left = int32_data(x.left, batch, "left");
  const int32_t* right = int32_data(x.right, batch, "right");
  const int32_t* hi = x.hi ? int32_data(*x.hi, call.rows_q, "hi") : nullptr;
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(q_len[b] >= 0 && q_start[b] >= 0 && (int64_t)q_start[b] + q_len[b] <= call.rows_q, "q_start, q_len: sample ", b,
                    " has rows [", q_start[b], ", ", (int64_t)q_start[b] + q_len[b], "), q has ", call.rows_q);
    STD_TORCH_CHECK(k_len[b] >= 0 && k_start[b] >= 0 && (int64_t)k_start[b] + k_len[b] <= call.rows_k, "k_start, k_len: sample ", b,
                    " has rows [", k_start[b], ", ", (int64_t)k_start[b] + k_len[b], "), k has ", call.rows_k);
    call.samples.push_back({q_start[b], q_len[b], k_start[b], k_len[b], left[b], right[b], hi ? hi + q_start[b] : nullptr});
    if (block_table) call.samples.back().pages = pages_of(*block_table, k, b, k_start[b], (int64_t)k_start[b] + k_len[b]);
  }
  return call;
}

std::vector<Gap> gaps(const AttentionCall& call, bool of_keys) {
  std::vector<Gap> owned;
  for (const Sample& s : call.samples) {
    const int64_t start = of_keys ? s.k_start : s.q_start, length = of_keys ? s.k_len : s.q_len;
    if (length) owned.push_back({start, start + length});
  }
  std::sort(owned.begin(), owned.end(), [](const Gap& x, const Gap& y) { return x.first < y.first; });
  std::vector<Gap> found;
  int64_t at = 0;
  for (const Gap& o : owned) {
    if (o.first > at) found.push_back({at, o.first});
    at = std::max(at, o.last);
  }
  const int64_t rows = of_keys ? call.rows_k : call.rows_q;
  if (at < rows) found.push_back({at, rows});
  return found;
}

}  // namespace grit

// Returns the key blocks visited since the last call, summed over tiles; for tests, through ctypes.
extern "C" __attribute__((visibility("default"))) int64_t grit_kernels_visited_key_blocks() { return grit::visited.exchange(0); }
