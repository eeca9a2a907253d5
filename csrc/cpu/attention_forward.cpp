// Forward pass of one tile: S^T = K Q^T, online softmax, O^T += V^T P^T, with queries in the lanes.
//
// The whole softmax is vertical: maximum, sum, mask and rescaling need no operation across lanes, and two rows of P^T are already
// the packed operand of the second product. Only Q is transposed, once per tile.
#include "kernels.h"
#include "products.h"
#include "visibility.h"

namespace grit::GRIT_ISA {
namespace {

// scratch: Q^T [row_words][TILE], scores [FORWARD_KEYS + PANEL][TILE], O^T [padded_dim][TILE]
struct Scratch {
  uint32_t* q;
  float *scores, *out;
};

GRIT_INLINE Scratch split(void* memory, int64_t words) {
  uint32_t* q = (uint32_t*)memory;
  float* scores = (float*)(q + words * TILE);
  return {q, scores, scores + (FORWARD_KEYS + PANEL) * TILE};
}

// Per-lane state of a tile's rows. The key ranges are those of visibility.tile_keys over all lanes.
struct Lanes {
  alignas(64) int32_t lo[TILE], hi[TILE];
  alignas(64) float maximum[TILE], total[TILE];
  int64_t begin, end, full_begin, full_end;
};

// rows [row, row + rows) of one slot
struct Slot {
  int64_t row, rows, head;
};

GRIT_INLINE Slot slot_of(const Attention& a, const Sample& s, const Tile& tile, int64_t v) {
  const int64_t slot = tile.slot + v, row = slot / a.group * W;
  return {row, smaller<int64_t>(W, s.q_len - row), tile.kv_head * a.group + slot % a.group};
}

template <class F, class T>
void load_queries(const Attention& a, const Sample& s, const Tile& tile, const Scratch& b, Lanes& lanes) {
  lanes.begin = lanes.full_end = s.k_len;
  lanes.end = lanes.full_begin = 0;
  for (int64_t v = 0; v < tile.count; ++v) {
    const Slot slot = slot_of(a, s, tile, v);
    pack_lanes<F>(head_rows<T>(a.q, s.q_start + slot.row, slot.head), a.q.row, slot.rows, a.dim, sign_flip<F>(a.negate), b.q + v * W);
    for (int64_t i = 0; i < W; ++i) {  // lanes without a row repeat the last row
      const int64_t row = slot.row + smaller(i, slot.rows - 1);
      lanes.lo[v * W + i] = (int32_t)first_key(s, row);
      lanes.hi[v * W + i] = (int32_t)last_key(s, row);
    }
    lanes.begin = smaller<int64_t>(lanes.begin, lanes.lo[v * W]);
    lanes.full_begin = larger<int64_t>(lanes.full_begin, lanes.lo[v * W + W - 1]);
    lanes.full_end = smaller<int64_t>(lanes.full_end, lanes.hi[v * W]);
    lanes.end = larger<int64_t>(lanes.end, lanes.hi[v * W + W - 1]);
  }
}

template <class T>
void store_results(const Attention& a, const Sample& s, const Tile& tile, const Scratch& b, const Lanes& lanes) {
  for (int64_t v = 0; v < tile.count; ++v) {
    const Slot slot = slot_of(a, s, tile, v);
    vf total = load(lanes.total + v * W), maximum = load(lanes.maximum + v * W), share = splat(1.0f);
    if (a.sinks_log2) share = add_sink(splat(a.sinks_log2[slot.head]), maximum, total);
    const vf factor = total == 0.0f ? vf{} : share / total;
    const int64_t number = (s.q_start + slot.row) * a.heads_q + slot.head;
    store_lanes(b.out + v * W, factor, slot.rows, a.dim, (T*)a.out + number * a.dim, a.heads_q * a.dim);
    for (int64_t i = 0; i < slot.rows; ++i)
      a.lse[number + i * a.heads_q] = total[i] == 0.0f ? MINUS_INFINITY : maximum[i] * LN_2 + __builtin_logf(total[i]);
  }
}

// O^T = rescale * O^T (0 when fresh) + V^T P^T for keys [j0, j0 + keys)
template <class F, int NV>
GRIT_INLINE void add_values(const uint32_t* v_columns, int64_t padded, int64_t j0, int64_t keys, int64_t wide, const uint32_t* p_words,
                            const vf (&rescale)[NV], bool fresh, float* out) {
#if defined(GRIT_ISA_TILES)
  if constexpr (F::tiled) {
    bool changed = false;
    GRIT_UNROLL for (int v = 0; v < NV; ++v) changed |= any(rescale[v] != 1.0f);
    if (!fresh && changed)
      for (int64_t d = 0; d < wide; ++d)
        GRIT_UNROLL for (int v = 0; v < NV; ++v) store(out + d * TILE + v * W, load(out + d * TILE + v * W) * rescale[v]);
    multiply_tiles(out, TILE, wide / 16, NV, column_tiles(v_columns, padded, j0), lane_tiles(p_words), keys / 32, !fresh);
    return;
  }
#endif
  const uint32_t* columns = v_columns + j0 / F::values * PANEL;
  for (int64_t d = 0; d < wide; d += PANEL) {
    vf x[PANEL][NV];
    if (fresh) {
      set_zero(x);
    } else {
      load_all(out + d * TILE, x);
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
        GRIT_UNROLL for (int v = 0; v < NV; ++v) x[i][v] *= rescale[v];
    }
    multiply_panel<F, NV>(columns + d * (padded / F::values), p_words, keys / F::values, x);
    store_all(out + d * TILE, x);
  }
}

// The highest of rows [0, rows) of scores in each lane, rows a multiple of 4: four maxima at a time, for each waits for its last.
template <int NV>
GRIT_INLINE void highest(const float* scores, int64_t rows, vf (&top)[NV]) {
  vf part[4][NV];
  GRIT_UNROLL for (int i = 0; i < 4; ++i) GRIT_UNROLL for (int v = 0; v < NV; ++v) part[i][v] = splat(MINUS_INFINITY);
  for (int64_t j = 0; j < rows; j += 4)
    GRIT_UNROLL for (int i = 0; i < 4; ++i)
      GRIT_UNROLL for (int v = 0; v < NV; ++v) part[i][v] = vmax(part[i][v], load(scores + (j + i) * TILE + v * W));
  GRIT_UNROLL for (int v = 0; v < NV; ++v) top[v] = vmax(vmax(part[0][v], part[1][v]), vmax(part[2][v], part[3][v]));
}

// By how much (a power of 2) probabilities may exceed 1 before tiles take a higher maximum. Any maximum is exact, P has as many
// digits, and with the same one the sums so far need no pass that rescales them.
constexpr float HEADROOM = 8;

// O^T (unnormalised), maximum and total of all lanes; returns the number of key blocks
template <class F, int NV>
int64_t run_tile(const Attention& a, int64_t padded, const uint32_t* k_panels, const uint32_t* v_columns, const Scratch& b,
                 Lanes& lanes) {
  const int64_t wide = padded_dim(a.dim), words = wide / F::values;
  const int64_t begin = lanes.begin, end = lanes.end, full_begin = lanes.full_begin, full_end = lanes.full_end;
  vi lo[NV], hi[NV];
  GRIT_UNROLL for (int v = 0; v < NV; ++v) {
    std::memcpy(&lo[v], lanes.lo + v * W, sizeof(vi));
    std::memcpy(&hi[v], lanes.hi + v * W, sizeof(vi));
  }

  vf maximum[NV], total[NV];
  GRIT_UNROLL for (int v = 0; v < NV; ++v) {
    maximum[v] = splat(MINUS_INFINITY);
    total[v] = vf{};
  }
  const vf scale = splat(a.capped ? 1.0f : a.scale_log2);
  bool fresh = true;
  int64_t blocks = 0;
  constexpr int64_t STEP = F::tiled ? ROW_STEP : PANEL;
  for (int64_t j0 = begin / STEP * STEP; j0 < end; j0 += FORWARD_KEYS, ++blocks) {
    const int64_t keys = round_up(smaller<int64_t>(FORWARD_KEYS, end - j0), STEP);
    const bool unmasked = j0 >= full_begin && j0 + keys <= full_end;
    compute_sums<F, NV>(b.scores, keys, k_panels + j0 * words, b.q, words);

    vf top[NV];
    GRIT_UNROLL for (int v = 0; v < NV; ++v) top[v] = splat(MINUS_INFINITY);
    const bool as_they_are = F::tiled && unmasked && !a.capped;
    if (as_they_are) highest(b.scores, keys, top);
    for (int64_t j = 0; j < keys && !as_they_are; j += PANEL) {
      vf x[PANEL][NV];
      panel_sums<F, NV>(b.scores + j * TILE, k_panels + (j0 + j) * words, b.q, words, x);
      if (a.capped) [[unlikely]] {
        store_all(b.scores + j * TILE, x);
        cap_scores(b.scores + j * TILE, a.cap_in, a.cap_out, nullptr);
        load_all(b.scores + j * TILE, x);
      }
      if (!unmasked && !(j0 + j >= full_begin && j0 + j + PANEL <= full_end)) {
        GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
          const vi key = splat_int((int32_t)(j0 + j + i));
          GRIT_UNROLL for (int v = 0; v < NV; ++v)
            x[i][v] = ((key >= lo[v]) & (key < hi[v])) ? x[i][v] : splat(MINUS_INFINITY);
        }
      }
      store_all(b.scores + j * TILE, x);
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
        GRIT_UNROLL for (int v = 0; v < NV; ++v) top[v] = vmax(top[v], x[i][v]);
    }

    vf rescale[NV], offset[NV], factor[NV];
    GRIT_UNROLL for (int v = 0; v < NV; ++v) {
      vf higher = vmax(maximum[v], top[v] * scale);
      if constexpr (F::tiled) higher = (vi)(higher <= maximum[v] + HEADROOM) ? maximum[v] : higher;
      const vf base = higher == MINUS_INFINITY ? vf{} : higher;  // a lane that saw nothing subtracts 0
      factor[v] = scale;
      const vi large = vabs(base) >= LARGE_SCORE;
      if (any(large)) [[unlikely]] {
        scale_scores(b.scores + v * W, keys, scale[0], large);
        factor[v] = large ? splat(1.0f) : scale;
      }
      rescale[v] = exp2_of<F::exp_degree>(maximum[v] - base);
      maximum[v] = higher;
      offset[v] = -base;
      total[v] *= rescale[v];
    }

    uint32_t* p_words = (uint32_t*)b.scores;  // P^T overwrites the scores it came from
    for (int64_t j = 0; j < keys; j += F::values) {
      GRIT_UNROLL for (int v = 0; v < NV; ++v) {
        vf p[F::values];
        GRIT_UNROLL for (int i = 0; i < F::values; ++i) {
          const vf x = load(b.scores + (j + i) * TILE + v * W);
          p[i] = exp2_of<F::exp_degree>(fma(x, factor[v], offset[v]));
          if (!unmasked) p[i] = x == MINUS_INFINITY ? vf{} : p[i];
          total[v] += p[i];
        }
        if constexpr (F::values == 2) {
          store_words(p_words + j / 2 * TILE + v * W, pair_words(p[0], p[1]));
        } else {
          store(b.scores + j * TILE + v * W, p[0]);
        }
      }
    }

    add_values<F, NV>(v_columns, padded, j0, keys, wide, p_words, rescale, fresh, b.out);
    fresh = false;
  }

  if (fresh) std::memset(b.out, 0, (size_t)(wide * TILE) * sizeof(float));
  GRIT_UNROLL for (int v = 0; v < NV; ++v) {
    store(lanes.maximum + v * W, maximum[v]);
    store(lanes.total + v * W, total[v]);
  }
  return blocks;
}

}  // namespace

Layout layout(DType dtype, int64_t dim) {
  return with_format(dtype, [&](auto format, auto) {
    constexpr int64_t values = decltype(format)::values;
    return Layout{W, VECTORS, values, padded_dim(dim), padded_dim(dim) / values, TILE, ROW_STEP};
  });
}

void pack_keys(const Attention& a, const Sample& s, int64_t kv_head, uint32_t* k_panels, uint32_t* v_columns) {
  with_format(a.dtype, [&](auto format, auto type) {
    using F = decltype(format);
    using T = decltype(type);
    const int64_t padded = round_up(s.k_len, ROW_STEP);
    pack_row_panels<F>(KeyRows<T>(a.k, s, kv_head), s.k_len, padded, a.dim, k_panels);
    pack_column_panels<F>(KeyRows<T>(a.v, s, kv_head), s.k_len, padded, a.dim, v_columns);
  });
}

int64_t forward_scratch(DType dtype, int64_t dim) {
  const Layout l = layout(dtype, dim);
  return (l.query_words() + (FORWARD_KEYS + PANEL) * TILE + l.padded_dim * TILE) * (int64_t)sizeof(float);
}

int64_t forward_tile(const Attention& a, const Sample& s, const Tile& tile, const uint32_t* k_panels,
                     const uint32_t* v_columns, void* scratch) {
  return with_format(a.dtype, [&](auto format, auto type) {
    using F = decltype(format);
    using T = decltype(type);
    const int64_t padded = round_up(s.k_len, ROW_STEP);
    const Scratch b = split(scratch, padded_dim(a.dim) / F::values);
    Lanes lanes;
    load_queries<F, T>(a, s, tile, b, lanes);
    const int64_t blocks = with_count(tile.count, [&](auto count) {
      return run_tile<F, decltype(count)::value>(a, padded, k_panels, v_columns, b, lanes);
    });
    store_results<T>(a, s, tile, b, lanes);
    return blocks;
  });
}

}  // namespace grit::GRIT_ISA
