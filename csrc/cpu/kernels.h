// What the object files of one instruction set offer to the code compiled for every CPU.
#pragma once

#include <cstdint>

#include "attention.h"
#include "contrastive.h"
#include "fused.h"

namespace grit {

// out (columns) = sum over rows first <= t < last with weights[t] != 0 of weights[t] * r_t * hidden[t]
// r_t = 1, or rsqrt(mean(hidden[t]^2) + eps) when normed; rows of weight 0 are never read
struct PoolRows {
  const void* hidden;  // row 0
  DType dtype;
  int64_t row_stride;  // elements
  const float* weights;
  int64_t first, last, columns;
  int64_t next;  // first row that the caller reads after these (-1: none), to be prefetched
  bool normed;
  float eps;
  float* out;
};

// Gradients of those rows: grad_hidden[t] (contiguous rows, in hidden's dtype) for all first <= t < last, 0 where weights[t] is 0,
// and, when normed, grad_gain += their contribution to the gradient of the norm's weight.
struct PoolBackwardRows {
  PoolRows rows;         // without out
  const float* grad;     // grad_out of the sample, divided by its denominator
  const float* gain;     // norm weight, FP32; null when not normed
  void* grad_hidden;     // row 0
  float* grad_gain;      // (columns), added to
};

// Packed operands of a tile for the backward pass, all zero in lanes without a row.
struct QueryPack {
  uint32_t *q, *grad_out;            // [row_words][tile_lanes]
  uint32_t *q_rows, *grad_out_rows;  // [tile_lanes / values][padded_dim]
  float *lse_log2, *delta;           // [tile_lanes]
  float* log2_total;                 // [tile_lanes], only with `apart`
  int32_t *lo, *hi;                  // [tile_lanes]
  // lse_log2 holds the highest score alone and log2_total what all keys add to it: for scores so large that one number for both
  // would cost the probabilities precision
  bool apart;
};

struct KeyPack {
  const uint32_t *k_panels, *v_panels;  // rows: [keys / panel][row_words][panel]
  const uint32_t* k_columns;            // columns: [padded_dim / panel][keys / values][panel]
};

// What a thread does before and after it runs kernels of a set; null: nothing.
struct ThreadState {
  void (*enter)();
  void (*leave)();
};

struct Kernels {
  const char* name;
  ThreadState thread;
  void (*pool_rows)(const PoolRows&);
  void (*pool_backward_rows)(const PoolBackwardRows&);
  const FusedKernels* fused;
  const ContrastiveKernels* contrastive;

  Layout (*layout)(DType, int64_t dim);
  // K as row panels and V as column panels of one (sample, key head)
  void (*pack_keys)(const Attention&, const Sample&, int64_t kv_head, uint32_t* k_panels, uint32_t* v_columns);
  int64_t (*forward_scratch)(DType, int64_t dim);  // bytes per thread
  // out and lse of a tile; returns the number of key blocks it visited
  int64_t (*forward_tile)(const Attention&, const Sample&, const Tile&, const uint32_t* k_panels, const uint32_t* v_columns,
                          void* scratch);

  // Few queries against many keys, read in place: the partial result of keys [begin, end) for all rows and heads of the sample,
  // while the keys up to fetch_end are prefetched. maximum: [q_len * heads_q]; total: [q_len * heads_q][lanes], to be summed;
  // sums: [q_len * heads_q][decode_dim], unnormalised
  void (*decode_part)(const Attention&, const Sample&, int64_t begin, int64_t end, int64_t fetch_end, float* maximum, float* total,
                      float* sums);
  // merges the `parts` partial results of one (row, head); part p is at maximum[p * stride], sums[p * stride * decode_dim]
  void (*decode_join)(const Attention&, int64_t row, int64_t head, int64_t parts, int64_t stride, const float* maximum,
                      const float* total, const float* sums);

  void (*backward_pack_keys)(const Attention&, const Sample&, int64_t kv_head, uint32_t* k_panels, uint32_t* v_panels,
                             uint32_t* k_columns);
  // returns whether a row of the tile has scores so large that it needs backward_take_apart
  bool (*backward_pack_queries)(const Attention&, const Gradients&, const Sample&, const Tile&, const QueryPack&);
  // computes lse_log2 and log2_total of a tile from the scores that backward_keys will compute
  void (*backward_take_apart)(const Attention&, const Sample&, const Tile&, const KeyPack&, const QueryPack&, void* scratch);
  int64_t (*backward_scratch)(DType, int64_t dim);  // bytes per thread
  // Gradients of keys [begin, end) of one key head from the tiles [first_tile, last_tile) that see them, and their share of those
  // tiles' dq: dq [tile - first_tile][padded_dim][tile_lanes]. Query pack of tile t: packs[t]. Returns the number of
  // blocks visited.
  int64_t (*backward_keys)(const Attention&, const Gradients&, const Sample&, int64_t kv_head, int64_t begin, int64_t end,
                           int64_t first_tile, const KeyPack&, const QueryPack* packs, float* dq, void* scratch);
  // dq rows of a tile = softmax_scale * sum of `parts` partial sums; and the sink_shares of its rows
  void (*backward_store_dq)(const Attention&, const Gradients&, const Sample&, const Tile&, const QueryPack&, int64_t parts,
                            const float* const* partial, void* scratch);
};

// The best set on this CPU, or the one that GRIT_KERNELS_CPU_ISA names; for a dtype, kernels that mostly multiply matrices
// (attention, contrastive) may come from a set of their own.
const Kernels& kernels();
const Kernels& product_kernels(DType);

}  // namespace grit
