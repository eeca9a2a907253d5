// Backward pass: gradients of one block of keys from every tile of queries that sees it.
//
//   S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T, dS^T = P^T * (dP^T - delta) * cap'        queries in the lanes, in registers
//   dV += P^T dO,  dK += dS^T Q                                                                 head dimension in the lanes
//   dQ^T += K^T dS^T                                                                            queries in the lanes
//
// delta = rowsum(dO * O) - grad_lse. P^T and dS^T leave the registers once, as the packed operands of the last three products.
// A block of keys owns its rows of dK and dV; its share of dQ goes to a partial sum that only this key chunk writes, so the
// order of additions depends on shapes alone. A sink z is part of lse; a row adds -exp(z - lse) delta to its gradient.
#include "kernels.h"
#include "products.h"
#include "visibility.h"

namespace grit::GRIT_ISA {
namespace {

constexpr int KEYS = BACKWARD_KEYS;

// Tiles whose P and dS are multiplied together. Sums of tile products live in memory, so each visit to them must do enough work.
#if defined(GRIT_ISA_TILES)
constexpr int GROUP = 4;
#else
constexpr int GROUP = 1;
#endif
constexpr int GROUP_LANES = GROUP * TILE;

struct Scratch {
  uint32_t *p, *ds;             // [KEYS][GROUP_LANES / values]: operands of dV and dK
  uint32_t* ds_columns;         // [KEYS / values][TILE]: operand of dQ
  float *dk, *dv;               // [KEYS][padded_dim]
  float *scores, *grad_scores;  // [KEYS][TILE], of tiled formats
  float *lanes, *slope;         // [PANEL][TILE]
};

GRIT_INLINE Scratch split(void* memory, int64_t wide) {
  uint32_t* p = (uint32_t*)memory;
  uint32_t *ds = p + KEYS * GROUP_LANES, *columns = ds + KEYS * GROUP_LANES;
  float *dk = (float*)(columns + KEYS * TILE), *dv = dk + KEYS * wide, *scores = dv + KEYS * wide;
  float *grad_scores = scores + KEYS * TILE, *lanes = grad_scores + KEYS * TILE;
  return {p, ds, columns, dk, dv, scores, grad_scores, lanes, lanes + PANEL * TILE};
}

// out (KEYS rows) += a x rows: a [KEYS][GROUP_LANES / values], rows [lanes / values][wide]; the rows of the group's tiles are
// `step` words apart
template <class F>
GRIT_INLINE void add_rows(const uint32_t* a, const uint32_t* rows, [[maybe_unused]] int64_t step, int64_t wide, int64_t keys,
                          int64_t lanes, float* out) {
  const int64_t stride = GROUP_LANES / F::values, count = lanes / F::values;
#if defined(GRIT_ISA_TILES)
  if constexpr (F::tiled) {
    multiply_tiles(out, wide, keys / 16, wide / 16, {a, 16 * stride, 16, stride}, {rows, step, wide}, count / 16, true);
    return;
  }
#endif
  for (int64_t j = 0; j < keys; j += PANEL) {
    int64_t d = 0;
    for (; d + ROW_VECTORS * W <= wide; d += ROW_VECTORS * W) {
      vf x[PANEL][ROW_VECTORS];
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
        GRIT_UNROLL for (int v = 0; v < ROW_VECTORS; ++v) x[i][v] = load(out + (j + i) * wide + d + v * W);
      multiply_rows<F, ROW_VECTORS>(a + j * stride, stride, rows + d, wide, count, x);
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
        GRIT_UNROLL for (int v = 0; v < ROW_VECTORS; ++v) store(out + (j + i) * wide + d + v * W, x[i][v]);
    }
    for (; d < wide; d += W) {
      vf x[PANEL][1];
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i) x[i][0] = load(out + (j + i) * wide + d);
      multiply_rows<F, 1>(a + j * stride, stride, rows + d, wide, count, x);
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i) store(out + (j + i) * wide + d, x[i][0]);
    }
  }
}

template <class F>
GRIT_INLINE void store_row_operand(uint32_t* out, int64_t row, int v, vf x) {
  if constexpr (F::values == 2) {
    const vh h = to_bf16(x);
    std::memcpy((uint16_t*)out + row * GROUP_LANES + v * W, &h, sizeof(h));
  } else {
    store((float*)out + row * GROUP_LANES + v * W, x);
  }
}

// turns raw products [PANEL][TILE] into base-2 scores, rounded; slope, if given, receives the derivative of the cap
template <int NV>
GRIT_INLINE void finish_scores(const Attention& a, float* raw, float* slope) {
  if (a.capped) cap_scores(raw, a.cap_in, a.cap_out, slope);
  else
    for (int v = 0; v < NV; ++v) scale_scores(raw + v * W, PANEL, a.scale_log2, splat_int(-1));
}

// The keys from `begin` on that any lane of the tiles sees, in whole steps
struct Span {
  int64_t begin, keys;
};

template <class F>
Span seen_by(const QueryPack* packs, int64_t tiles, int64_t last_lanes, int64_t begin, int64_t keys) {
  constexpr int64_t STEP = F::tiled ? ROW_STEP : PANEL;
  int64_t first = begin + keys, last = begin;
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t i = 0; i < (t + 1 < tiles ? TILE : last_lanes); i += W) {  // both bounds never decrease within a slot
      first = smaller<int64_t>(first, packs[t].lo[i]);
      last = larger<int64_t>(last, packs[t].hi[i + W - 1]);
    }
  const int64_t skipped = larger<int64_t>(0, first - begin) / STEP * STEP;
  return {begin + skipped, smaller(keys - skipped, round_up(last - begin - skipped, STEP))};
}

// From this base-2 log-sum-exp on, rounding it to one number would show in the probabilities of its row.
template <class T>
constexpr float LARGE_LSE = sizeof(T) == 4 ? 64 : 1024;

GRIT_INLINE int64_t head_of(const Attention& a, const Tile& tile, int64_t v) { return tile.kv_head * a.group + (tile.slot + v) % a.group; }

// The highest score of each row of a tile, and log2 of the sum of all exponentials relative to it; a sink counts as a score.
template <class F, int NV>
void take_apart_tile(const Attention& a, const Tile& tile, const Scratch& b, const QueryPack& q, const KeyPack& k, int64_t padded,
                     int64_t wide) {
  const int64_t words = wide / F::values;
  vf maximum[NV], total[NV];
  GRIT_UNROLL for (int v = 0; v < NV; ++v) {
    maximum[v] = splat(MINUS_INFINITY);
    total[v] = vf{};
  }
  const Span span = seen_by<F>(&q, 1, NV * W, 0, padded);
  for (int64_t n = 0; n < span.keys; n += PANEL) {
    const int64_t j = span.begin + n;
    if (n % KEYS == 0) compute_sums<F, NV>(b.scores, smaller<int64_t>(KEYS, span.keys - n), k.k_panels + j * words, q.q, words);
    vf x[PANEL][NV];
    panel_sums<F, NV>(b.scores + n % KEYS * TILE, k.k_panels + j * words, q.q, words, x);
    store_all(b.lanes, x);
    finish_scores<NV>(a, b.lanes, nullptr);
    GRIT_UNROLL for (int v = 0; v < NV; ++v) {
      vi lo, hi;
      std::memcpy(&lo, q.lo + v * W, sizeof(vi));
      std::memcpy(&hi, q.hi + v * W, sizeof(vi));
      for (int i = 0; i < PANEL; ++i) {
        const vi key = splat_int((int32_t)(j + i));
        const vf score = ((key >= lo) & (key < hi)) ? load(b.lanes + i * TILE + v * W) : splat(MINUS_INFINITY);
        const vf higher = vmax(maximum[v], score), base = higher == MINUS_INFINITY ? vf{} : higher;
        const vf added = score == MINUS_INFINITY ? vf{} : exp2_of<5>(score - base);
        total[v] = total[v] * exp2_of<5>(maximum[v] - base) + added;
        maximum[v] = higher;
      }
    }
  }
  if (a.sinks_log2)
    for (int v = 0; v < NV; ++v) add_sink(splat(a.sinks_log2[head_of(a, tile, v)]), maximum[v], total[v]);
  GRIT_UNROLL for (int v = 0; v < NV; ++v)
    for (int i = 0; i < W; ++i) {
      const bool empty = maximum[v][i] == MINUS_INFINITY;
      q.lse_log2[v * W + i] = empty ? 0.0f : maximum[v][i];
      q.log2_total[v * W + i] = empty ? 0.0f : __builtin_log2f(total[v][i]);
    }
}

// One tile against keys [begin, begin + keys): adds to dq; P and dS go to b.p and b.ds as the group's tile number `number`.
template <class F, int NV>
void tile_block(const Attention& a, const Scratch& b, const QueryPack& q, const KeyPack& k, int64_t begin, int64_t keys,
                int64_t padded, int64_t wide, int64_t number, float* dq) {
  const int64_t words = wide / F::values;
  uint32_t *const p_rows = b.p + number * TILE / F::values, *const ds_rows = b.ds + number * TILE / F::values;
  vi lo[NV], hi[NV];
  vf lse[NV], delta[NV];
  int64_t full_begin = 0, full_end = padded;
  GRIT_UNROLL for (int v = 0; v < NV; ++v) {
    std::memcpy(&lo[v], q.lo + v * W, sizeof(vi));
    std::memcpy(&hi[v], q.hi + v * W, sizeof(vi));
    lse[v] = load(q.lse_log2 + v * W);
    delta[v] = load(q.delta + v * W);
    full_begin = larger<int64_t>(full_begin, q.lo[v * W + W - 1]);
    full_end = smaller<int64_t>(full_end, q.hi[v * W]);
  }
  compute_sums<F, NV>(b.scores, keys, k.k_panels + begin * words, q.q, words);
  compute_sums<F, NV>(b.grad_scores, keys, k.v_panels + begin * words, q.grad_out, words);
  const float scale = q.apart || a.capped ? 1.0f : a.scale_log2;
  for (int64_t j = 0; j < keys; j += PANEL) {
    vf p[PANEL][NV];
    panel_sums<F, NV>(b.scores + j * TILE, k.k_panels + (begin + j) * words, q.q, words, p);
    if (a.capped || q.apart) [[unlikely]] {
      store_all(b.lanes, p);
      finish_scores<NV>(a, b.lanes, b.slope);
      load_all(b.lanes, p);
      if (q.apart) GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
        GRIT_UNROLL for (int v = 0; v < NV; ++v) p[i][v] = (p[i][v] - lse[v]) - load(q.log2_total + v * W);
    }
    const bool unmasked = begin + j >= full_begin && begin + j + PANEL <= full_end;
    GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
      GRIT_UNROLL for (int v = 0; v < NV; ++v) {
        p[i][v] = exp2_of<F::exp_degree>(q.apart ? p[i][v] : fma(p[i][v], splat(scale), -lse[v]));
        if (!unmasked) {
          const vi key = splat_int((int32_t)(begin + j + i));
          p[i][v] = ((key >= lo[v]) & (key < hi[v])) ? p[i][v] : vf{};
        }
        store(b.lanes + i * TILE + v * W, p[i][v]);
        store_row_operand<F>(p_rows, j + i, v, p[i][v]);
      }
    }
    vf ds[PANEL][NV];
    panel_sums<F, NV>(b.grad_scores + j * TILE, k.v_panels + (begin + j) * words, q.grad_out, words, ds);
    GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
      GRIT_UNROLL for (int v = 0; v < NV; ++v) {
        ds[i][v] = load(b.lanes + i * TILE + v * W) * (ds[i][v] - delta[v]);
        if (a.capped) [[unlikely]] ds[i][v] *= load(b.slope + i * TILE + v * W);
        store_row_operand<F>(ds_rows, j + i, v, ds[i][v]);
      }
    GRIT_UNROLL for (int i = 0; i < PANEL; i += F::values)
      GRIT_UNROLL for (int v = 0; v < NV; ++v) {
        uint32_t* out = b.ds_columns + (j + i) / F::values * TILE + v * W;
        if constexpr (F::values == 2) store_words(out, pair_words(ds[i][v], ds[i + 1][v]));
        else store_words(out, (vu)ds[i][v]);
      }
  }
#if defined(GRIT_ISA_TILES)
  if constexpr (F::tiled) {
    multiply_tiles(dq, TILE, wide / 16, NV, column_tiles(k.k_columns, padded, begin), lane_tiles(b.ds_columns), keys / 32, true);
    return;
  }
#endif
  const uint32_t* columns = k.k_columns + begin / F::values * PANEL;
  for (int64_t d = 0; d < wide; d += PANEL) {
    vf x[PANEL][NV];
    load_all(dq + d * TILE, x);
    multiply_panel<F, NV>(columns + d * (padded / F::values), b.ds_columns, keys / F::values, x);
    store_all(dq + d * TILE, x);
  }
}

template <class T>
GRIT_INLINE void store_rows(const float* rows, int64_t wide, int64_t count, int64_t dim, float factor, T* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < dim; d += W) {
      const vf x = load(rows + i * wide + d) * factor;
      if (dim - d >= W) store(out + i * stride + d, x);
      else store_first(out + i * stride + d, x, dim - d);
    }
}

template <class F, class T>
int64_t run_keys(const Attention& a, const Gradients& g, const Sample& s, int64_t kv_head, int64_t begin, int64_t end,
                 int64_t first_tile, const KeyPack& k, const QueryPack* packs, float* dq, void* memory) {
  const int64_t wide = padded_dim(a.dim), padded = round_up(s.k_len, ROW_STEP);
  const Scratch b = split(memory, wide);
  const int64_t slots = (s.q_len + W - 1) / W * a.group;
  int64_t blocks = 0;
  for (int64_t j = begin; j < end; j += KEYS) {
    const int64_t count = smaller<int64_t>(KEYS, end - j), keys = round_up(count, F::tiled ? ROW_STEP : PANEL);
    std::memset(b.dk, 0, (size_t)(2 * KEYS * wide) * sizeof(float));
    const RowRange rows = rows_that_see(s, j, j + count);
    if (rows.first < rows.last) {
      const int64_t from = rows.first / W * a.group / VECTORS;
      const int64_t until = (smaller((rows.last + W - 1) / W * a.group, slots) + VECTORS - 1) / VECTORS;
      for (int64_t tile = from; tile < until; tile += GROUP) {
        const int64_t tiles = smaller<int64_t>(GROUP, until - tile);
        // slots of the last tile; in a tiled format the missing ones are packed as zeros
        const int64_t last = F::tiled ? VECTORS : smaller<int64_t>(VECTORS, slots - (tile + tiles - 1) * VECTORS);
        const Span span = seen_by<F>(packs + tile, tiles, last * W, j, keys);
        blocks += tiles;
        if (span.keys <= 0) continue;
        for (int64_t n = 0; n < tiles; ++n)
          with_count(n + 1 < tiles ? VECTORS : last, [&](auto slots_here) {
            tile_block<F, decltype(slots_here)::value>(a, b, packs[tile + n], k, span.begin, span.keys, padded, wide, n,
                                                       dq + (tile + n - first_tile) * wide * TILE);
          });
        const int64_t lanes = (tiles - 1) * TILE + last * W, at = (span.begin - j) * wide;
        const QueryPack &q = packs[tile], &next = packs[tile + (tiles > 1)];
        add_rows<F>(b.p, q.grad_out_rows, next.grad_out_rows - q.grad_out_rows, wide, span.keys, lanes, b.dv + at);
        add_rows<F>(b.ds, q.q_rows, next.q_rows - q.q_rows, wide, span.keys, lanes, b.dk + at);
      }
    }
    const int64_t at = ((s.k_start + j) * a.heads_kv + kv_head) * a.dim, stride = a.heads_kv * a.dim;
    store_rows(b.dk, wide, count, a.dim, g.magnitude, (T*)g.dk + at, stride);
    store_rows(b.dv, wide, count, a.dim, 1.0f, (T*)g.dv + at, stride);
  }
  return blocks;
}

// rows as [rows / values][wide] words: `values` consecutive rows of a column in one word, head dimension in the lanes
template <class F, class T>
GRIT_INLINE void pack_row_operand(const T* data, int64_t stride, int64_t rows, int64_t dim, uint32_t flip, uint32_t* out) {
  const int64_t wide = padded_dim(dim);
  for (int64_t i = 0; i < W; i += F::values)
    for (int64_t d = 0; d < wide; d += W) {
      vu word = i < rows ? row_words<Single>(data + i * stride, d, dim) : vu{};
      if constexpr (F::values == 2) {
        const vu next = i + 1 < rows ? row_words<Single>(data + (i + 1) * stride, d, dim) : vu{};
        word = word >> 16 | next;
      }
      store_words(out + i / F::values * wide + d, word ^ flip);
    }
}

// slot v has no rows: zeros that see what the slot before it sees
template <class F>
void clear_slot(const QueryPack& out, int64_t v, int64_t wide) {
  for (int64_t n = 0; n < wide / F::values; ++n) {
    store_words(out.q + n * TILE + v * W, vu{});
    store_words(out.grad_out + n * TILE + v * W, vu{});
  }
  const int64_t rows = W / F::values * wide;
  std::memset(out.q_rows + v * rows, 0, (size_t)rows * 4);
  std::memset(out.grad_out_rows + v * rows, 0, (size_t)rows * 4);
  for (int64_t i = v * W; i < (v + 1) * W; ++i) {
    out.lse_log2[i] = out.delta[i] = 0;
    out.lo[i] = out.lo[v * W - 1];
    out.hi[i] = out.hi[v * W - 1];
  }
}

// lane `at` holds a row that sees no key: zeros, whatever the row and its gradients hold
template <class F>
void clear_row(const QueryPack& out, int64_t at, int64_t wide) {
  for (int64_t n = 0; n < wide / F::values; ++n) out.q[n * TILE + at] = out.grad_out[n * TILE + at] = 0;
  const uint32_t other = F::values == 1 ? 0 : at % 2 ? 0x0000ffffu : 0xffff0000u;  // the row that shares the words
  for (int64_t d = at / F::values * wide; d < (at / F::values + 1) * wide; ++d) {
    out.q_rows[d] &= other;
    out.grad_out_rows[d] &= other;
  }
}

template <class F, class T>
bool pack_queries(const Attention& a, const Gradients& g, const Sample& s, const Tile& tile, const QueryPack& out) {
  const int64_t wide = padded_dim(a.dim);
  bool large = false;
  for (int64_t v = 0; v < tile.count; ++v) {
    const int64_t row = (tile.slot + v) / a.group * W, head = head_of(a, tile, v);
    const int64_t rows = smaller<int64_t>(W, s.q_len - row), first = s.q_start + row;
    const T* q = head_rows<T>(a.q, first, head);
    const T* grad = head_rows<T>(g.grad_out, first, head);
    const T* o = head_rows<T>(g.out, first, head);
    const uint32_t flip = sign_flip<F>(a.negate);
    pack_lanes<F>(q, a.q.row, rows, a.dim, flip, out.q + v * W);
    pack_lanes<F>(grad, g.grad_out.row, rows, a.dim, 0, out.grad_out + v * W);
    pack_row_operand<F>(q, a.q.row, rows, a.dim, flip, out.q_rows + v * W / F::values * wide);
    pack_row_operand<F>(grad, g.grad_out.row, rows, a.dim, 0, out.grad_out_rows + v * W / F::values * wide);
    for (int64_t i = 0; i < W; ++i) {
      const int64_t at = v * W + i, r = row + smaller(i, rows - 1);
      out.lo[at] = (int32_t)first_key(s, r);
      out.hi[at] = (int32_t)last_key(s, r);
      out.lse_log2[at] = 0;
      out.delta[at] = 0;
      if (i >= rows) continue;
      if (out.lo[at] >= out.hi[at]) {
        clear_row<F>(out, at, wide);
        continue;
      }
      vf sum = {};
      for (int64_t d = 0; d < a.dim; d += W)
        sum = fma((vf)row_words<Single>(grad + i * g.grad_out.row, d, a.dim), (vf)row_words<Single>(o + i * g.out.row, d, a.dim), sum);
      const int64_t number = (first + i) * a.heads_q + head;
      const float lse = g.lse[number];
      // the -inf of a row whose scores are all -inf would turn them into NaN
      out.lse_log2[at] = lse == MINUS_INFINITY ? 0.0f : lse * LOG2_E;
      large |= __builtin_fabsf(out.lse_log2[at]) >= LARGE_LSE<T>;
      out.delta[at] = sum_lanes(sum) - (g.grad_lse ? g.grad_lse[number] : 0.0f);
    }
  }
  if constexpr (F::tiled)
    for (int64_t v = tile.count; v < VECTORS; ++v) clear_slot<F>(out, v, wide);
  return large;
}

}  // namespace

void backward_pack_keys(const Attention& a, const Sample& s, int64_t kv_head, uint32_t* k_panels, uint32_t* v_panels,
                        uint32_t* k_columns) {
  with_format(a.dtype, [&](auto format, auto type) {
    using F = decltype(format);
    using T = decltype(type);
    const int64_t padded = round_up(s.k_len, ROW_STEP);
    const KeyRows<T> k(a.k, s, kv_head), v(a.v, s, kv_head);
    pack_row_panels<F>(k, s.k_len, padded, a.dim, k_panels);
    pack_row_panels<F>(v, s.k_len, padded, a.dim, v_panels);
    pack_column_panels<F>(k, s.k_len, padded, a.dim, k_columns);
  });
}

bool backward_pack_queries(const Attention& a, const Gradients& g, const Sample& s, const Tile& tile, const QueryPack& out) {
  return with_format(a.dtype, [&](auto format, auto type) {
    return pack_queries<decltype(format), decltype(type)>(a, g, s, tile, out);
  });
}

void backward_take_apart(const Attention& a, const Sample& s, const Tile& tile, const KeyPack& k, const QueryPack& q,
                         void* scratch) {
  with_format(a.dtype, [&](auto format, auto) {
    using F = decltype(format);
    const int64_t padded = round_up(s.k_len, ROW_STEP), wide = padded_dim(a.dim);
    const Scratch b = split(scratch, wide);
    with_count(F::tiled ? VECTORS : tile.count,
               [&](auto count) { take_apart_tile<F, decltype(count)::value>(a, tile, b, q, k, padded, wide); });
  });
}

int64_t backward_scratch(DType, int64_t dim) {
  return (2 * KEYS * GROUP_LANES + 3 * KEYS * TILE + 2 * KEYS * padded_dim(dim) + 2 * PANEL * TILE) * (int64_t)sizeof(float);
}

int64_t backward_keys(const Attention& a, const Gradients& g, const Sample& s, int64_t kv_head, int64_t begin, int64_t end,
                      int64_t first_tile, const KeyPack& k, const QueryPack* packs, float* dq, void* scratch) {
  return with_format(a.dtype, [&](auto format, auto type) {
    return run_keys<decltype(format), decltype(type)>(a, g, s, kv_head, begin, end, first_tile, k, packs, dq, scratch);
  });
}

void backward_store_dq(const Attention& a, const Gradients& g, const Sample& s, const Tile& tile, const QueryPack& q, int64_t parts,
                       const float* const* partial, void* scratch) {
  with_format(a.dtype, [&](auto, auto type) {
    using T = decltype(type);
    const int64_t wide = padded_dim(a.dim);
    float* sum = (float*)scratch;
    if (parts == 0) std::memset(sum, 0, (size_t)(wide * TILE) * sizeof(float));
    for (int64_t i = 0; i < wide * TILE; i += W) {
      vf x = parts ? load(partial[0] + i) : vf{};
      for (int64_t p = 1; p < parts; ++p) x += load(partial[p] + i);
      store(sum + i, x);
    }
    for (int64_t v = 0; v < tile.count; ++v) {
      const int64_t row = (tile.slot + v) / a.group * W, rows = smaller<int64_t>(W, s.q_len - row);
      const int64_t number = (s.q_start + row) * a.heads_q + head_of(a, tile, v);
      store_lanes(sum + v * W, splat(g.softmax_scale), rows, a.dim, (T*)g.dq + number * a.dim, a.heads_q * a.dim);
      if (!a.sinks_log2) continue;
      const vf delta = load(q.delta + v * W);
      vf below = splat(a.sinks_log2[head_of(a, tile, v)]) - load(q.lse_log2 + v * W);
      if (q.apart) below -= load(q.log2_total + v * W);
      // a row that sees no key has a delta of 0, and no lse
      const vf share = delta == 0.0f ? vf{} : -exp2_or_zero(below) * delta;
      for (int64_t i = 0; i < rows; ++i) g.sink_shares[number + i * a.heads_q] = share[i];
    }
  });
}

}  // namespace grit::GRIT_ISA
