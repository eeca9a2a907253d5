// attention_forward: packs K and V once per (sample, key head), then runs tiles; samples with few queries take the split-KV path.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention_call.h"
#include "attention_op.h"
#include "kernels.h"
#include "parallel.h"
#include "visibility.h"

namespace grit {
namespace {

constexpr float MASKED_LSE = -std::numeric_limits<float>::infinity();

void write_masked_rows(const Attention& a, int64_t size, int64_t first, int64_t last) {
  if (first == last) return;  // an empty tensor has no memory
  std::memset((char*)a.out + first * a.heads_q * a.dim * size, 0, (size_t)((last - first) * a.heads_q * a.dim * size));
  std::fill(a.lse + first * a.heads_q, a.lse + last * a.heads_q, MASKED_LSE);
}

struct TileItem {
  int64_t sample, cost;
  Tile tile;
};

// A sample of at most DECODE_ROWS rows, and its partial results [first_part, first_part + parts)
struct DecodeItem {
  int64_t sample, first_part, parts, first_state;
};

void run_tiles(const AttentionCall& call, const Kernels& isa, const std::vector<int64_t>& chosen) {
  const Attention& a = call.attention;
  const Layout layout = isa.layout(a.dtype, a.dim);
  std::vector<int64_t> at(call.samples.size(), 0);
  struct PackItem {
    int64_t sample, kv_head;
  };
  std::vector<PackItem> packs;
  std::vector<TileItem> tiles;
  int64_t words = 0;
  for (int64_t b : chosen) {
    const Sample& s = call.samples[b];
    at[b] = words;
    words += 2 * layout.key_words(s.k_len) * a.heads_kv;
    const int64_t slots = layout.slots(s, a.group);
    for (int64_t head = 0; head < a.heads_kv; ++head) {
      packs.push_back({b, head});
      for (int64_t slot = 0; slot < slots; slot += layout.vectors) {
        const int64_t count = std::min(layout.vectors, slots - slot);
        const int64_t first = slot / a.group * layout.lanes;
        const int64_t last = std::min(s.q_len, ((slot + count - 1) / a.group + 1) * layout.lanes) - 1;
        tiles.push_back({b, count * std::max<int64_t>(0, last_key(s, last) - first_key(s, first)), {head, slot, count}});
      }
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const TileItem& x, const TileItem& y) { return x.cost > y.cost; });
  Memory memory = allocate(words * 4);
  auto keys_of = [&](int64_t b, int64_t head) {
    return (uint32_t*)memory.get() + at[b] + 2 * layout.key_words(call.samples[b].k_len) * head;
  };
  run_items(isa.thread, (int64_t)packs.size(), 0, [&](int64_t i, void*) {
    const Sample& s = call.samples[packs[i].sample];
    uint32_t* k = keys_of(packs[i].sample, packs[i].kv_head);
    isa.pack_keys(a, s, packs[i].kv_head, k, k + layout.key_words(s.k_len));
  });
  run_items(isa.thread, (int64_t)tiles.size(), isa.forward_scratch(a.dtype, a.dim), [&](int64_t i, void* scratch) {
    const Sample& s = call.samples[tiles[i].sample];
    const uint32_t* k = keys_of(tiles[i].sample, tiles[i].tile.kv_head);
    count_visited_blocks(isa.forward_tile(a, s, tiles[i].tile, k, k + layout.key_words(s.k_len), scratch));
  });
}

void run_decode(const AttentionCall& call, const Kernels& isa, const std::vector<int64_t>& chosen) {
  const Attention& a = call.attention;
  const int64_t wide = decode_dim(a.dim), lanes = isa.layout(a.dtype, a.dim).lanes;
  struct PartItem {
    int64_t sample, begin, end, state;
  };
  struct JoinItem {
    int64_t item, row, head;
  };
  std::vector<PartItem> parts;
  std::vector<DecodeItem> items;
  std::vector<JoinItem> joins;
  int64_t states = 0;
  for (int64_t b : chosen) {
    const Sample& s = call.samples[b];
    const int64_t begin = first_key(s, 0), end = last_key(s, s.q_len - 1), slots = s.q_len * a.heads_q;
    DecodeItem item{b, (int64_t)parts.size(), 0, states};
    // parts begin at multiples of DECODE_KEYS, so a window that reaches the first key equals no window bit for bit
    for (int64_t j = begin / DECODE_KEYS * DECODE_KEYS; j < end; j += DECODE_KEYS) {
      parts.push_back({b, std::max(j, begin), std::min(j + DECODE_KEYS, end), states});
      states += slots;
      ++item.parts;
    }
    for (int64_t row = 0; row < s.q_len; ++row)
      for (int64_t head = 0; head < a.heads_q; ++head) joins.push_back({(int64_t)items.size(), row, head});
    items.push_back(item);
  }
  Memory memory = allocate(states * (1 + lanes + wide) * 4);
  float *sums = (float*)memory.get(), *total = sums + states * wide, *maximum = total + states * lanes;
  // consecutive parts go to one thread, which then uses what it has prefetched
  const int64_t count = (int64_t)parts.size(), run = std::clamp<int64_t>(count / (8 * torch::stable::get_num_threads()), 1, 8);
  run_items(isa.thread, (count + run - 1) / run, 0, [&](int64_t i, void*) {
    const int64_t last = std::min(count, (i + 1) * run);
    for (int64_t n = i * run; n < last; ++n) {
      const PartItem& p = parts[n];
      int64_t fetch_end = p.end;
      for (int64_t next = n + 1; next < last && parts[next].sample == p.sample; ++next) fetch_end = parts[next].end;
      isa.decode_part(a, call.samples[p.sample], p.begin, p.end, fetch_end, maximum + p.state, total + p.state * lanes,
                      sums + p.state * wide);
      count_visited_blocks(1);
    }
  });
  const int64_t grain = 64;
  run_items(isa.thread, ((int64_t)joins.size() + grain - 1) / grain, 0, [&](int64_t i, void*) {
    for (int64_t n = i * grain; n < std::min((int64_t)joins.size(), (i + 1) * grain); ++n) {
      const DecodeItem& item = items[joins[n].item];
      const Sample& s = call.samples[item.sample];
      const int64_t state = item.first_state + joins[n].row * a.heads_q + joins[n].head;
      isa.decode_join(a, s.q_start + joins[n].row, joins[n].head, item.parts, s.q_len * a.heads_q, maximum + state,
                      total + state * lanes, sums + state * wide);
    }
  });
}

std::tuple<Tensor, Tensor> run(AttentionCall call, ScalarType dtype) {
  Attention& a = call.attention;
  Tensor out = torch::stable::empty({call.rows_q, a.heads_q, a.dim}, dtype);
  Tensor lse = torch::stable::empty({call.rows_q, a.heads_q}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.lse = (float*)lse.mutable_data_ptr();
  const int64_t size = a.dtype == DType::float32 ? 4 : 2;
  use_large_pages(a.out, out.numel() * size);
  for (const Gap& gap : gaps(call, false)) write_masked_rows(a, size, gap.first, gap.last);
  std::vector<int64_t> tiled, decoded;
  for (int64_t b = 0; b < (int64_t)call.samples.size(); ++b) {
    const Sample& s = call.samples[b];
    if (s.q_len == 0) continue;
    if (s.k_len == 0) write_masked_rows(a, size, s.q_start, s.q_start + s.q_len);
    // the choice depends on the sample alone: in a batch, each sample gets the bits it would get by itself
    else (s.q_len <= DECODE_ROWS && s.k_len > 4 * s.q_len ? decoded : tiled).push_back(b);
  }
  const Kernels& isa = product_kernels(a.dtype);
  if (!tiled.empty()) run_tiles(call, isa, tiled);
  if (!decoded.empty()) run_decode(call, isa, decoded);
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const AttentionProblem& problem, Tensor q, Tensor k, Tensor v,
                                             std::optional<Tensor> sinks, std::optional<Tensor>, bool) {
  return run(take_apart(problem, q, k, v, sinks), q.scalar_type());
}

std::tuple<Tensor, Tensor> attention_decode_paged(const AttentionProblem& problem, Tensor q, Tensor k_cache, Tensor v_cache,
                                                  Tensor block_table, std::optional<Tensor> sinks) {
  return run(take_apart(problem, q, k_cache, v_cache, sinks, &block_table), q.scalar_type());
}

}  // namespace grit
