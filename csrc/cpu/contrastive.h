// Plain arguments of the contrastive kernels.
//
// All three matrix products take packed operands: a *panel* (`panel` rows side by side, the broadcast side) times *lanes*
// (`tile` columns, the vector side). A word is one FP32 value or, where the CPU multiplies bfloat16, a pair of them. Where it
// multiplies matrix tiles (tiles.h), [words][panel] below means [words / 16][panel / 16] tiles of 16 rows of 16 words.
//   scores^T  [passages, queries]   passages as row panels    x queries as lanes               over the width
//   grad_q    [queries, width]      weights as column panels  x passages as columns of words   over the passages
//   grad_p    [passages, width]     weights as rows           x queries as columns of words    over the queries
#pragma once

#include <cstdint>

#include "attention.h"

namespace grit {

constexpr float NO_CANDIDATE = -3.402823466e38f;  // score of a passage that is not a candidate: below every other one

// score_ij = query_scale[i] * passage_scale[j] * q_i . p_j; passage_scale, the id arrays and `own` (0: all) may be absent
struct Contrastive {
  DType dtype;
  int64_t queries, passages, width;
  const float *query_scale, *passage_scale;   // query_scale is padded to whole tiles with 0
  const int32_t* targets;                     // padded with -1
  const int32_t *query_low, *query_high;      // halves of the 64-bit ids, padded
  const int32_t *passage_low, *passage_high;  // padded to whole panels
  int64_t own;                                // passages of a query's own group, the only candidates
};

// Online softmax of the queries of a tile: total = sum exp(score - top), below = sum exp(score - top) (score - top).
struct ContrastiveState {
  float *top, *total, *below, *positive;
  int32_t* best;
  float* scores;  // [passage - first][tile] receives the scores, or null
};

// weight_ij = a_i (softmax_ij - [j = target_i]) * passage_scale_j, stored twice; softmax_ij = exp((score_ij - top_i) - log_total_i)
struct ContrastiveWeights {
  const float *top, *log_total, *a;  // of the tile's queries
  const float* scores;                 // [passage - first][tile] as the forward pass left them; null: recomputed
  char* rows;                          // [passage - first][row_stride bytes], at the tile's first query
  int64_t row_stride;
  uint32_t* columns;  // [tile / panel][words][panel]: the passages' weights of `panel` queries
  int64_t words;      // of a column panel
};

// Up to panel x tile values of an FP32 matrix.
struct ContrastiveBlock {
  float* data;
  int64_t stride, rows, columns;
};

// How an instruction set lays out the operands of one dtype and width.
struct ContrastiveLayout {
  int64_t values;  // per word
  int64_t words;   // of a row
  int64_t panel, tile;
  int64_t step;   // passages are padded to whole steps, and every range of them starts at one
  int64_t inner;  // words to multiply at a time
};

struct ContrastiveKernels {
  ContrastiveLayout (*layout)(DType, int64_t width);
  void (*norms)(DType, const void* row, int64_t stride, int64_t rows, int64_t width, float* out);
  // rows as row panels [rows / panel][words][panel]; of `rows` rows, `real` exist; panels of 16 rows where they hold tiles
  void (*pack_panels)(DType, const void* data, int64_t stride, int64_t real, int64_t rows, int64_t width, uint32_t* out);
  // up to `tile` rows as lanes [words][tile]
  void (*pack_lanes)(DType, const void* data, int64_t stride, int64_t real, int64_t width, uint32_t* out);
  // rows [first, last) of `padded` as columns [width / tile][padded / values][tile]
  void (*pack_columns)(DType, const void* data, int64_t stride, int64_t real, int64_t first, int64_t last, int64_t padded,
                       int64_t width, uint32_t* out);
  // passages [first, last), where a panel starts at `first`, against the tile that starts at `query`
  void (*forward)(const Contrastive&, const uint32_t* panels, const uint32_t* lanes, int64_t query, int64_t first, int64_t last,
                  const ContrastiveState&);
  void (*weights)(const Contrastive&, const uint32_t* panels, const uint32_t* lanes, int64_t query, int64_t first, int64_t last,
                  const ContrastiveWeights&);
  // c (+)= a panel of `count` words, [count][panel] or, with a row stride (words), [panel][a_stride], x lanes
  void (*product)(DType, int64_t width, const uint32_t* a, int64_t a_stride, const uint32_t* lanes, int64_t count, bool add,
                  const ContrastiveBlock& c);
  // removes from a grad row its component along the row, in place
  void (*project)(DType, const void* row, int64_t width, float* grad);
  // out = scale * grad, `count` values in the dtype
  void (*scale)(DType, const float* grad, float scale, int64_t count, void* out);
};

}  // namespace grit
