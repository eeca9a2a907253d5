// Few queries against many keys: decoding. Its cost is reading K and V, once and in place; nothing is packed.
//
// Here the lanes run along the head dimension. The keys of a sample are cut into parts of DECODE_KEYS, computed in parallel and
// merged in order with their maxima (split-KV), so the result does not depend on the number of threads.
#include "kernels.h"
#include "products.h"
#include "visibility.h"

namespace grit::GRIT_ISA {
namespace {

constexpr int BLOCK = 16;                // keys per step: all heads of this many keys fit the first-level cache
constexpr int ROWS = 4;                  // (row, head) pairs that share the K and V vectors in registers
constexpr int64_t FETCH_BYTES = 1 << 15;  // of K and V prefetched, all heads together

// ROWS or fewer query rows of one key head
struct Group {
  int64_t count;
  const void* q[ROWS];
  int64_t lo[ROWS], hi[ROWS];
  int64_t slot[ROWS];  // row * heads_q + head
};

// Partial result of a part: maximum [slots], total [slots][W] (to be summed over lanes), sums [slots][decode_dim]
struct State {
  float *maximum, *total, *sums;
};

// The rows of one head are too far apart for the hardware prefetcher: fetch each line into the second-level cache well ahead.
GRIT_INLINE void fetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// A block of K or V of one key head: its rows, and those which are prefetched with them, of which `last` is the last. Both lie one
// row after another, as always without pages.
template <class T>
struct RowsInOrder {
  const T *data, *ahead;
  int64_t stride, count, last;
  GRIT_MEMBER const T* row(int64_t j) const { return data + j * stride; }
  GRIT_MEMBER const T* coming(int64_t j) const { return ahead + smaller(j, last) * stride; }
};

// The same where either crosses from one page into another. The places are those of every head.
struct Places {
  int64_t row[BLOCK], coming[BLOCK];
};
template <class T>
struct RowsAcrossPages {
  const T* data;
  const Places& places;
  int64_t count, last;
  GRIT_MEMBER const T* row(int64_t j) const { return data + places.row[j]; }
  GRIT_MEMBER const T* coming(int64_t j) const { return data + places.coming[smaller(j, last)]; }
};

// scores[r][j] = q_r . k_j for all keys; the last key is repeated when they do not fill whole steps.
// WHOLE: a row is a whole number of vectors.
template <class F, class T, int R, bool WHOLE, class Keys>
GRIT_INLINE void score_block(const Group& g, const Keys& k, int64_t dim, float (*scores)[BLOCK + W]) {
  constexpr int KEYS = W / R;
  const int64_t words = dim / F::values;
  for (int64_t j = 0; j < k.count; j += KEYS) {
    const T *key[KEYS], *coming[KEYS];
    GRIT_UNROLL for (int i = 0; i < KEYS; ++i) {
      key[i] = k.row(smaller<int64_t>(j + i, k.count - 1));
      coming[i] = k.coming(j + i);
    }
    vf sum[W];
    GRIT_UNROLL for (int i = 0; i < W; ++i) sum[i] = vf{};
    _Pragma("GCC unroll 2") for (int64_t d = 0; d < words; d += W) {
      vu b[KEYS];
      GRIT_UNROLL for (int i = 0; i < KEYS; ++i) {
        b[i] = some_words<F, T, WHOLE>(key[i], d, dim);
        fetch(coming[i] + d * F::values);
      }
      GRIT_UNROLL for (int r = 0; r < R; ++r) {
        const vu q = some_words<F, T, WHOLE>((const T*)g.q[r], d, dim);
        GRIT_UNROLL for (int i = 0; i < KEYS; ++i) sum[r * KEYS + i] = F::multiply_add(sum[r * KEYS + i], q, b[i]);
      }
    }
    float all[W];
    store(all, sums_of_each(sum));
    GRIT_UNROLL for (int r = 0; r < R; ++r) std::memcpy(scores[r] + j, all + r * KEYS, KEYS * sizeof(float));
  }
}

// sums[r] += sum over j of p[r][j] * v_j, columns from d on, N vectors of them
template <class T, int R, int N, bool WHOLE, class Keys>
GRIT_INLINE void value_columns(const float (*p)[BLOCK + W], const Keys& v, int64_t dim, int64_t d, float* const* sums) {
  vf x[R][N];
  GRIT_UNROLL for (int r = 0; r < R; ++r)
    GRIT_UNROLL for (int n = 0; n < N; ++n) x[r][n] = load(sums[r] + d + n * W);
  for (int64_t j = 0; j < v.count; ++j) {
    vf row[N];
    const T* coming = v.coming(j) + d;
    GRIT_UNROLL for (int n = 0; n < N; ++n) {
      row[n] = (vf)some_words<Single, T, WHOLE>(v.row(j), d + n * W, dim);
      if (n * W * sizeof(T) % 64 == 0) fetch(coming + n * W);
    }
    GRIT_UNROLL for (int r = 0; r < R; ++r) {
      const vf w = splat(p[r][j]);
      GRIT_UNROLL for (int n = 0; n < N; ++n) x[r][n] = fma(w, row[n], x[r][n]);
    }
  }
  GRIT_UNROLL for (int r = 0; r < R; ++r)
    GRIT_UNROLL for (int n = 0; n < N; ++n) store(sums[r] + d + n * W, x[r][n]);
}

template <class T, int R, class Keys>
GRIT_INLINE void value_block(const float (*p)[BLOCK + W], const Keys& v, int64_t dim, float* const* sums) {
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) value_columns<T, R, 4, true>(p, v, dim, d, sums);
  for (; d + W <= dim; d += W) value_columns<T, R, 1, true>(p, v, dim, d, sums);
  if (d < dim) value_columns<T, R, 1, false>(p, v, dim, d, sums);
}

#if defined(GRIT_ISA_AVX512_BF16)
// The same for pairs of rows, N times 32 columns at a time: p_words[r][j / 2] holds the probabilities of keys j and j + 1 as
// bfloat16. The sums of 32 columns stay in interleaved order (ordered_sums undoes it once per part).
template <int R, int N, bool WHOLE, class Keys>
GRIT_INLINE void value_pair_columns(const uint32_t (*p_words)[BLOCK / 2], const Keys& v, int64_t dim, int64_t d,
                                    float* const* sums) {
  vf x[R][2 * N];
  GRIT_UNROLL for (int r = 0; r < R; ++r)
    GRIT_UNROLL for (int n = 0; n < 2 * N; ++n) x[r][n] = load(sums[r] + d + n * W);
  for (int64_t j = 0; j < v.count; j += 2) {
    __m512i pairs[2 * N];
    const bf16 *coming = v.coming(j) + d, *coming_next = v.coming(j + 1) + d;
    GRIT_UNROLL for (int n = 0; n < N; ++n) {
      fetch(coming + n * 2 * W);
      fetch(coming_next + n * 2 * W);
      const __m512i first = (__m512i)some_words<Pair, bf16, WHOLE>(v.row(j), d / 2 + n * W, dim);
      const __m512i second = j + 1 < v.count ? (__m512i)some_words<Pair, bf16, WHOLE>(v.row(j + 1), d / 2 + n * W, dim) : __m512i{};
      pairs[2 * n] = _mm512_unpacklo_epi16(first, second);
      pairs[2 * n + 1] = _mm512_unpackhi_epi16(first, second);
    }
    GRIT_UNROLL for (int r = 0; r < R; ++r) {
      const uint32_t w = p_words[r][j / 2];
      GRIT_UNROLL for (int n = 0; n < 2 * N; ++n) x[r][n] = Pair::multiply_add(x[r][n], w, (vu)pairs[n]);
    }
  }
  GRIT_UNROLL for (int r = 0; r < R; ++r)
    GRIT_UNROLL for (int n = 0; n < 2 * N; ++n) store(sums[r] + d + n * W, x[r][n]);
}

template <int R, class Keys>
GRIT_INLINE void value_pairs_block(const float (*p)[BLOCK + W], const Keys& v, int64_t dim, float* const* sums) {
  uint32_t p_words[R][BLOCK / 2];
  GRIT_UNROLL for (int r = 0; r < R; ++r) {
    const vh h = to_bf16(load(p[r]));
    std::memcpy(p_words[r], &h, sizeof(h));
  }
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) value_pair_columns<R, 2, true>(p_words, v, dim, d, sums);
  for (; d + 32 <= dim; d += 32) value_pair_columns<R, 1, true>(p_words, v, dim, d, sums);
  if (d < dim) value_pair_columns<R, 1, false>(p_words, v, dim, d, sums);
}

GRIT_INLINE void ordered_sums(float* sums, int64_t wide) {
  for (int64_t d = 0; d < wide; d += 32) {
    const vf a = load(sums + d), b = load(sums + d + W);
    store(sums + d, __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
    store(sums + d + W, __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
  }
}
#endif

template <class F, class T, int R, class Keys>
void add_keys(const Attention& a, const Group& g, int64_t begin, const Keys& k, const Keys& v, const State& state, int64_t wide) {
  alignas(64) float p[R][BLOCK + W];  // a step may write past the block
  if (a.dim % (W * F::values) == 0) score_block<F, T, R, true>(g, k, a.dim, p);
  else score_block<F, T, R, false>(g, k, a.dim, p);
  const vi iota = lane_numbers();
  const float sign = a.negate ? -1.0f : 1.0f;
  vf top[R];
  GRIT_UNROLL for (int r = 0; r < R; ++r) {
    const vi lo = splat_int((int32_t)(g.lo[r] - begin)), hi = splat_int((int32_t)smaller(g.hi[r] - begin, k.count));
    top[r] = splat(MINUS_INFINITY);
    GRIT_UNROLL for (int j = 0; j < BLOCK; j += W) {
      vf x = load(p[r] + j);
      x = a.capped ? tanh_of(x * (sign * a.cap_in)) * a.cap_out : x * (sign * a.scale_log2);
      const vi key = iota + (int32_t)j;
      x = ((key >= lo) & (key < hi)) ? x : splat(MINUS_INFINITY);
      store(p[r] + j, x);
      top[r] = vmax(top[r], x);
    }
  }
  float base[R], *sums[R];
  GRIT_UNROLL for (int r = 0; r < R; ++r) {
    float& maximum = state.maximum[g.slot[r]];
    float* total = state.total + g.slot[r] * W;
    sums[r] = state.sums + g.slot[r] * wide;
    const float higher = larger(maximum, max_lanes(top[r]));
    base[r] = higher == MINUS_INFINITY ? 0.0f : higher;
    if (higher > maximum) {
      const float rescale = maximum == MINUS_INFINITY ? 0.0f : exp2_of<5>(splat(maximum - base[r]))[0];
      store(total, load(total) * rescale);
      for (int64_t d = 0; d < wide; d += W) store(sums[r] + d, load(sums[r] + d) * rescale);
      maximum = higher;
    }
  }
  GRIT_UNROLL for (int r = 0; r < R; ++r) {
    float* total = state.total + g.slot[r] * W;
    vf added = load(total);
    GRIT_UNROLL for (int j = 0; j < BLOCK; j += W) {
      const vf x = load(p[r] + j);
      const vf e = x == MINUS_INFINITY ? vf{} : exp2_of<F::exp_degree>(x - base[r]);
      store(p[r] + j, e);
      added += e;
    }
    store(total, added);
  }
#if defined(GRIT_ISA_AVX512_BF16)
  if constexpr (F::values == 2) {
    value_pairs_block<R>(p, v, a.dim, sums);
    return;
  }
#endif
  value_block<T, R>(p, v, a.dim, sums);
}

// The block of keys from `begin` on, all heads; keys(x, head): its rows in K or V
template <class F, class T, class Find>
GRIT_INLINE void add_block(const Attention& a, const Sample& s, int64_t begin, const State& state, int64_t wide, const Find& keys) {
  const int64_t per_head = s.q_len * a.group;
  for (int64_t kv_head = 0; kv_head < a.heads_kv; ++kv_head) {
    const auto k = keys(a.k, kv_head), v = keys(a.v, kv_head);
    for (int64_t first = 0; first < per_head; first += ROWS) {
      Group g;
      g.count = smaller<int64_t>(ROWS, per_head - first);
      for (int64_t r = 0; r < g.count; ++r) {
        const int64_t row = (first + r) / a.group, head = kv_head * a.group + (first + r) % a.group;
        g.q[r] = head_rows<T>(a.q, s.q_start + row, head);
        g.lo[r] = first_key(s, row);
        g.hi[r] = last_key(s, row);
        g.slot[r] = row * a.heads_q + head;
      }
      switch (g.count) {
        case 1:
          add_keys<F, T, 1>(a, g, begin, k, v, state, wide);
          break;
        case 2:
          add_keys<F, T, 2>(a, g, begin, k, v, state, wide);
          break;
        case 3:
          add_keys<F, T, 3>(a, g, begin, k, v, state, wide);
          break;
        default:
          add_keys<F, T, 4>(a, g, begin, k, v, state, wide);
      }
    }
  }
}

template <class F, class T>
void part(const Attention& a, const Sample& s, int64_t begin, int64_t end, int64_t fetch_end, const State& state) {
  const int64_t wide = decode_dim(a.dim), rows = s.q_len * a.heads_q;
  for (int64_t i = 0; i < rows; ++i) state.maximum[i] = MINUS_INFINITY;
  std::memset(state.total, 0, (size_t)(rows * W) * sizeof(float));
  std::memset(state.sums, 0, (size_t)(rows * wide) * sizeof(float));
  const int64_t ahead = larger<int64_t>(BLOCK, FETCH_BYTES / (2 * a.heads_kv * a.dim * (int64_t)sizeof(T)));
  for (int64_t j = begin; j < end; j += BLOCK) {
    const int64_t count = smaller<int64_t>(BLOCK, end - j), slot = s.k_start + j;
    const int64_t coming = smaller(j + ahead, fetch_end - 1) - j, last = fetch_end - 1 - j - coming;
    const int64_t last_of_block = smaller<int64_t>(last, BLOCK - 1);
    if (slots_in_page(s.pages, slot) >= count && slots_in_page(s.pages, slot + coming) > last_of_block) {
      const int64_t k_first = slot_offset(a.k, s.pages, slot), k_next = slot_offset(a.k, s.pages, slot + coming);
      const int64_t v_first = slot_offset(a.v, s.pages, slot), v_next = slot_offset(a.v, s.pages, slot + coming);
      add_block<F, T>(a, s, j, state, wide, [&](const Rows& x, int64_t kv_head) {
        const T* head = head_rows<T>(x, 0, kv_head);
        const bool of_k = &x == &a.k;
        return RowsInOrder<T>{head + (of_k ? k_first : v_first), head + (of_k ? k_next : v_next), x.row, count, last_of_block};
      });
    } else {
      Places k_places, v_places;
      for (int64_t i = 0; i < BLOCK; ++i) {
        const int64_t here = slot + smaller(i, count - 1), next = slot + coming + smaller(i, last);
        k_places.row[i] = slot_offset(a.k, s.pages, here), k_places.coming[i] = slot_offset(a.k, s.pages, next);
        v_places.row[i] = slot_offset(a.v, s.pages, here), v_places.coming[i] = slot_offset(a.v, s.pages, next);
      }
      add_block<F, T>(a, s, j, state, wide, [&](const Rows& x, int64_t kv_head) {
        return RowsAcrossPages<T>{head_rows<T>(x, 0, kv_head), &x == &a.k ? k_places : v_places, count, BLOCK - 1};
      });
    }
  }
#if defined(GRIT_ISA_AVX512_BF16)
  if constexpr (F::values == 2) ordered_sums(state.sums, rows * wide);
#endif
}

template <class T>
void join(const Attention& a, int64_t row, int64_t head, int64_t parts, int64_t stride, const float* maximum,
          const float* total, const float* sums) {
  const int64_t wide = decode_dim(a.dim);
  float highest = MINUS_INFINITY;
  for (int64_t p = 0; p < parts; ++p) highest = larger(highest, maximum[p * stride]);
  T* out = (T*)a.out + (row * a.heads_q + head) * a.dim;
  vf totals = {};
  alignas(64) float x[LARGEST_HEAD_DIM + W] = {};
  for (int64_t p = 0; p < parts; ++p) {
    const vf of_part = load(total + p * stride * W);
    // a part without keys; scores that are all NaN have no maximum either, but a total
    if (maximum[p * stride] == MINUS_INFINITY && sum_lanes(of_part) == 0.0f) continue;
    const vf weight = splat(exp2_of<5>(splat(maximum[p * stride] - highest))[0]);
    totals = fma(weight, of_part, totals);
    for (int64_t d = 0; d < wide; d += W) store(x + d, fma(weight, load(sums + p * stride * wide + d), load(x + d)));
  }
  vf top = splat(highest), total_of_all = splat(sum_lanes(totals)), share = splat(1.0f);
  if (a.sinks_log2) share = add_sink(splat(a.sinks_log2[head]), top, total_of_all);
  const float all = total_of_all[0], factor = all == 0 ? 0.0f : share[0] / all;
  for (int64_t d = 0; d < a.dim; d += W) {
    const vf value = load(x + d) * factor;
    if (a.dim - d >= W) store(out + d, value);
    else store_first(out + d, value, a.dim - d);
  }
  a.lse[row * a.heads_q + head] = all == 0 ? MINUS_INFINITY : top[0] * LN_2 + __builtin_logf(all);
}

}  // namespace

void decode_part(const Attention& a, const Sample& s, int64_t begin, int64_t end, int64_t fetch_end, float* maximum,
                 float* total, float* sums) {
#if defined(GRIT_ISA_TILES)
  // a handful of rows does not fill a tile, and CPUs with tiles multiply bfloat16 pairs at half the rate of FP32
  part<Single, bf16>(a, s, begin, end, fetch_end, {maximum, total, sums});
#else
  with_format(a.dtype, [&](auto format, auto type) {
    part<decltype(format), decltype(type)>(a, s, begin, end, fetch_end, {maximum, total, sums});
  });
#endif
}

void decode_join(const Attention& a, int64_t row, int64_t head, int64_t parts, int64_t stride, const float* maximum,
                 const float* total, const float* sums) {
  with_format(a.dtype, [&](auto, auto type) {
    join<decltype(type)>(a, row, head, parts, stride, maximum, total, sums);
  });
}

}  // namespace grit::GRIT_ISA
