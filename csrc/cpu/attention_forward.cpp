// Forward pass of one tile: S^T = K Q^T, online softmax, O^T += V^T P^T, with queries in the lanes.
//
// Everything of the softmax is vertical: maximum, sum, mask and rescale need no horizontal step, and two rows of P^T are already
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

template <class F, class T, int NV>
int64_t run_tile(const Attention& a, const Sample& s, const Tile& tile, const uint32_t* k_panels, const uint32_t* v_columns,
                 void* memory) {
  const int64_t wide = padded_dim(a.dim), words = wide / F::values;
  const int64_t padded = round_up(s.k_len, 16);
  const Scratch b = split(memory, words);

  vi lo[NV], hi[NV];
  int64_t begin = s.k_len, end = 0, full_begin = 0, full_end = s.k_len;  // as visibility.tile_keys
  GRIT_UNROLL for (int v = 0; v < NV; ++v) {
    const int64_t slot = tile.slot + v, row = slot / a.group * W, head = tile.kv_head * a.group + slot % a.group;
    const int64_t rows = smaller<int64_t>(W, s.q_len - row);
    const T* q = (const T*)a.q.data + (s.q_start + row) * a.q.row + head * a.q.head;
    pack_lanes<F>(q, a.q.row, rows, a.dim, sign_flip<F>(a.negate), b.q + v * W);
    int32_t first[W], last[W];
    for (int i = 0; i < W; ++i) {  // lanes without a row repeat the last row
      const int64_t r = row + smaller<int64_t>(i, rows - 1);
      first[i] = (int32_t)first_key(s, r);
      last[i] = (int32_t)last_key(s, r);
    }
    std::memcpy(&lo[v], first, sizeof(first));
    std::memcpy(&hi[v], last, sizeof(last));
    begin = smaller<int64_t>(begin, first[0]);
    full_begin = larger<int64_t>(full_begin, first[W - 1]);
    full_end = smaller<int64_t>(full_end, last[0]);
    end = larger<int64_t>(end, last[W - 1]);
  }

  vf maximum[NV], total[NV];
  GRIT_UNROLL for (int v = 0; v < NV; ++v) {
    maximum[v] = splat(MINUS_INFINITY);
    total[v] = vf{};
  }
  const vf scale = splat(a.capped ? 1.0f : a.scale_log2);
  bool fresh = true;
  int64_t blocks = 0;
  for (int64_t j0 = begin / PANEL * PANEL; j0 < end; j0 += FORWARD_KEYS, ++blocks) {
    const int64_t keys = round_up(smaller<int64_t>(FORWARD_KEYS, end - j0), PANEL);
    const bool unmasked = j0 >= full_begin && j0 + keys <= full_end;

    vf top[NV];
    GRIT_UNROLL for (int v = 0; v < NV; ++v) top[v] = splat(MINUS_INFINITY);
    for (int64_t j = 0; j < keys; j += PANEL) {
      vf x[PANEL][NV] = {};
      multiply_panel<F, NV>(k_panels + (j0 + j) * words, b.q, words, x);
      if (a.capped) [[unlikely]] {
        for (int i = 0; i < PANEL; ++i)
          for (int v = 0; v < NV; ++v) x[i][v] = tanh_of(x[i][v] * a.cap_in) * a.cap_out;
      }
      if (!unmasked && !(j0 + j >= full_begin && j0 + j + PANEL <= full_end)) {
        GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
          const vi key = splat_int((int32_t)(j0 + j + i));
          GRIT_UNROLL for (int v = 0; v < NV; ++v)
            x[i][v] = ((key >= lo[v]) & (key < hi[v])) ? x[i][v] : splat(MINUS_INFINITY);
        }
      }
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
        GRIT_UNROLL for (int v = 0; v < NV; ++v) {
          store(b.scores + (j + i) * TILE + v * W, x[i][v]);
          top[v] = vmax(top[v], x[i][v]);
        }
    }

    vf rescale[NV], offset[NV];
    GRIT_UNROLL for (int v = 0; v < NV; ++v) {
      const vf higher = vmax(maximum[v], top[v] * scale);
      const vf base = higher == MINUS_INFINITY ? vf{} : higher;  // a lane that saw nothing subtracts 0
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
          p[i] = exp2_of<F::exp_degree>(fma(x, scale, offset[v]));
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

    const uint32_t* columns = v_columns + j0 / F::values * PANEL;
    for (int64_t d = 0; d < wide; d += PANEL) {
      vf x[PANEL][NV];
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
        GRIT_UNROLL for (int v = 0; v < NV; ++v)
          x[i][v] = fresh ? vf{} : load(b.out + (d + i) * TILE + v * W) * rescale[v];
      multiply_panel<F, NV>(columns + d / PANEL * (padded / F::values * PANEL), p_words, keys / F::values, x);
      GRIT_UNROLL for (int i = 0; i < PANEL; ++i)
        GRIT_UNROLL for (int v = 0; v < NV; ++v) store(b.out + (d + i) * TILE + v * W, x[i][v]);
    }
    fresh = false;
  }

  GRIT_UNROLL for (int v = 0; v < NV; ++v) {
    const int64_t slot = tile.slot + v, row = slot / a.group * W, head = tile.kv_head * a.group + slot % a.group;
    const int64_t rows = smaller<int64_t>(W, s.q_len - row);
    if (fresh) std::memset(b.out, 0, (size_t)(wide * TILE) * sizeof(float));
    const vf factor = total[v] == 0.0f ? vf{} : 1.0f / total[v];
    T* out = (T*)a.out + ((s.q_start + row) * a.heads_q + head) * a.dim;
    store_lanes(b.out + v * W, factor, rows, a.dim, out, a.heads_q * a.dim);
    for (int i = 0; i < rows; ++i)
      a.lse[(s.q_start + row + i) * a.heads_q + head] =
          total[v][i] == 0.0f ? MINUS_INFINITY : maximum[v][i] * LN_2 + __builtin_logf(total[v][i]);
  }
  return blocks;
}

}  // namespace

Layout layout(DType dtype, int64_t dim) {
  return with_format(dtype, [&](auto format, auto) {
    constexpr int64_t values = decltype(format)::values;
    return Layout{W, VECTORS, values, padded_dim(dim), padded_dim(dim) / values, TILE};
  });
}

void pack_keys(const Attention& a, const Sample& s, int64_t kv_head, uint32_t* k_panels, uint32_t* v_columns) {
  with_format(a.dtype, [&](auto format, auto type) {
    using F = decltype(format);
    using T = decltype(type);
    const int64_t padded = round_up(s.k_len, 16);
    const T* k = (const T*)a.k.data + s.k_start * a.k.row + kv_head * a.k.head;
    const T* v = (const T*)a.v.data + s.k_start * a.v.row + kv_head * a.v.head;
    pack_row_panels<F>(k, a.k.row, s.k_len, padded, a.dim, k_panels);
    pack_column_panels<F>(v, a.v.row, s.k_len, padded, a.dim, v_columns);
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
    if (tile.count == 3) return run_tile<F, T, 3>(a, s, tile, k_panels, v_columns, scratch);
    if (tile.count == 2) return run_tile<F, T, 2>(a, s, tile, k_panels, v_columns, scratch);
    return run_tile<F, T, 1>(a, s, tile, k_panels, v_columns, scratch);
  });
}

}  // namespace grit::GRIT_ISA
