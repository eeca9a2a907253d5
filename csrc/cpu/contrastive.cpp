// Contrastive loss: score tiles with an online softmax as the epilogue, and the products of the backward pass.
#include "contrastive.h"

#include "products.h"

namespace grit::GRIT_ISA {
namespace {

constexpr float MASKED = NO_CANDIDATE;
constexpr float LOWEST = -87.0f;  // below it, exp adds nothing to a sum that contains a 1

// Pairs need an even width; a row of odd width is multiplied in FP32.
template <class Function>
GRIT_INLINE auto with_words(DType dtype, int64_t width, Function f) {
  if (dtype == DType::bfloat16 && width % 2) return f(Single{}, bf16{});
  return with_format(dtype, f);
}

GRIT_INLINE vi load_int(const int32_t* p) {
  vi x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
GRIT_INLINE void store_int(int32_t* p, vi x) { std::memcpy(p, &x, sizeof(x)); }

GRIT_INLINE vf exp_of(vf x) { return exp2_of<5>(x * LOG2_E); }

// What a tile's lanes need to scale and mask their scores.
struct Lanes {
  vf scale[VECTORS];
  vi target[VECTORS];
  int32_t first_target, last_target;  // of the tile: panels outside need no comparison
  vi low[VECTORS], high[VECTORS];     // ids
  vi own_begin[VECTORS], own_end[VECTORS];
};

GRIT_INLINE void load_lanes(const Contrastive& p, int64_t query, Lanes& l) {
  GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
    const int64_t at = query + v * W;
    l.scale[v] = load(p.query_scale + at);
    l.target[v] = load_int(p.targets + at);
    if (p.query_low) {
      l.low[v] = load_int(p.query_low + at);
      l.high[v] = load_int(p.query_high + at);
    }
    if (p.own) {
      // a lane after the last query repeats it: the index of its own passages might not fit into 32 bits
      const vi row = lane_numbers() + (int32_t)at, last = splat_int((int32_t)p.queries - 1);
      l.own_begin[v] = (row < last ? row : last) * (int32_t)p.own;
      l.own_end[v] = l.own_begin[v] + (int32_t)p.own;
    }
  }
  l.first_target = 0x7fffffff;
  l.last_target = -1;
  for (int i = 0; i < TILE; ++i) {
    const int32_t t = p.targets[query + i];
    if (t < 0) continue;
    l.first_target = smaller(l.first_target, t);
    l.last_target = larger(l.last_target, t);
  }
}

// Products of passages with the queries of a tile; in tiled formats they are computed a few panels ahead.
template <class F>
struct Products {
  static constexpr int64_t AHEAD = 2 * ROW_STEP;
  const uint32_t *panels, *lanes;
  int64_t words, last, first = 0, known = -1;  // sums of passages [first, known)
  alignas(64) float sums[F::tiled ? AHEAD * TILE : 1];

  GRIT_INLINE Products(const uint32_t* panels, const uint32_t* lanes, int64_t words, int64_t last)
      : panels(panels), lanes(lanes), words(words), last(last) {}

  GRIT_INLINE void of(int64_t j, vf (&s)[PANEL][VECTORS]) {
    if (F::tiled && j >= known) {
      const int64_t rows = smaller(AHEAD, last - j);
      compute_sums<F, VECTORS>(sums, rows, panels + j * words, lanes, words);
      first = j;
      known = j + rows;
    }
    panel_sums<F, VECTORS>(sums + (j - first) * TILE, panels + j * words, lanes, words, s);
  }
};

// Scores of passages [j, j + PANEL), MASKED where the passage is no candidate. Returns whether the panel may hold a target.
template <class F>
GRIT_INLINE bool score_panel(const Contrastive& p, const Lanes& l, Products<F>& products, int64_t j, vf (&s)[PANEL][VECTORS]) {
  products.of(j, s);
  const bool has_target = j <= l.last_target && j + PANEL > l.first_target;
  const bool plain = j + PANEL <= p.passages && !p.query_low && !p.own && !p.passage_scale;
  if (plain) {
    GRIT_UNROLL for (int i = 0; i < PANEL; ++i) GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) s[i][v] *= l.scale[v];
    return has_target;
  }
  GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
    const int64_t passage = j + i;
    if (passage >= p.passages) {
      GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) s[i][v] = splat(MASKED);
      continue;
    }
    const float scale = p.passage_scale ? p.passage_scale[passage] : 1.0f;
    const vi column = splat_int((int32_t)passage);
    GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
      vf x = s[i][v] * l.scale[v] * scale;
      if (p.query_low) {
        const vi same = (vi)(l.low[v] == p.passage_low[passage]) & (vi)(l.high[v] == p.passage_high[passage]);
        x = (same & (vi)(l.target[v] != column)) ? splat(MASKED) : x;
      }
      if (p.own) x = ((vi)(column >= l.own_begin[v]) & (vi)(column < l.own_end[v])) ? x : splat(MASKED);
      s[i][v] = x;
    }
  }
  return has_target;
}

template <class F>
void forward_typed(const Contrastive& p, const uint32_t* panels, const uint32_t* lanes, int64_t query, int64_t first,
                   int64_t last, const ContrastiveState& state) {
  Products<F> products{panels, lanes, padded_dim(p.width) / F::values, last};
  Lanes l;
  load_lanes(p, query, l);
  // These passages get sums of their own: among very many, a passage's contribution would be lost in the rounding of the total.
  vf top_before[VECTORS], total_before[VECTORS], below_before[VECTORS];
  GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
    top_before[v] = load(state.top + v * W);
    total_before[v] = load(state.total + v * W);
    below_before[v] = load(state.below + v * W);
    store(state.total + v * W, vf{});
    store(state.below + v * W, vf{});
  }
  for (int64_t j = first; j < last; j += PANEL) {
    vf s[PANEL][VECTORS];
    const bool has_target = score_panel(p, l, products, j, s);
    if (state.scores) store_all(state.scores + (j - first) * TILE, s);
    if (has_target) {
      GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
        vf positive = load(state.positive + v * W);
        for (int i = 0; i < PANEL; ++i) {
          const vi here = (vi)(l.target[v] == (int32_t)(j + i));
          positive = here ? s[i][v] : positive;
        }
        store(state.positive + v * W, positive);
      }
    }
    GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
      const vf top = load(state.top + v * W);
      vf highest = s[0][v];
      GRIT_UNROLL for (int i = 1; i < PANEL; ++i) highest = vmax(highest, s[i][v]);
      vf total = load(state.total + v * W), below = load(state.below + v * W), safe = top;
      if (any((vi)(highest > top))) {
        vi best = load_int(state.best + v * W);
        vf running = top;
        GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
          const vi better = (vi)(s[i][v] > running);
          best = better ? splat_int((int32_t)(j + i)) : best;
          running = better ? s[i][v] : running;
        }
        store_int(state.best + v * W, best);
        store(state.top + v * W, running);
        const vf change = vmax(top - running, splat(LOWEST));
        const vf decay = exp_of(change);
        below = decay * fma(total, change, below);
        total = total * decay;
        safe = running;
      }
      safe = (vi)(safe > MASKED) ? safe : vf{};  // 0 until there is a candidate
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
        const vf d = vmax(splat(LOWEST), s[i][v] - safe);
        const vf e = exp_of(d);
        total += e;
        below = fma(e, d, below);
      }
      store(state.total + v * W, total);
      store(state.below + v * W, below);
    }
  }
  GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
    const vf change = vmax(top_before[v] - load(state.top + v * W), splat(LOWEST)), decay = exp_of(change);
    store(state.total + v * W, fma(decay, total_before[v], load(state.total + v * W)));
    store(state.below + v * W, fma(decay, fma(total_before[v], change, below_before[v]), load(state.below + v * W)));
  }
}

template <class F>
void weights_typed(const Contrastive& p, const uint32_t* panels, const uint32_t* lanes, int64_t query, int64_t first,
                   int64_t last, const ContrastiveWeights& w) {
  Products<F> products{panels, lanes, padded_dim(p.width) / F::values, last};
  [[maybe_unused]] vu columns[VECTORS][W];  // in a tiled format: the words of a step, to be transposed
  Lanes l;
  load_lanes(p, query, l);
  vf top[VECTORS], log_total[VECTORS], a[VECTORS];
  GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
    top[v] = load(w.top + v * W);
    log_total[v] = load(w.log_total + v * W);
    a[v] = load(w.a + v * W);
  }
  for (int64_t j = first; j < last; j += PANEL) {
    vf s[PANEL][VECTORS];
    bool has_target = j <= l.last_target && j + PANEL > l.first_target;
    if (w.scores) load_all(w.scores + (j - first) * TILE, s);
    else has_target = score_panel(p, l, products, j, s);
    GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
      const float scale = p.passage_scale && j + i < p.passages ? p.passage_scale[j + i] : 1.0f;
      GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
        const vf e = exp_of((s[i][v] - top[v]) - log_total[v]);
        vf softmax = (vi)(s[i][v] > MASKED) ? e : vf{};
        if (has_target) softmax = (vi)(l.target[v] == (int32_t)(j + i)) ? softmax - 1.0f : softmax;
        s[i][v] = softmax * a[v] * scale;
      }
    }
    GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
      char* row = w.rows + (j - first + i) * w.row_stride;
      GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
        if constexpr (F::values == 2) store((bf16*)row + v * W, s[i][v]);
        else store((float*)row + v * W, s[i][v]);
      }
    }
    GRIT_UNROLL for (int i = 0; i < PANEL; i += F::values) {
      const int64_t word = (j - first + i) / F::values;
      GRIT_UNROLL for (int v = 0; v < VECTORS; ++v) {
        vu x;
        if constexpr (F::values == 2) x = pair_words(s[i][v], s[i + 1][v]);
        else x = (vu)s[i][v];
        if constexpr (F::tiled) {
          columns[v][word % W] = x;
          if (word % W + 1 < W) continue;
          transpose(columns[v]);
          uint32_t* tile = w.columns + word / W * (W * TILE) + v * W * W;
          GRIT_UNROLL for (int n = 0; n < W; ++n) store_words(tile + n * W, columns[v][n]);
          continue;
        }
        GRIT_UNROLL for (int b = 0; b < W; b += PANEL)
          std::memcpy(w.columns + ((v * W + b) / PANEL * w.words + word) * PANEL, (const uint32_t*)&x + b, PANEL * sizeof(uint32_t));
      }
    }
  }
}

template <class F, int NV>
void product_typed(const uint32_t* a, int64_t a_stride, const uint32_t* lanes, int64_t count, bool add, const ContrastiveBlock& c) {
  // the sums to add to come from memory: prefetch them while the product runs
  if (add)
    for (int64_t i = 0; i < c.rows; ++i)
      GRIT_UNROLL for (int v = 0; v < NV; ++v) __builtin_prefetch(c.data + i * c.stride + v * W, 1);
  vf sum[PANEL][NV];
  GRIT_UNROLL for (int i = 0; i < PANEL; ++i) GRIT_UNROLL for (int v = 0; v < NV; ++v) sum[i][v] = vf{};
  if (a_stride) multiply_rows<F, NV>(a, a_stride, lanes, TILE, count, sum);
  else multiply_panel<F, NV>(a, lanes, count, sum);
  GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
    if (i >= c.rows) break;
    float* row = c.data + i * c.stride;
    GRIT_UNROLL for (int v = 0; v < NV; ++v) {
      const int64_t here = c.columns - v * W;
      if (here >= W) store(row + v * W, add ? load(row + v * W) + sum[i][v] : sum[i][v]);
      else store_first(row + v * W, add ? load_first(row + v * W, here) + sum[i][v] : sum[i][v], here);
    }
  }
}

#if defined(GRIT_ISA_TILES)
// TILE rows and columns; at the edge of the matrix the sums go through a block of their own
void product_of_tiles(const uint32_t* a, int64_t a_stride, const uint32_t* lanes, int64_t count, bool add, const ContrastiveBlock& c) {
  const TileRows rows = a_stride ? TileRows{a, 16 * a_stride, 16, a_stride} : TileRows{a, TILE_SIZE, TILE / 16 * TILE_SIZE, 16};
  if (c.rows == TILE && c.columns >= TILE) {
    multiply_tiles(c.data, c.stride, TILE / 16, VECTORS, rows, lane_tiles(lanes), count / 16, add);
    return;
  }
  alignas(64) float sums[TILE * TILE];
  multiply_tiles(sums, TILE, TILE / 16, VECTORS, rows, lane_tiles(lanes), count / 16, false);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t v = 0; v < smaller<int64_t>(TILE, c.columns); ++v) {
      float& out = c.data[i * c.stride + v];
      out = add ? out + sums[i * TILE + v] : sums[i * TILE + v];
    }
}
#endif

template <class F>
void product_of(const uint32_t* a, int64_t a_stride, const uint32_t* lanes, int64_t count, bool add, const ContrastiveBlock& c) {
#if defined(GRIT_ISA_TILES)
  if constexpr (F::tiled) return product_of_tiles(a, a_stride, lanes, count, add, c);
#endif
  if (c.columns > 2 * W) product_typed<F, VECTORS>(a, a_stride, lanes, count, add, c);
  else if (c.columns > W) product_typed<F, 2>(a, a_stride, lanes, count, add, c);
  else product_typed<F, 1>(a, a_stride, lanes, count, add, c);
}

template <class F, class T>
void pack_columns_typed(const T* data, int64_t stride, int64_t real, int64_t first, int64_t last, int64_t padded, int64_t width,
                        uint32_t* out) {
  const int64_t words = padded / F::values;
  for (int64_t j = first; j < last; j += F::values) {
    const T* row[F::values];
    find_rows(StridedRows<T>{data, stride}, real, j, row);
    for (int64_t d = 0; d < width; d += W) {
      const vu word = column_words<F>(row, d, width);
      store_words(out + (d / TILE * words + j / F::values) * TILE + d % TILE, word);
    }
    // the last tile may be wider than the row
    for (int64_t d = round_up(width, W); d < round_up(width, TILE); d += W)
      store_words(out + (d / TILE * words + j / F::values) * TILE + d % TILE, vu{});
  }
}

template <class T>
void project_typed(const T* row, int64_t width, float* grad) {
  vf dot = {}, square = {};
  for (int64_t c = 0; c < width; c += W) {
    const vf x = load_up_to(row + c, width - c);
    dot = fma(x, load_up_to(grad + c, width - c), dot);
    square = fma(x, x, square);
  }
  const float length = sum_lanes(square);
  if (!(length > 1e-24f)) return;  // normalisation divided a shorter row by a constant
  const float along = sum_lanes(dot) / length;
  for (int64_t c = 0; c < width; c += W) {
    const vf g = load_up_to(grad + c, width - c) - load_up_to(row + c, width - c) * along;
    store_up_to(grad + c, g, width - c);
  }
}

template <class T>
void scale_typed(const float* grad, float scale, int64_t count, T* out) {
  for (int64_t c = 0; c < count; c += W) {
    store_up_to(out + c, load_up_to(grad + c, count - c) * scale, count - c);
  }
}

// ---- by dtype

constexpr int64_t BLOCK_WORDS = 24 << 10;  // the lanes of a product stay in the second-level cache

ContrastiveLayout layout(DType dtype, int64_t width) {
  return with_words(dtype, width, [&](auto f, auto) {
    using F = decltype(f);
    // tile products read lanes faster than the second-level cache delivers them: a share that fits the first-level cache
    const int64_t inner = F::tiled ? 256 : larger<int64_t>(16, BLOCK_WORDS / TILE / 16 * 16);
    return ContrastiveLayout{F::values, padded_dim(width) / F::values, F::tiled ? TILE : PANEL, TILE, ROW_STEP, inner};
  });
}

void norms(DType dtype, const void* data, int64_t stride, int64_t rows, int64_t width, float* out) {
  with_format(dtype, [&](auto, auto t) {
    using T = decltype(t);
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = (const T*)data + r * stride;
      vf square = {};
      for (int64_t c = 0; c < width; c += W) {
        const vf x = load_up_to(row + c, width - c);
        square = fma(x, x, square);
      }
      out[r] = __builtin_sqrtf(sum_lanes(square));
    }
  });
}

void pack_panels(DType dtype, const void* data, int64_t stride, int64_t real, int64_t rows, int64_t width, uint32_t* out) {
  with_words(dtype, width, [&](auto f, auto t) {
    pack_row_panels<decltype(f)>(StridedRows<decltype(t)>{(const decltype(t)*)data, stride}, real, rows, width, out);
  });
}

void pack_tile(DType dtype, const void* data, int64_t stride, int64_t real, int64_t width, uint32_t* out) {
  with_words(dtype, width, [&](auto f, auto t) {
    using T = decltype(t);
    for (int64_t r = 0; r < TILE; r += W)
      pack_lanes<decltype(f)>((const T*)data + r * stride, stride, real - r, width, 0, out + r);
  });
}

void pack_columns(DType dtype, const void* data, int64_t stride, int64_t real, int64_t first, int64_t last, int64_t padded,
                  int64_t width, uint32_t* out) {
  with_words(dtype, width, [&](auto f, auto t) {
    pack_columns_typed<decltype(f)>((const decltype(t)*)data, stride, real, first, last, padded, width, out);
  });
}

void forward(const Contrastive& p, const uint32_t* panels, const uint32_t* lanes, int64_t query, int64_t first, int64_t last,
             const ContrastiveState& state) {
  with_words(p.dtype, p.width,
             [&](auto f, auto) { forward_typed<decltype(f)>(p, panels, lanes, query, first, last, state); });
}

void weights(const Contrastive& p, const uint32_t* panels, const uint32_t* lanes, int64_t query, int64_t first, int64_t last,
             const ContrastiveWeights& w) {
  with_words(p.dtype, p.width, [&](auto f, auto) { weights_typed<decltype(f)>(p, panels, lanes, query, first, last, w); });
}

void product(DType dtype, int64_t width, const uint32_t* a, int64_t a_stride, const uint32_t* lanes, int64_t count, bool add,
             const ContrastiveBlock& c) {
  with_words(dtype, width, [&](auto f, auto) { product_of<decltype(f)>(a, a_stride, lanes, count, add, c); });
}

void project(DType dtype, const void* row, int64_t width, float* grad) {
  with_format(dtype, [&](auto, auto t) { project_typed((const decltype(t)*)row, width, grad); });
}

void scale(DType dtype, const float* grad, float factor, int64_t count, void* out) {
  with_format(dtype, [&](auto, auto t) { scale_typed(grad, factor, count, (decltype(t)*)out); });
}

}  // namespace

extern const ContrastiveKernels contrastive_table;
const ContrastiveKernels contrastive_table = {layout,  norms,   pack_panels, pack_tile, pack_columns,
                                              forward, weights, product,     project,   scale};

}  // namespace grit::GRIT_ISA
