// The contrastive ops, see contrastive/chunked.py. Extra memory: packed copies of the inputs and, for gradients, the gradients in
// FP32 and the weights (and scores) of one chunk of queries. No result depends on the number of threads.
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
constexpr int64_t CHUNK_BYTES = 32 << 20;   // of weights and scores of a chunk of queries
constexpr int64_t LEAST_CHUNK_TILES = 4;    // grad_p is read and written once per chunk of queries, which must not be too small
constexpr int64_t KEEP_WORDS = 96;          // scores of shorter rows are recomputed as quickly as they are kept
constexpr int64_t TILES_PER_ITEM = 11;
constexpr int64_t LEAST_ITEMS = 32;
constexpr int64_t PACK_ROWS = 256;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

const int64_t* int64_data(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == count, name,
                  ": expected a contiguous int64 tensor of ", count, " elements");
  return t.const_data_ptr<int64_t>();
}

// The arguments of a call, checked and padded, with packed operands.
struct Call {
  const Kernels& isa;
  const ContrastiveKernels& kernels = *isa.contrastive;
  const ThreadState& thread = isa.thread;
  Contrastive problem = {};
  const char *queries, *passages;
  int64_t item, stride_q, stride_p;  // bytes of an element; elements
  int64_t values, words, panel, tile, step, inner;  // ContrastiveLayout
  int64_t tiles, padded_passages;
  std::vector<float> query_scale, passage_scale;
  std::vector<int32_t> targets, query_low, query_high, passage_low, passage_high;
  Memory query_lanes, passage_panels;

  Call(const Pairs& pairs, bool in_batch_negatives, bool normalize)
      : isa(product_kernels(dtype_of(pairs.queries, "queries"))) {
    const Tensor &q = pairs.queries, &p = pairs.passages;
    const std::optional<Tensor> &query_ids = pairs.query_ids, &passage_ids = pairs.passage_ids;
    STD_TORCH_CHECK(q.dim() == 2 && p.dim() == 2 && q.size(1) == p.size(1) && q.scalar_type() == p.scalar_type(),
                    "queries, passages: expected (Q, D) and (P, D) of one dtype");
    STD_TORCH_CHECK(q.size(0) > 0 && p.size(0) > 0, "queries, passages: expected at least one row each");
    STD_TORCH_CHECK(q.size(1) > 0, "queries, passages: expected at least one column");
    STD_TORCH_CHECK(p.size(0) < std::numeric_limits<int32_t>::max() - 64, "passages: expected fewer than 2^31 rows");
    STD_TORCH_CHECK(query_ids.has_value() == passage_ids.has_value(), "query_ids, passage_ids: expected both or neither");
    problem.dtype = dtype_of(q, "queries");
    problem.queries = q.size(0);
    problem.passages = p.size(0);
    problem.width = q.size(1);
    STD_TORCH_CHECK(q.stride(1) == 1 && p.stride(1) == 1, "queries, passages: the last dimension must be contiguous");
    queries = (const char*)q.const_data_ptr();
    passages = (const char*)p.const_data_ptr();
    item = problem.dtype == DType::float32 ? 4 : 2;
    stride_q = q.stride(0);
    stride_p = p.stride(0);
    const ContrastiveLayout layout = kernels.layout(problem.dtype, problem.width);
    values = layout.values, words = layout.words, panel = layout.panel, tile = layout.tile, step = layout.step, inner = layout.inner;
    tiles = (problem.queries + tile - 1) / tile;
    padded_passages = up(problem.passages, step);
    const int64_t padded_queries = tiles * tile;

    const float inverse = 1.0f / *float_data(pairs.temperature, 1, "temperature");
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
    const int64_t* wanted = int64_data(pairs.targets, problem.queries, "targets");
    targets.assign(padded_queries, -1);
    for (int64_t i = 0; i < problem.queries; ++i) {
      STD_TORCH_CHECK(wanted[i] >= 0 && wanted[i] < problem.passages, "targets: expected values in 0..", problem.passages - 1, ", got ",
                      wanted[i], " for query ", i);
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
    run_items(thread, tiles, 0, [&](int64_t t, void*) {
      kernels.pack_lanes(problem.dtype, queries + t * tile * stride_q * item, stride_q, problem.queries - t * tile,
                         problem.width, lanes_of(t));
    });
    passage_panels = allocate(padded_passages * words * 4);
    run_items(thread, (padded_passages + PACK_ROWS - 1) / PACK_ROWS, 0, [&](int64_t i, void*) {
      const int64_t first = i * PACK_ROWS, rows = std::min(PACK_ROWS, padded_passages - first);
      kernels.pack_panels(problem.dtype, passages + first * stride_p * item, stride_p,
                          std::max<int64_t>(0, problem.passages - first), rows, problem.width, panels() + first * words);
    });
  }

  void row_norms(const char* data, int64_t stride, int64_t rows, std::vector<float>& out) const {
    run_items(thread, (rows + PACK_ROWS - 1) / PACK_ROWS, 0, [&](int64_t i, void*) {
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

  // candidate passages of the queries of tiles [first, last), widened to whole steps
  std::pair<int64_t, int64_t> seen(int64_t first, int64_t last) const {
    if (!problem.own) return {0, padded_passages};
    const int64_t begin = first * tile * problem.own, end = std::min(last * tile, problem.queries) * problem.own;
    return {begin / step * step, std::min(up(end, step), padded_passages)};
  }

  // passages per block, whole steps
  int64_t block() const { return std::max(step, BLOCK_BYTES / (words * 4) / step * step); }
};

Tensor empty_floats(std::initializer_list<int64_t> sizes) {
  Tensor t = torch::stable::empty(sizes, ScalarType::Float);
  use_large_pages(t.mutable_data_ptr(), t.numel() * 4);
  return t;
}

// Per query: the loss, and the terms of softmax_j = exp((score_j - top) - log_total). What the backward pass needs is kept relative
// to the top: in top + log_total, or relative to the positive's score, large scores would cost the softmax its precision.
struct Losses {
  float *losses, *top, *log_total, *excess;
  int64_t* best;
};

// The losses of the queries of tiles [first, last). Scores, if requested, are stored as [tile - first][score_rows][tile]; the
// first row is the first passage that any of the tiles sees.
void compute_losses(const Call& call, int64_t first, int64_t last, float* scores, int64_t score_rows, const Losses& out) {
  const int64_t tile = call.tile, tiles = last - first, padded = tiles * tile;
  const int64_t count = std::min(padded, call.problem.queries - first * tile), block = call.block();
  const auto [seen_begin, seen_end] = call.seen(first, last);
  // an item: some tiles against one share of the passages; with few tiles there are more shares, merged in order below
  const int64_t most = call.problem.own ? 1 : TILES_PER_ITEM, groups = (tiles + most - 1) / most;
  const int64_t step = (tiles + groups - 1) / groups;
  const int64_t blocks = call.problem.own ? 1 : (seen_end - seen_begin + block - 1) / block;
  const int64_t shares = std::min(blocks, (LEAST_ITEMS + groups - 1) / groups), origin = seen_begin;
  std::vector<float> numbers((size_t)(4 * shares * padded), 0.0f);
  std::vector<int32_t> best((size_t)(shares * padded), 0);
  float* const all_top = numbers.data();
  float* const all_total = all_top + shares * padded;
  float* const all_below = all_total + shares * padded;
  float* const all_positive = all_below + shares * padded;
  std::fill(all_top, all_total, NO_CANDIDATE);
  run_items(call.thread, groups * shares, 0, [&](int64_t index, void*) {
    const int64_t share = index % shares, first_tile = first + index / shares * step, last_tile = std::min(first_tile + step, last);
    const auto [begin, end] = call.seen(first_tile, last_tile);
    const int64_t here = (end - begin + block - 1) / block;
    const int64_t from = begin + here * share / shares * block, to = std::min(end, begin + here * (share + 1) / shares * block);
    for (int64_t j = from; j < to; j += block)
      for (int64_t t = first_tile; t < last_tile; ++t) {
        const int64_t at = share * padded + (t - first) * tile;
        float* kept = scores ? scores + ((t - first) * score_rows + j - origin) * tile : nullptr;
        call.kernels.forward(call.problem, call.panels(), call.lanes_of(t), t * tile, j, std::min(j + block, to),
                             {all_top + at, all_total + at, all_below + at, all_positive + at, best.data() + at, kept});
      }
  });
  for (int64_t i = 0; i < count; ++i) {
    float top = all_top[i], positive = all_positive[i];
    int64_t highest = best[i];
    for (int64_t s = 1; s < shares; ++s) {
      const int64_t at = s * padded + i;
      positive += all_positive[at];  // one share holds the target, the others 0
      if (all_top[at] > top) {
        top = all_top[at];
        highest = best[at];
      }
    }
    float total = 0, below = 0;
    for (int64_t s = 0; s < shares; ++s) {
      const int64_t at = s * padded + i;
      if (!(all_top[at] > NO_CANDIDATE) && !std::isnan(all_total[at])) continue;  // no candidates; NaN: no score above it
      const float change = std::max(all_top[at] - top, -104.0f), decay = std::exp(change);  // exp(-104) is 0
      total += decay * all_total[at];
      below += decay * (all_below[at] + all_total[at] * change);
    }
    const int64_t query = first * tile + i;
    out.top[query] = top;
    out.log_total[query] = std::log(total);
    out.losses[query] = (top - positive) + out.log_total[query];
    out.excess[query] = (top - positive) + below / total;
    out.best[query] = highest;
  }
}

// scale * grad, `count` values, in the dtype
void write_scaled(const Kernels& isa, DType dtype, const float* grad, float scale, int64_t count, char* out) {
  constexpr int64_t PART = 1 << 16;
  const int64_t item = dtype == DType::float32 ? 4 : 2;
  run_items(isa.thread, (count + PART - 1) / PART, 0, [&](int64_t i, void*) {
    isa.contrastive->scale(dtype, grad + i * PART, scale, std::min(PART, count - i * PART), out + i * PART * item);
  });
}

// Where the gradients of queries and passages [.., width] go. Those of the passages may be rounded to their dtype at once: for a
// large vocabulary, FP32 sums of all rows would take more memory, and more traffic, than everything else.
struct GradientRows {
  float *queries, *passages;
  char* narrow_passages;  // instead of `passages`
};

// The gradients of sum_i coefficient_i loss_i. `numbers` hold whole tiles; unless they are known, they are computed along the way,
// and the scores of a chunk then serve both the losses and the gradients.
void compute_gradients(const Call& call, const float* coefficients, bool known, const Losses& numbers, bool normalize,
                       const GradientRows& out) {
  const ContrastiveKernels& kernels = call.kernels;
  const ThreadState& thread = call.thread;
  const Contrastive& problem = call.problem;
  const int64_t tile = call.tile, panel = call.panel, values = call.values, width = problem.width, count = problem.queries;
  const int64_t padded_queries = call.tiles * tile, padded = call.padded_passages;
  const int64_t dim_tiles = (width + tile - 1) / tile, wide = dim_tiles * tile;
  std::vector<float> a(padded_queries, 0.0f);
  for (int64_t i = 0; i < count; ++i) a[i] = coefficients[i] * call.query_scale[i];

  // both inputs once more, as columns of words: the vector side of the two gradient products
  Memory query_columns = allocate(padded_queries / values * wide * 4);
  auto pack = [&](const char* data, int64_t stride, int64_t real, int64_t rows, Memory& out) {
    run_items(thread, (rows + PACK_ROWS - 1) / PACK_ROWS, 0, [&](int64_t i, void*) {
      kernels.pack_columns(problem.dtype, data, stride, real, i * PACK_ROWS, std::min(rows, (i + 1) * PACK_ROWS), rows, width,
                           (uint32_t*)out.get());
    });
  };
  pack(call.queries, call.stride_q, count, padded_queries, query_columns);
  // with own passages only, the chunks' panels may overlap at their ends, so every chunk adds to the sums
  if (problem.own) std::fill(out.passages, out.passages + problem.passages * width, 0.0f);

  const int64_t weight_bytes = 4 / values;  // a weight is stored twice
  const bool keep = !known && !problem.own && call.words >= KEEP_WORDS;
  if (!known && !keep) compute_losses(call, 0, call.tiles, nullptr, 0, numbers);
  // Chunks of whole tiles. Scores are kept for all passages; otherwise a chunk takes about as many passages as queries, since
  // dq is read and written once per chunk of passages and dp once per chunk of queries.
  const int64_t pairs = CHUNK_BYTES / (2 * weight_bytes + (keep ? 4 : 0));
  int64_t chunk_rows = pairs / padded;
  if (!keep) chunk_rows = std::max(chunk_rows, (int64_t)std::sqrt((double)pairs));
  int64_t chunk_tiles = problem.own ? LEAST_CHUNK_TILES : std::max(LEAST_CHUNK_TILES, chunk_rows / tile);
  const int64_t chunks = (call.tiles + chunk_tiles - 1) / chunk_tiles;
  chunk_tiles = (call.tiles + chunks - 1) / chunks;
  const auto [first_begin, first_end] = call.seen(0, chunk_tiles);
  int64_t most = std::min(padded, first_end - first_begin + 2 * call.step);
  if (!keep && !problem.own) {
    const int64_t wanted = std::max(call.step, pairs / (chunk_tiles * tile));
    const int64_t shares = std::max<int64_t>(1, (padded + wanted / 2) / wanted);
    most = up((padded + shares - 1) / shares, call.step);
  }
  // the stride is no power of two, so that the rows of a panel do not compete for cache sets
  const int64_t row_stride = chunk_tiles * tile * weight_bytes + 64;
  Memory row_memory = allocate(most * row_stride), column_memory = allocate(most / values * chunk_tiles * tile * 4);
  Memory score_memory = keep ? allocate(most * chunk_tiles * tile * 4) : Memory();
  char* const rows = (char*)row_memory.get();
  uint32_t* const columns = (uint32_t*)column_memory.get();
  float* const scores = (float*)score_memory.get();
  const int64_t block = call.block();
  const int64_t inner = call.inner;                                               // words per pass of a product
  const int64_t group = std::max<int64_t>(1, BLOCK_BYTES / (inner * panel * 4));  // panels that share the lanes

  // with known numbers, one share of the passages meets all queries before the next does: only its columns and sums are kept
  const bool by_shares = known && !problem.own;
  const int64_t column_rows = by_shares ? most : padded;
  Memory passage_columns = allocate(column_rows / values * wide * 4);
  auto pack_passages = [&](int64_t begin, int64_t rows) {
    pack(call.passages + begin * call.stride_p * call.item, call.stride_p, problem.passages - begin, rows, passage_columns);
  };
  Memory sums = out.narrow_passages ? allocate(most * width * 4) : Memory();
  // FP32 rows of the passages' gradients, from passage `begin` on
  auto rows_from = [&](int64_t begin) { return out.narrow_passages ? (float*)sums.get() : out.passages + begin * width; };

  auto add_chunk = [&](int64_t first_tile, int64_t last_tile, int64_t begin, int64_t seen, bool first_passages) {
    const int64_t here = last_tile - first_tile, seen_words = seen / values, blocks = (seen + block - 1) / block;
    const int64_t packed = by_shares ? seen : padded, column = by_shares ? 0 : begin;  // what passage_columns holds
    float* const dp = rows_from(begin);

    run_items(thread, here * blocks, 0, [&](int64_t index, void*) {
      const int64_t t = first_tile + index % here, from = index / here * block, to = std::min(from + block, seen);
      kernels.weights(problem, call.panels(), call.lanes_of(t), t * tile, begin + from, begin + to,
                      {numbers.top + t * tile, numbers.log_total + t * tile, a.data() + t * tile,
                       scores ? scores + ((t - first_tile) * seen + from) * tile : nullptr,
                       rows + from * row_stride + (t - first_tile) * tile * weight_bytes, row_stride,
                       columns + ((t - first_tile) * tile * seen_words) + from / values * panel, seen_words});
    });

    // grad_q: what the chunk's passages add
    const int64_t query_panels = here * tile / panel, query_groups = (query_panels + group - 1) / group;
    run_items(thread, query_groups * dim_tiles, 0, [&](int64_t index, void*) {
      const int64_t d = index % dim_tiles, first = index / dim_tiles * group, last = std::min(first + group, query_panels);
      const uint32_t* vectors = (uint32_t*)passage_columns.get() + (d * (packed / values) + column / values) * tile;
      for (int64_t n = 0; n < seen_words; n += inner)
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = first_tile * tile + i * panel;
          if (row >= count) break;
          kernels.product(problem.dtype, width, columns + (i * seen_words + n) * panel, 0, vectors + n * tile,
                          std::min(inner, seen_words - n), !first_passages || n > 0,
                          {out.queries + row * width + d * tile, width, std::min(panel, count - row), width - d * tile});
        }
    });

    // grad_p: what the chunk's queries add
    const int64_t passage_panels = seen / panel, passage_groups = (passage_panels + group - 1) / group;
    const int64_t chunk_words = here * tile / values;
    run_items(thread, passage_groups * dim_tiles, 0, [&](int64_t index, void*) {
      const int64_t d = index % dim_tiles, first = index / dim_tiles * group, last = std::min(first + group, passage_panels);
      const uint32_t* vectors =
          (uint32_t*)query_columns.get() + (d * (padded_queries / values) + first_tile * tile / values) * tile;
      for (int64_t n = 0; n < chunk_words; n += inner)
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = begin + i * panel;
          if (row >= problem.passages) break;
          kernels.product(problem.dtype, width, (const uint32_t*)(rows + i * panel * row_stride) + n, row_stride / 4,
                          vectors + n * tile, std::min(inner, chunk_words - n), problem.own || first_tile > 0 || n > 0,
                          {dp + i * panel * width + d * tile, width, std::min(panel, problem.passages - row), width - d * tile});
        }
    });
  };
  auto project = [&](float* grad, const char* data, int64_t stride, int64_t total) {
    if (!normalize) return;
    run_items(thread, (total + PACK_ROWS - 1) / PACK_ROWS, 0, [&](int64_t i, void*) {
      for (int64_t r = i * PACK_ROWS; r < std::min(total, (i + 1) * PACK_ROWS); ++r)
        kernels.project(problem.dtype, data + r * stride * call.item, width, grad + r * width);
    });
  };

  if (by_shares) {
    for (int64_t begin = 0; begin < padded; begin += most) {
      const int64_t seen = std::min(most, padded - begin), real = std::min(seen, problem.passages - begin);
      pack_passages(begin, seen);
      for (int64_t tile = 0; tile < call.tiles; tile += chunk_tiles)
        add_chunk(tile, std::min(tile + chunk_tiles, call.tiles), begin, seen, begin == 0);
      project(rows_from(begin), call.passages + begin * call.stride_p * call.item, call.stride_p, real);
      if (out.narrow_passages)
        write_scaled(call.isa, problem.dtype, rows_from(begin), 1.0f, real * width, out.narrow_passages + begin * width * call.item);
    }
  } else {
    pack_passages(0, padded);
    for (int64_t tile = 0; tile < call.tiles; tile += chunk_tiles) {
      const int64_t last = std::min(tile + chunk_tiles, call.tiles);
      const auto [begin, end] = call.seen(tile, last);
      if (keep) compute_losses(call, tile, last, scores, end - begin, numbers);
      for (int64_t j = begin; j < end; j += most) add_chunk(tile, last, j, std::min(most, end - j), j == begin);
    }
    project(out.passages, call.passages, call.stride_p, problem.passages);
  }
  project(out.queries, call.queries, call.stride_q, count);
}

// scale * grad in the dtype of `like`
Tensor scaled(const Tensor& grad, float scale, const Tensor& like) {
  const int64_t item = like.scalar_type() == ScalarType::Float ? 4 : 2, total = grad.numel();
  Tensor out = torch::stable::empty({grad.size(0), grad.size(1)}, like.scalar_type());
  use_large_pages(out.mutable_data_ptr(), total * item);
  const DType dtype = dtype_of(like, "queries");
  write_scaled(product_kernels(dtype), dtype, (const float*)grad.const_data_ptr(), scale, total, (char*)out.mutable_data_ptr());
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_forward(const Pairs& pairs, bool in_batch_negatives, bool normalize) {
  const Call call(pairs, in_batch_negatives, normalize);
  const int64_t count = call.problem.queries;
  Tensor losses = empty_floats({count}), top = empty_floats({count}), log_total = empty_floats({count}), excess = empty_floats({count});
  Tensor best = torch::stable::empty({count}, ScalarType::Long);
  compute_losses(call, 0, call.tiles, nullptr, 0,
                 {(float*)losses.mutable_data_ptr(), (float*)top.mutable_data_ptr(), (float*)log_total.mutable_data_ptr(),
                  (float*)excess.mutable_data_ptr(), (int64_t*)best.mutable_data_ptr()});
  return {losses, top, log_total, excess, best};
}

std::tuple<Tensor, Tensor> contrastive_backward(const Pairs& pairs, Tensor grad_losses, Tensor top, Tensor log_total,
                                                bool in_batch_negatives, bool normalize) {
  const Call call(pairs, in_batch_negatives, normalize);
  const int64_t count = call.problem.queries, width = call.problem.width;
  std::vector<float> tops(call.tiles * call.tile, 0.0f), totals(call.tiles * call.tile, 0.0f);
  std::copy_n(float_data(top, count, "top"), count, tops.begin());
  std::copy_n(float_data(log_total, count, "log_total"), count, totals.begin());
  const bool narrow = call.problem.dtype != DType::float32, at_once = narrow && in_batch_negatives;
  Tensor dq = empty_floats({count, width});
  Tensor dp = torch::stable::empty({call.problem.passages, width}, at_once ? pairs.passages.scalar_type() : ScalarType::Float);
  use_large_pages(dp.mutable_data_ptr(), dp.numel() * (at_once ? 2 : 4));
  GradientRows rows = {(float*)dq.mutable_data_ptr(), nullptr, nullptr};
  if (at_once) rows.narrow_passages = (char*)dp.mutable_data_ptr();
  else rows.passages = (float*)dp.mutable_data_ptr();
  compute_gradients(call, float_data(grad_losses, count, "grad_losses"), true, {nullptr, tops.data(), totals.data(), nullptr, nullptr},
                    normalize, rows);
  if (!narrow) return {dq, dp};
  return {scaled(dq, 1.0f, pairs.queries), at_once ? dp : scaled(dp, 1.0f, pairs.passages)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_step(const Pairs& pairs, Tensor coefficients, bool in_batch_negatives,
                                                                    bool normalize) {
  const Call call(pairs, in_batch_negatives, normalize);
  const int64_t count = call.problem.queries, width = call.problem.width, padded = call.tiles * call.tile;
  const float* coefficient = float_data(coefficients, count, "coefficients");
  std::vector<float> loss(padded, 0.0f), top(padded, 0.0f), log_total(padded, 0.0f), excess(padded, 0.0f);
  Tensor best = torch::stable::empty({count}, ScalarType::Long);
  Tensor dq = empty_floats({count, width}), dp = empty_floats({call.problem.passages, width});
  compute_gradients(call, coefficient, false, {loss.data(), top.data(), log_total.data(), excess.data(), (int64_t*)best.mutable_data_ptr()},
                    normalize, {(float*)dq.mutable_data_ptr(), (float*)dp.mutable_data_ptr(), nullptr});
  double sum = 0, above = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += (double)coefficient[i] * loss[i];
    above += (double)coefficient[i] * excess[i];
  }
  Tensor out_loss = empty_floats({}), out_temperature = empty_floats({});
  *(float*)out_loss.mutable_data_ptr() = (float)sum;
  *(float*)out_temperature.mutable_data_ptr() = (float)(-above / *float_data(pairs.temperature, 1, "temperature"));
  return {out_loss, best, dq, dp, out_temperature};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_scale(Tensor grad_loss, Tensor queries, Tensor passages, Tensor grad_queries,
                                                     Tensor grad_passages, Tensor grad_temperature) {
  const float scale = *float_data(grad_loss, 1, "grad_loss");
  float_data(grad_queries, queries.numel(), "grad_queries");
  float_data(grad_passages, passages.numel(), "grad_passages");
  Tensor out_temperature = empty_floats({});
  *(float*)out_temperature.mutable_data_ptr() = scale * *float_data(grad_temperature, 1, "grad_temperature");
  return {scaled(grad_queries, scale, queries), scaled(grad_passages, scale, passages), out_temperature};
}

}  // namespace grit
