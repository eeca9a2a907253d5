// contrastive_forward and contrastive_backward, see contrastive/chunked.py. Extra memory: packed copies of the inputs, and in
// the backward FP32 gradients and the weights of one chunk of queries. Nothing depends on the number of threads.
#include "contrastive_op.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "parallel.h"

namespace grit {
namespace {

constexpr int64_t BLOCK_BYTES = 384 << 10;  // of packed passages (or weights) that stay in the second-level cache
constexpr int64_t CHUNK_BYTES = 64 << 20;   // of weights in the backward
constexpr int64_t LEAST_CHUNK_TILES = 4;    // grad_p is read and written once per chunk: a chunk must not be too short
constexpr int64_t TILES_PER_ITEM = 11;
constexpr int64_t LEAST_ITEMS = 32;
constexpr int64_t PACK_ROWS = 256;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

const int64_t* int64_data(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == count, name,
                  ": accepted is a contiguous int64 tensor of ", count, " elements");
  return t.const_data_ptr<int64_t>();
}

// The call's arguments, checked, padded and with packed operands.
struct Call {
  const ContrastiveKernels& kernels;
  Contrastive problem = {};
  const char *queries, *passages;
  int64_t item, stride_q, stride_p;  // bytes of an element; elements
  int64_t values, panel, tile, lanes;
  int64_t words, tiles, padded_passages;
  std::vector<float> query_scale, passage_scale;
  std::vector<int32_t> targets, query_low, query_high, passage_low, passage_high;
  Memory query_lanes, passage_panels;

  Call(const Tensor& q, const Tensor& p, const Tensor& temperature, const Tensor& target, const std::optional<Tensor>& query_ids,
       const std::optional<Tensor>& passage_ids, bool in_batch_negatives, bool normalize)
      : kernels(*grit::kernels().contrastive) {
    STD_TORCH_CHECK(q.dim() == 2 && p.dim() == 2 && q.size(1) == p.size(1) && q.scalar_type() == p.scalar_type(),
                    "queries, passages: accepted are (Q, D) and (P, D) of one dtype");
    STD_TORCH_CHECK(q.size(0) > 0 && p.size(0) > 0, "queries, passages: got an empty batch");
    STD_TORCH_CHECK(p.size(0) < std::numeric_limits<int32_t>::max() - 64, "passages: got more than 2^31 rows");
    STD_TORCH_CHECK(query_ids.has_value() == passage_ids.has_value(), "query_ids, passage_ids: accepted are both or neither");
    problem.dtype = dtype_of(q, "queries");
    problem.queries = q.size(0);
    problem.passages = p.size(0);
    problem.width = q.size(1);
    STD_TORCH_CHECK(problem.width == 0 || (q.stride(1) == 1 && p.stride(1) == 1),
                    "queries, passages: the last dimension must be contiguous");
    queries = (const char*)q.const_data_ptr();
    passages = (const char*)p.const_data_ptr();
    item = problem.dtype == DType::float32 ? 4 : 2;
    stride_q = q.stride(0);
    stride_p = p.stride(0);
    kernels.layout(problem.dtype, problem.width, &values, &panel, &tile, &lanes);
    words = up(problem.width, 16) / values;
    tiles = (problem.queries + tile - 1) / tile;
    padded_passages = up(problem.passages, 16);
    const int64_t padded_queries = tiles * tile;

    const float inverse = 1.0f / *float_data(temperature, 1, "temperature");
    query_scale.assign(padded_queries, 0.0f);
    std::fill(query_scale.begin(), query_scale.begin() + problem.queries, inverse);
    if (normalize) {
      std::vector<float> norm(problem.queries);
      row_norms(queries, stride_q, problem.queries, norm);
      for (int64_t i = 0; i < problem.queries; ++i) query_scale[i] = inverse / std::max(norm[i], 1e-12f);
      passage_scale.resize(problem.passages);
      row_norms(passages, stride_p, problem.passages, passage_scale);
      for (float& x : passage_scale) x = 1.0f / std::max(x, 1e-12f);
      problem.passage_scale = passage_scale.data();
    }
    problem.query_scale = query_scale.data();
    const int64_t* wanted = int64_data(target, problem.queries, "targets");
    targets.assign(padded_queries, -1);
    for (int64_t i = 0; i < problem.queries; ++i) {
      STD_TORCH_CHECK(wanted[i] >= 0 && wanted[i] < problem.passages, "targets: got ", wanted[i], " for query ", i,
                      ", accepted are values in 0..", problem.passages - 1);
      targets[i] = (int32_t)wanted[i];
    }
    problem.targets = targets.data();
    if (query_ids) {
      split(int64_data(*query_ids, problem.queries, "query_ids"), problem.queries, padded_queries, query_low, query_high);
      split(int64_data(*passage_ids, problem.passages, "passage_ids"), problem.passages, padded_passages, passage_low,
            passage_high);
      problem.query_low = query_low.data();
      problem.query_high = query_high.data();
      problem.passage_low = passage_low.data();
      problem.passage_high = passage_high.data();
    }
    problem.own = in_batch_negatives ? 0 : problem.passages / problem.queries;

    query_lanes = allocate(tiles * words * tile * 4);
    run_items(tiles, 0, [&](int64_t t, void*) {
      kernels.pack_lanes(problem.dtype, queries + t * tile * stride_q * item, stride_q, problem.queries - t * tile,
                         problem.width, lanes_of(t));
    });
    passage_panels = allocate(padded_passages * words * 4);
    run_items((padded_passages + PACK_ROWS - 1) / PACK_ROWS, 0, [&](int64_t i, void*) {
      const int64_t first = i * PACK_ROWS, rows = std::min(PACK_ROWS, padded_passages - first);
      kernels.pack_panels(problem.dtype, passages + first * stride_p * item, stride_p,
                          std::max<int64_t>(0, problem.passages - first), rows, problem.width, panels() + first * words);
    });
  }

  void row_norms(const char* data, int64_t stride, int64_t rows, std::vector<float>& out) const {
    run_items((rows + PACK_ROWS - 1) / PACK_ROWS, 0, [&](int64_t i, void*) {
      const int64_t first = i * PACK_ROWS;
      kernels.norms(problem.dtype, data + first * stride * item, stride, std::min(PACK_ROWS, rows - first), problem.width,
                    out.data() + first);
    });
  }

  static void split(const int64_t* ids, int64_t count, int64_t padded, std::vector<int32_t>& low, std::vector<int32_t>& high) {
    low.assign(padded, 0);
    high.assign(padded, 0);
    for (int64_t i = 0; i < count; ++i) {
      low[i] = (int32_t)(uint32_t)(uint64_t)ids[i];
      high[i] = (int32_t)(uint32_t)((uint64_t)ids[i] >> 32);
    }
  }

  uint32_t* lanes_of(int64_t t) const { return (uint32_t*)query_lanes.get() + t * words * tile; }
  uint32_t* panels() const { return (uint32_t*)passage_panels.get(); }

  // passages that the queries of tiles [first, last) may have as candidates, widened to whole panels
  std::pair<int64_t, int64_t> seen(int64_t first, int64_t last) const {
    if (!problem.own) return {0, padded_passages};
    const int64_t begin = first * tile * problem.own, end = std::min(last * tile, problem.queries) * problem.own;
    return {begin / 16 * 16, std::min(up(end, 16), padded_passages)};
  }

  // passages per block, a multiple of 16
  int64_t block() const { return std::max<int64_t>(16, BLOCK_BYTES / (words * 4) / 16 * 16); }
};

Tensor empty_floats(int64_t n) { return torch::stable::empty({n}, ScalarType::Float); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_forward(Tensor queries, Tensor passages, Tensor temperature, Tensor targets,
                                                               std::optional<Tensor> query_ids, std::optional<Tensor> passage_ids,
                                                               bool in_batch_negatives, bool normalize) {
  const Call call(queries, passages, temperature, targets, query_ids, passage_ids, in_batch_negatives, normalize);
  const int64_t tile = call.tile, count = call.problem.queries, padded = call.tiles * tile;
  // an item: some tiles against one share of the passages. Few tiles: more shares, joined in order below
  const int64_t step = call.problem.own ? 1 : TILES_PER_ITEM;
  const int64_t groups = (call.tiles + step - 1) / step, block = call.block();
  const int64_t blocks = call.problem.own ? 1 : (call.padded_passages + block - 1) / block;
  const int64_t shares = std::min(blocks, (LEAST_ITEMS + groups - 1) / groups);
  std::vector<float> numbers((size_t)(4 * shares * padded), 0.0f);
  std::vector<int32_t> best((size_t)(shares * padded), 0);
  float* const all_top = numbers.data();
  float* const all_total = all_top + shares * padded;
  float* const all_below = all_total + shares * padded;
  float* const all_positive = all_below + shares * padded;
  std::fill(all_top, all_total, -1e30f);
  run_items(groups * shares, 0, [&](int64_t index, void*) {
    const int64_t share = index % shares, first_tile = index / shares * step, last_tile = std::min(first_tile + step, call.tiles);
    const auto [begin, end] = call.seen(first_tile, last_tile);
    const int64_t here = (end - begin + block - 1) / block;
    const int64_t from = begin + here * share / shares * block, to = std::min(end, begin + here * (share + 1) / shares * block);
    for (int64_t j = from; j < to; j += block)
      for (int64_t t = first_tile; t < last_tile; ++t) {
        const int64_t at = share * padded + t * tile;
        call.kernels.forward(call.problem, call.panels(), call.lanes_of(t), t * tile, j, std::min(j + block, to),
                             {all_top + at, all_total + at, all_below + at, all_positive + at, best.data() + at});
      }
  });
  Tensor out_losses = empty_floats(count), out_positive = empty_floats(count), out_excess = empty_floats(count);
  Tensor out_best = torch::stable::empty({count}, ScalarType::Long);
  float* losses = (float*)out_losses.mutable_data_ptr();
  float* positives = (float*)out_positive.mutable_data_ptr();
  float* excess = (float*)out_excess.mutable_data_ptr();
  int64_t* bests = (int64_t*)out_best.mutable_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    float top = all_top[i], positive = all_positive[i];
    bests[i] = best[i];
    for (int64_t s = 1; s < shares; ++s) {
      const int64_t at = s * padded + i;
      positive += all_positive[at];  // one share holds the target, the others 0
      if (all_top[at] > top) {
        top = all_top[at];
        bests[i] = best[at];
      }
    }
    float total = 0, below = 0;
    for (int64_t s = 0; s < shares; ++s) {
      const int64_t at = s * padded + i;
      if (!(all_top[at] > -1e29f)) continue;
      const float change = all_top[at] - top, decay = std::exp(change);
      total += decay * all_total[at];
      below += decay * (all_below[at] + all_total[at] * change);
    }
    losses[i] = (top - positive) + std::log(total);
    positives[i] = positive;
    excess[i] = (top - positive) + below / total;
  }
  return {out_losses, out_positive, out_excess, out_best};
}

std::tuple<Tensor, Tensor> contrastive_backward(Tensor grad_losses, Tensor queries, Tensor passages, Tensor temperature,
                                                Tensor targets, std::optional<Tensor> query_ids,
                                                std::optional<Tensor> passage_ids, Tensor losses, Tensor positive,
                                                bool in_batch_negatives, bool normalize) {
  const Call call(queries, passages, temperature, targets, query_ids, passage_ids, in_batch_negatives, normalize);
  const ContrastiveKernels& kernels = call.kernels;
  const Contrastive& problem = call.problem;
  const int64_t tile = call.tile, panel = call.panel, values = call.values, width = problem.width, count = problem.queries;
  const int64_t padded_queries = call.tiles * tile, padded = call.padded_passages;
  const int64_t dim_tiles = (width + tile - 1) / tile, wide = dim_tiles * tile;

  std::vector<float> a(padded_queries, 0.0f), loss(padded_queries, 0.0f), score(padded_queries, 0.0f);
  const float* grad = float_data(grad_losses, count, "grad_losses");
  std::copy_n(float_data(losses, count, "losses"), count, loss.begin());
  std::copy_n(float_data(positive, count, "positive"), count, score.begin());
  for (int64_t i = 0; i < count; ++i) a[i] = grad[i] * call.query_scale[i];

  // both inputs once more, as columns of words: the vector side of the two gradient products
  Memory query_columns = allocate(padded_queries / values * wide * 4), passage_columns = allocate(padded / values * wide * 4);
  auto pack = [&](const char* data, int64_t stride, int64_t real, int64_t rows, Memory& out) {
    run_items((rows + PACK_ROWS - 1) / PACK_ROWS, 0, [&](int64_t i, void*) {
      kernels.pack_columns(problem.dtype, data, stride, real, i * PACK_ROWS, std::min(rows, (i + 1) * PACK_ROWS), rows, width,
                           (uint32_t*)out.get());
    });
  };
  pack(call.queries, call.stride_q, count, padded_queries, query_columns);
  pack(call.passages, call.stride_p, problem.passages, padded, passage_columns);

  Memory grad_q = allocate(padded_queries * wide * 4), grad_p = allocate(padded * wide * 4);
  float *const dq = (float*)grad_q.get(), *const dp = (float*)grad_p.get();
  std::fill(dp, dp + padded * wide, 0.0f);

  // chunks of whole tiles; a weight takes 2 x 4 / values bytes
  const int64_t weight_bytes = 4 / values;
  int64_t chunk_tiles = std::max(LEAST_CHUNK_TILES, CHUNK_BYTES / (2 * weight_bytes * padded) / tile);
  if (problem.own) chunk_tiles = LEAST_CHUNK_TILES;
  chunk_tiles = std::min(chunk_tiles, call.tiles);
  const auto [first_begin, first_end] = call.seen(0, chunk_tiles);
  const int64_t most = std::min(padded, first_end - first_begin + 32);
  // rows of weights end off a power of two, so that the rows of a panel do not share cache sets
  const int64_t row_stride = chunk_tiles * tile * weight_bytes + 64;
  Memory row_memory = allocate(most * row_stride), column_memory = allocate(most / values * chunk_tiles * tile * 4);
  char* const rows = (char*)row_memory.get();
  uint32_t* const columns = (uint32_t*)column_memory.get();
  const int64_t block = call.block();
  const int64_t inner = std::max<int64_t>(16, BLOCK_BYTES / 4 / (tile * 4) / 16 * 16);  // words per pass of a product
  const int64_t group = std::max<int64_t>(1, BLOCK_BYTES / (inner * panel * 4));        // panels that share the lanes

  for (int64_t first_tile = 0; first_tile < call.tiles; first_tile += chunk_tiles) {
    const int64_t last_tile = std::min(first_tile + chunk_tiles, call.tiles), here = last_tile - first_tile;
    const int64_t begin = call.seen(first_tile, last_tile).first, end = call.seen(first_tile, last_tile).second;
    const int64_t seen = end - begin, seen_words = seen / values, blocks = (seen + block - 1) / block;

    run_items(here * blocks, 0, [&](int64_t index, void*) {
      const int64_t t = first_tile + index % here, from = index / here * block, to = std::min(from + block, seen);
      kernels.weights(problem, call.panels(), call.lanes_of(t), t * tile, begin + from, begin + to,
                      {loss.data() + t * tile, score.data() + t * tile, a.data() + t * tile,
                       rows + from * row_stride + (t - first_tile) * tile * weight_bytes, row_stride,
                       columns + ((t - first_tile) * tile * seen_words) + from / values * panel, seen_words});
    });

    // grad_q of the chunk: the sum over the passages is complete
    const int64_t query_panels = here * tile / panel, query_groups = (query_panels + group - 1) / group;
    run_items(query_groups * dim_tiles, 0, [&](int64_t index, void*) {
      const int64_t d = index % dim_tiles, first = index / dim_tiles * group, last = std::min(first + group, query_panels);
      const uint32_t* vectors = (uint32_t*)passage_columns.get() + (d * (padded / values) + begin / values) * tile;
      for (int64_t n = 0; n < seen_words; n += inner)
        for (int64_t i = first; i < last; ++i)
          kernels.product(problem.dtype, width, columns + (i * seen_words + n) * panel, 0, vectors + n * tile,
                          std::min(inner, seen_words - n), n > 0, dq + (first_tile * tile + i * panel) * wide + d * tile, wide);
    });

    // grad_p: what the chunk's queries add
    const int64_t passage_panels = seen / panel, passage_groups = (passage_panels + group - 1) / group;
    const int64_t chunk_words = here * tile / values;
    run_items(passage_groups * dim_tiles, 0, [&](int64_t index, void*) {
      const int64_t d = index % dim_tiles, first = index / dim_tiles * group, last = std::min(first + group, passage_panels);
      const uint32_t* vectors =
          (uint32_t*)query_columns.get() + (d * (padded_queries / values) + first_tile * tile / values) * tile;
      for (int64_t n = 0; n < chunk_words; n += inner)
        for (int64_t i = first; i < last; ++i)
          kernels.product(problem.dtype, width, (const uint32_t*)(rows + i * panel * row_stride) + n, row_stride / 4,
                          vectors + n * tile, std::min(inner, chunk_words - n), true, dp + (begin + i * panel) * wide + d * tile,
                          wide);
    });
  }

  Tensor out_q = torch::stable::empty({count, width}, queries.scalar_type());
  Tensor out_p = torch::stable::empty({problem.passages, width}, passages.scalar_type());
  auto finish = [&](const float* sums, const char* data, int64_t stride, int64_t total, Tensor& out) {
    char* result = (char*)out.mutable_data_ptr();
    use_large_pages(result, total * width * call.item);
    run_items((total + PACK_ROWS - 1) / PACK_ROWS, 0, [&](int64_t i, void*) {
      for (int64_t r = i * PACK_ROWS; r < std::min(total, (i + 1) * PACK_ROWS); ++r)
        kernels.finish(problem.dtype, sums + r * wide, normalize, data + r * stride * call.item, width,
                       result + r * width * call.item);
    });
  };
  finish(dq, call.queries, call.stride_q, count, out_q);
  finish(dp, call.passages, call.stride_p, problem.passages, out_p);
  return {out_q, out_p};
}

}  // namespace grit
