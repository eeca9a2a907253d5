// Plain arguments of the attention kernels, shared by the code compiled for every CPU and the kernels of each instruction set.
//
// The kernels compute S^T = K Q^T with queries in the vector lanes. A *slot* is W consecutive rows of one query head (W lanes);
// slot s of a (sample, key head) holds rows [s / group * W, ..) of the group's head s % group. A *tile* is up to `vectors`
// consecutive slots, so the heads of a GQA group share the keys they read and a causal edge wastes less than W keys.
#pragma once

#include <cstdint>

#include "../dtype.h"

// always inlined: the linker keeps one copy of an inline function, possibly one that an older CPU cannot run
#define GRIT_MEMBER __attribute__((always_inline))

namespace grit {

// a (rows, heads, dim) tensor, or (pages, rows, heads, dim); strides in elements, dim contiguous
struct Rows {
  const void* data;
  int64_t row, head, page = 0;
};

// Where a sample's keys lie in pages, see pages.h; no table: as rows.
struct Pages {
  const int32_t* table = nullptr;
  uint32_t size = 0;  // rows of a page
};

struct Sample {
  int64_t q_start, q_len, k_start, k_len;
  int64_t left, right;  // inclusive window distances
  const int32_t* hi;    // per row, or null
  Pages pages = {};     // of which k_start counts slots
};

struct Attention {
  DType dtype;
  int64_t dim, heads_q, heads_kv, group;
  Rows q, k, v;
  void* out;   // (rows, heads_q, dim), contiguous
  float* lse;  // (rows, heads_q)
  // score = softmax_scale * q.k, capped; the kernels work with score * log2(e) and a scale >= 0 (negate: q is packed negated)
  float scale_log2;  // |softmax_scale| * log2(e)
  bool negate, capped;
  float cap_in, cap_out;  // |softmax_scale| / softcap, softcap * log2(e)
  const float* sinks_log2;  // (heads_q), one more score of every row, to which no value belongs, times log2(e); or null
};

struct Gradients {
  Rows grad_out, out;
  const float* lse;       // (rows, heads_q)
  const float* grad_lse;  // (rows, heads_q), or null
  void *dq, *dk, *dv;     // contiguous
  float softmax_scale, magnitude;  // signed, absolute
  float* sink_shares;  // (rows, heads_q), what each row adds to the gradient of its head's sink; null without sinks
};

// How an instruction set lays out the packed operands of a dtype; sizes in 32-bit words.
struct Layout {
  int64_t lanes;    // W
  int64_t vectors;  // slots per tile
  int64_t values;   // values per word: 2 where bfloat16 products come in pairs, else 1
  int64_t padded_dim;
  int64_t row_words;   // words of one row: padded_dim / values
  int64_t tile_lanes;  // lanes * vectors
  int64_t key_step;    // keys are padded to whole steps

  GRIT_MEMBER int64_t padded_keys(int64_t keys) const { return (keys + key_step - 1) / key_step * key_step; }
  GRIT_MEMBER int64_t key_words(int64_t keys) const { return padded_keys(keys) * row_words; }    // one packed copy of K or V
  GRIT_MEMBER int64_t query_words() const { return tile_lanes * row_words; }                     // one packed copy of a tile's rows
  GRIT_MEMBER int64_t slots(const Sample& s, int64_t group) const { return (s.q_len + lanes - 1) / lanes * group; }
  GRIT_MEMBER int64_t tiles(const Sample& s, int64_t group) const { return (slots(s, group) + vectors - 1) / vectors; }
};

constexpr int64_t LARGEST_HEAD_DIM = 512;
constexpr int64_t FORWARD_KEYS = 128;   // keys per block of the forward pass
constexpr int64_t BACKWARD_KEYS = 128;  // keys per block of the backward pass
constexpr int64_t DECODE_KEYS = 256;    // keys per partial result of the path for few queries
constexpr int64_t DECODE_ROWS = 4;      // samples with at most this many rows take it
constexpr int64_t decode_dim(int64_t dim) { return (dim + 31) / 32 * 32; }  // columns of its partial sums

// a tile: one (sample, key head), slots [slot, slot + count)
struct Tile {
  int64_t kv_head, slot, count;
};

}  // namespace grit
