// Few queries against many keys: decoding. Bound by reading K and V once, in place; nothing is packed.
//
// Here the lanes run along the head dimension. The keys of a sample are cut into parts of DECODE_KEYS that run in parallel and are
// joined in order by their maxima (split-KV), so the result does not depend on the number of threads.
#include "kernels.h"
#include "products.h"
#include "visibility.h"

namespace grit::GRIT_ISA {
namespace {

constexpr int BLOCK = 16;  // keys per step: all heads of so many keys fit the first cache with what is prefetched
constexpr int ROWS = 4;    // (row, head) pairs that share the K and V vectors in registers

// ROWS or fewer query rows of one key head
struct Group {
  int64_t count;
  const void* q[ROWS];
  int64_t lo[ROWS], hi[ROWS];
  int64_t slot[ROWS];  // row * heads_q + head
};

// Rows of one head lie far apart, where hardware prefetching fails: while one block is computed, the next is asked for.
template <class T>
GRIT_INLINE void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row + d);
}

// scores[r][j] = q_r . k_j for `count` keys; the last keys repeat when `count` is no whole number of steps
template <class F, class T, int R>
GRIT_INLINE void score_block(const Group& g, const T* k, int64_t stride, int64_t count, int64_t dim, const T* next,
                             int64_t next_stride, float (*scores)[BLOCK + W]) {
  constexpr int KEYS = W / R;
  const int64_t words = dim / F::values;
  for (int64_t j = 0; j < count; j += KEYS) {
    const T* key[KEYS];
    GRIT_UNROLL for (int i = 0; i < KEYS; ++i) {
      const int64_t number = smaller<int64_t>(j + i, count - 1);
      key[i] = k + number * stride;
      prefetch(next + number * next_stride, dim);
    }
    vf sum[W];
    GRIT_UNROLL for (int i = 0; i < W; ++i) sum[i] = vf{};
    for (int64_t d = 0; d < words; d += W) {
      vu b[KEYS];
      GRIT_UNROLL for (int i = 0; i < KEYS; ++i) b[i] = row_words<F>(key[i], d, dim);
      GRIT_UNROLL for (int r = 0; r < R; ++r) {
        const vu q = row_words<F>((const T*)g.q[r], d, dim);
        GRIT_UNROLL for (int i = 0; i < KEYS; ++i) sum[r * KEYS + i] = F::multiply_add(sum[r * KEYS + i], q, b[i]);
      }
    }
    float all[W];
    store(all, sums_of_each(sum));
    GRIT_UNROLL for (int r = 0; r < R; ++r) std::memcpy(scores[r] + j, all + r * KEYS, KEYS * sizeof(float));
  }
}

// sums[r] += sum over j of p[r][j] * v_j
template <class T, int R>
GRIT_INLINE void value_block(const float (*p)[BLOCK + W], const T* v, int64_t stride, int64_t count, int64_t dim, const T* next,
                             int64_t next_count, int64_t next_stride, float* const* sums) {
  constexpr int VALUES = 4;
  for (int64_t d = 0; d < padded_dim(dim); d += VALUES * W) {
    const int64_t vectors = smaller<int64_t>(VALUES, (padded_dim(dim) - d) / W);
    vf x[R][VALUES];
    GRIT_UNROLL for (int r = 0; r < R; ++r)
      GRIT_UNROLL for (int n = 0; n < VALUES; ++n) x[r][n] = n < vectors ? load(sums[r] + d + n * W) : vf{};
    if (d + VALUES * W <= dim) {
      for (int64_t j = 0; j < count; ++j) {
        vf row[VALUES];
        if (d == 0 && j < next_count) prefetch(next + j * next_stride, dim);
        GRIT_UNROLL for (int n = 0; n < VALUES; ++n) row[n] = load(v + j * stride + d + n * W);
        GRIT_UNROLL for (int r = 0; r < R; ++r) {
          const vf w = splat(p[r][j]);
          GRIT_UNROLL for (int n = 0; n < VALUES; ++n) x[r][n] = fma(w, row[n], x[r][n]);
        }
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        vf row[VALUES];
        GRIT_UNROLL for (int n = 0; n < VALUES; ++n) row[n] = (vf)row_words<Single>(v + j * stride, d + n * W, dim);
        GRIT_UNROLL for (int r = 0; r < R; ++r) {
          const vf w = splat(p[r][j]);
          GRIT_UNROLL for (int n = 0; n < VALUES; ++n) x[r][n] = fma(w, row[n], x[r][n]);
        }
      }
    }
    GRIT_UNROLL for (int r = 0; r < R; ++r)
      for (int n = 0; n < vectors; ++n) store(sums[r] + d + n * W, x[r][n]);
  }
}

template <class F, class T, int R>
void add_keys(const Attention& a, const Sample& s, const Group& g, int64_t kv_head, int64_t begin, int64_t end, const T* next,
              int64_t next_count, float* maximum, float* total, float* const* sums) {
  const int64_t count = end - begin;
  const T* k = (const T*)a.k.data + (s.k_start + begin) * a.k.row + kv_head * a.k.head;
  const T* v = (const T*)a.v.data + (s.k_start + begin) * a.v.row + kv_head * a.v.head;
  alignas(64) float p[R][BLOCK + W];  // a step may write past the block
  score_block<F, T, R>(g, k, a.k.row, count, a.dim, v, a.v.row, p);
  const vi iota = lane_numbers();
  const float sign = a.negate ? -1.0f : 1.0f;
  GRIT_UNROLL for (int r = 0; r < R; ++r) {
    const int64_t slot = g.slot[r];
    const vi lo = splat_int((int32_t)(g.lo[r] - begin)), hi = splat_int((int32_t)smaller(g.hi[r] - begin, count));
    vf top = splat(MINUS_INFINITY);
    for (int64_t j = 0; j < BLOCK; j += W) {
      vf x = load(p[r] + j);
      x = a.capped ? tanh_of(x * (sign * a.cap_in)) * a.cap_out : x * (sign * a.scale_log2);
      const vi key = iota + (int32_t)j;
      x = ((key >= lo) & (key < hi)) ? x : splat(MINUS_INFINITY);
      store(p[r] + j, x);
      top = vmax(top, x);
    }
    const float higher = larger(maximum[slot], max_lanes(top));
    const float base = higher == MINUS_INFINITY ? 0.0f : higher;
    if (higher > maximum[slot]) {
      const float rescale = maximum[slot] == MINUS_INFINITY ? 0.0f : exp2_of<5>(splat(maximum[slot] - base))[0];
      total[slot] *= rescale;
      for (int64_t d = 0; d < padded_dim(a.dim); d += W) store(sums[r] + d, load(sums[r] + d) * rescale);
    }
    maximum[slot] = higher;
    vf added = {};
    for (int64_t j = 0; j < BLOCK; j += W) {
      const vf x = load(p[r] + j);
      const vf e = x == MINUS_INFINITY ? vf{} : exp2_of<F::exp_degree>(x - base);
      store(p[r] + j, e);
      added += e;
    }
    total[slot] += sum_lanes(added);
  }
  value_block<T, R>(p, v, a.v.row, count, a.dim, next, next_count, a.k.row, sums);
}

template <class F, class T>
void part(const Attention& a, const Sample& s, int64_t begin, int64_t end, float* maximum, float* total, float* sums) {
  const int64_t wide = padded_dim(a.dim), rows = s.q_len * a.heads_q, per_head = s.q_len * a.group;
  for (int64_t i = 0; i < rows; ++i) {
    maximum[i] = MINUS_INFINITY;
    total[i] = 0;
  }
  std::memset(sums, 0, (size_t)(rows * wide) * sizeof(float));
  for (int64_t j = begin; j < end; j += BLOCK) {
    const int64_t until = smaller(end, j + BLOCK);
    for (int64_t kv_head = 0; kv_head < a.heads_kv; ++kv_head) {
      // what comes after this block: the next head's keys, or those of the next block
      const bool wraps = kv_head + 1 == a.heads_kv;
      const int64_t next_first = wraps ? until : j, next_count = wraps ? smaller<int64_t>(end - until, BLOCK) : until - j;
      const T* next = (const T*)a.k.data + (s.k_start + next_first) * a.k.row + (wraps ? 0 : kv_head + 1) * a.k.head;
      for (int64_t first = 0; first < per_head; first += ROWS) {
        Group g;
        g.count = smaller<int64_t>(ROWS, per_head - first);
        float* out[ROWS];
        for (int64_t r = 0; r < g.count; ++r) {
          const int64_t row = (first + r) / a.group, head = kv_head * a.group + (first + r) % a.group;
          g.q[r] = (const T*)a.q.data + (s.q_start + row) * a.q.row + head * a.q.head;
          g.lo[r] = first_key(s, row);
          g.hi[r] = last_key(s, row);
          g.slot[r] = row * a.heads_q + head;
          out[r] = sums + g.slot[r] * wide;
        }
        switch (g.count) {
          case 1:
            add_keys<F, T, 1>(a, s, g, kv_head, j, until, next, next_count, maximum, total, out);
            break;
          case 2:
            add_keys<F, T, 2>(a, s, g, kv_head, j, until, next, next_count, maximum, total, out);
            break;
          case 3:
            add_keys<F, T, 3>(a, s, g, kv_head, j, until, next, next_count, maximum, total, out);
            break;
          default:
            add_keys<F, T, 4>(a, s, g, kv_head, j, until, next, next_count, maximum, total, out);
        }
      }
    }
  }
}

template <class T>
void join(const Attention& a, int64_t row, int64_t head, int64_t parts, int64_t stride, const float* maximum,
          const float* total, const float* sums) {
  const int64_t wide = padded_dim(a.dim);
  float highest = MINUS_INFINITY;
  for (int64_t p = 0; p < parts; ++p) highest = larger(highest, maximum[p * stride]);
  T* out = (T*)a.out + (row * a.heads_q + head) * a.dim;
  float all = 0;
  alignas(64) float x[256 + W] = {};
  for (int64_t p = 0; p < parts; ++p) {
    if (maximum[p * stride] == MINUS_INFINITY) continue;
    const float weight = exp2_of<5>(splat(maximum[p * stride] - highest))[0];
    all += weight * total[p * stride];
    for (int64_t d = 0; d < wide; d += W) store(x + d, fma(splat(weight), load(sums + p * stride * wide + d), load(x + d)));
  }
  const float factor = all == 0 ? 0.0f : 1.0f / all;
  for (int64_t d = 0; d < a.dim; d += W) {
    const vf value = load(x + d) * factor;
    if (a.dim - d >= W) store(out + d, value);
    else store_first(out + d, value, a.dim - d);
  }
  a.lse[row * a.heads_q + head] = all == 0 ? MINUS_INFINITY : highest * LN_2 + __builtin_logf(all);
}

}  // namespace

void decode_part(const Attention& a, const Sample& s, int64_t begin, int64_t end, float* maximum, float* total, float* sums) {
  with_format(a.dtype, [&](auto format, auto type) {
    part<decltype(format), decltype(type)>(a, s, begin, end, maximum, total, sums);
  });
}

void decode_join(const Attention& a, int64_t row, int64_t head, int64_t parts, int64_t stride, const float* maximum,
                 const float* total, const float* sums) {
  with_format(a.dtype, [&](auto, auto type) {
    join<decltype(type)>(a, row, head, parts, stride, maximum, total, sums);
  });
}

}  // namespace grit::GRIT_ISA
