// attention_backward: packs all operands once, runs the key chunks, then sums their shares of dq.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "attention_call.h"
#include "attention_op.h"
#include "convert.h"
#include "kernels.h"
#include "parallel.h"
#include "visibility.h"

namespace grit {
namespace {

// Key chunks of a sample: enough work items for many cores, few enough partial sums of dq. The length alone decides, so neither
// the number of threads nor the rest of the batch changes any bit.
constexpr int64_t MOST_CHUNKS = 4, LEAST_CHUNK = 512;

int64_t chunk_keys(int64_t keys) {
  const int64_t chunk = std::max(LEAST_CHUNK, (keys + MOST_CHUNKS - 1) / MOST_CHUNKS);
  return (chunk + BACKWARD_KEYS - 1) / BACKWARD_KEYS * BACKWARD_KEYS;
}

struct ChunkItem {
  int64_t sample, kv_head, begin, end, first_tile, last_tile, dq, cost;
};

// Where the packed operands of a sample start, in words.
struct SamplePlan {
  int64_t tiles = 0, keys = 0, queries = 0, first_pack = 0, first_chunk = 0, chunks = 0;
};

int64_t words_per_tile(const Layout& l) { return 4 * l.query_words() + 5 * l.tile_lanes; }

QueryPack pack_at(uint32_t* p, const Layout& l) {
  const int64_t n = l.query_words();
  uint32_t* numbers = p + 4 * n;
  return {p,
          p + n,
          p + 2 * n,
          p + 3 * n,
          (float*)numbers,
          (float*)numbers + l.tile_lanes,
          (float*)numbers + 2 * l.tile_lanes,
          (int32_t*)numbers + 3 * l.tile_lanes,
          (int32_t*)numbers + 4 * l.tile_lanes,
          false};
}

// the rows' shares (rows, heads), added up in their order; empty without sinks
Tensor sink_gradients(const std::optional<Tensor>& sinks, const std::vector<float>& shares) {
  const int64_t heads = sinks ? sinks->numel() : 0;
  std::vector<double> sums(heads);
  for (size_t i = 0; i < shares.size(); i += heads)
    for (int64_t head = 0; head < heads; ++head) sums[head] += shares[i + head];
  Tensor gradients = torch::stable::empty({heads}, sinks ? sinks->scalar_type() : ScalarType::Float);
  if (sinks) write_floats(sums, gradients, "sinks");
  return gradients;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const AttentionProblem& problem, Tensor grad_out,
                                                              std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v,
                                                              Tensor out, Tensor lse, std::optional<Tensor> sinks,
                                                              std::optional<Tensor>, bool) {
  AttentionCall call = take_apart(problem, q, k, v, sinks);
  const Attention& a = call.attention;
  const int64_t size = a.dtype == DType::float32 ? 4 : 2;
  Tensor dq = torch::stable::empty({call.rows_q, a.heads_q, a.dim}, q.scalar_type());
  Tensor dk = torch::stable::empty({call.rows_k, a.heads_kv, a.dim}, q.scalar_type());
  Tensor dv = torch::stable::empty({call.rows_k, a.heads_kv, a.dim}, q.scalar_type());
  // autograd may hand over an expanded or transposed gradient
  if (grad_out.numel() && grad_out.stride(2) != 1) grad_out = torch::stable::contiguous(grad_out);
  if (grad_lse && !grad_lse->is_contiguous()) grad_lse = torch::stable::contiguous(*grad_lse);
  Gradients g = {};
  g.grad_out = rows_of(grad_out, "grad_out", a.dtype, call.rows_q, a.heads_q, a.dim);
  g.out = rows_of(out, "out", a.dtype, call.rows_q, a.heads_q, a.dim);
  g.lse = float_data(lse, call.rows_q * a.heads_q, "lse");
  g.grad_lse = grad_lse ? float_data(*grad_lse, call.rows_q * a.heads_q, "grad_lse") : nullptr;
  use_large_pages(dq.mutable_data_ptr(), dq.numel() * size);
  g.dq = dq.mutable_data_ptr();
  g.dk = dk.mutable_data_ptr();
  g.dv = dv.mutable_data_ptr();
  g.softmax_scale = (float)problem.softmax_scale;
  g.magnitude = (float)std::abs(problem.softmax_scale);
  std::vector<float> sink_shares(sinks ? call.rows_q * a.heads_q : 0);  // 0 for rows that no sample owns
  g.sink_shares = sink_shares.data();

  auto zero = [&](void* data, int64_t heads, int64_t first, int64_t last) {
    const int64_t row = heads * a.dim * size;
    if (first == last) return;  // an empty tensor has no memory
    std::memset((char*)data + first * row, 0, (size_t)((last - first) * row));
  };
  for (const Gap& gap : gaps(call, false)) zero(g.dq, a.heads_q, gap.first, gap.last);
  for (const Gap& gap : gaps(call, true)) {
    zero(g.dk, a.heads_kv, gap.first, gap.last);
    zero(g.dv, a.heads_kv, gap.first, gap.last);
  }

  const Kernels& isa = product_kernels(a.dtype);
  const Layout layout = isa.layout(a.dtype, a.dim);
  const int64_t dq_tile = layout.padded_dim * layout.tile_lanes;
  std::vector<SamplePlan> plans(call.samples.size());
  std::vector<ChunkItem> chunks;
  int64_t words = 0, packs = 0, dq_words = 0;
  struct HeadItem {
    int64_t sample, kv_head, tile;  // tile < 0: the keys
  };
  std::vector<HeadItem> pack_items, tile_items;
  for (int64_t b = 0; b < (int64_t)call.samples.size(); ++b) {
    const Sample& s = call.samples[b];
    if (s.q_len == 0 || s.k_len == 0) {
      zero(g.dq, a.heads_q, s.q_start, s.q_start + s.q_len);
      zero(g.dk, a.heads_kv, s.k_start, s.k_start + s.k_len);
      zero(g.dv, a.heads_kv, s.k_start, s.k_start + s.k_len);
      continue;
    }
    SamplePlan& plan = plans[b];
    plan.tiles = layout.tiles(s, a.group);
    plan.keys = words;
    words += 3 * layout.key_words(s.k_len) * a.heads_kv;
    plan.queries = words;
    words += words_per_tile(layout) * plan.tiles * a.heads_kv;
    plan.first_pack = packs;
    packs += plan.tiles * a.heads_kv;
    plan.first_chunk = (int64_t)chunks.size();
    const int64_t step = chunk_keys(s.k_len);
    plan.chunks = (s.k_len + step - 1) / step;
    for (int64_t head = 0; head < a.heads_kv; ++head) {
      pack_items.push_back({b, head, -1});
      for (int64_t t = 0; t < plan.tiles; ++t) tile_items.push_back({b, head, t});
      for (int64_t begin = 0; begin < s.k_len; begin += step) {
        const int64_t end = std::min(begin + step, s.k_len);
        const RowRange rows = rows_that_see(s, begin, end);
        const bool seen = rows.first < rows.last;
        const int64_t first = seen ? rows.first / layout.lanes * a.group / layout.vectors : 0;
        const int64_t slots = (rows.last + layout.lanes - 1) / layout.lanes * a.group;
        const int64_t last = seen ? std::min(plan.tiles, (slots + layout.vectors - 1) / layout.vectors) : 0;
        chunks.push_back({b, head, begin, end, first, last, dq_words, (end - begin) * (rows.last - rows.first)});
        dq_words += (last - first) * dq_tile;
      }
    }
  }
  pack_items.insert(pack_items.end(), tile_items.begin(), tile_items.end());
  Memory memory = allocate((words + dq_words) * 4);
  uint32_t* packed = (uint32_t*)memory.get();
  float* dq_partial = (float*)packed + words;
  std::vector<QueryPack> query_packs(packs);
  for (int64_t b = 0; b < (int64_t)plans.size(); ++b)
    for (int64_t i = 0; i < plans[b].tiles * a.heads_kv; ++i)
      query_packs[plans[b].first_pack + i] = pack_at(packed + plans[b].queries + i * words_per_tile(layout), layout);

  auto tile_of = [&](const HeadItem& item) {
    const int64_t slot = item.tile * layout.vectors, slots = layout.slots(call.samples[item.sample], a.group);
    return Tile{item.kv_head, slot, std::min(layout.vectors, slots - slot)};
  };
  auto pack_of = [&](const HeadItem& item) -> QueryPack& {
    const SamplePlan& plan = plans[item.sample];
    return query_packs[plan.first_pack + item.kv_head * plan.tiles + item.tile];
  };
  auto keys_of = [&](int64_t b, int64_t head) {
    return packed + plans[b].keys + 3 * layout.key_words(call.samples[b].k_len) * head;
  };
  auto key_pack_of = [&](int64_t b, int64_t head) {
    const uint32_t* keys = keys_of(b, head);
    const int64_t n = layout.key_words(call.samples[b].k_len);
    return KeyPack{keys, keys + n, keys + 2 * n};
  };
  std::atomic<bool> any_apart{false};
  run_items(isa.thread, (int64_t)pack_items.size(), 0, [&](int64_t i, void*) {
    const HeadItem& item = pack_items[i];
    const Sample& s = call.samples[item.sample];
    if (item.tile < 0) {
      uint32_t* keys = keys_of(item.sample, item.kv_head);
      const int64_t n = layout.key_words(s.k_len);
      isa.backward_pack_keys(a, s, item.kv_head, keys, keys + n, keys + 2 * n);
    } else {
      QueryPack& pack = pack_of(item);
      pack.apart = isa.backward_pack_queries(a, g, s, tile_of(item), pack);
      if (pack.apart) any_apart = true;
    }
  });
  const int64_t scratch_bytes = isa.backward_scratch(a.dtype, a.dim);
  if (any_apart)
    run_items(isa.thread, (int64_t)tile_items.size(), scratch_bytes, [&](int64_t i, void* scratch) {
      const HeadItem& item = tile_items[i];
      const QueryPack& pack = pack_of(item);
      if (pack.apart) isa.backward_take_apart(a, call.samples[item.sample], tile_of(item), key_pack_of(item.sample, item.kv_head), pack, scratch);
    });

  std::vector<int64_t> order(chunks.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = (int64_t)i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return chunks[x].cost > chunks[y].cost; });
  run_items(isa.thread, (int64_t)order.size(), scratch_bytes, [&](int64_t i, void* scratch) {
    const ChunkItem& c = chunks[order[i]];
    const Sample& s = call.samples[c.sample];
    const SamplePlan& plan = plans[c.sample];
    float* added = dq_partial + c.dq;
    std::memset(added, 0, (size_t)((c.last_tile - c.first_tile) * dq_tile) * sizeof(float));
    count_visited_blocks(isa.backward_keys(a, g, s, c.kv_head, c.begin, c.end, c.first_tile, key_pack_of(c.sample, c.kv_head),
                                           query_packs.data() + plan.first_pack + c.kv_head * plan.tiles, added, scratch));
  });
  run_items(isa.thread, (int64_t)tile_items.size(), scratch_bytes, [&](int64_t i, void* scratch) {
    const HeadItem& item = tile_items[i];
    const SamplePlan& plan = plans[item.sample];
    const float* parts[MOST_CHUNKS];
    int64_t count = 0;
    for (int64_t n = 0; n < plan.chunks; ++n) {
      const ChunkItem& c = chunks[plan.first_chunk + item.kv_head * plan.chunks + n];
      if (item.tile >= c.first_tile && item.tile < c.last_tile) parts[count++] = dq_partial + c.dq + (item.tile - c.first_tile) * dq_tile;
    }
    isa.backward_store_dq(a, g, call.samples[item.sample], tile_of(item), pack_of(item), count, parts, scratch);
  });
  return {dq, dk, dv, sink_gradients(sinks, sink_shares)};
}

}  // namespace grit
