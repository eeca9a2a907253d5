// Weighted sum of rows and its gradient: the inner parts of pool_forward and pool_backward. Memory bound: each row is read from
// memory once, several rows per pass over the sums, while the rows of the next pass are prefetched into the second-level cache
// (the hardware prefetcher stops at the end of a page and does not follow eight rows at once).
#include "kernels.h"
#include "simd.h"

namespace grit::GRIT_ISA {
namespace {

constexpr int ROWS = 8, GRADIENT_ROWS = 4, LINE = 64;

// prefetches the 2 W elements that are `ahead` elements after p; a prefetch never faults, whatever the address
template <class T>
GRIT_INLINE void fetch(const T* p, int64_t ahead) {
  const uintptr_t at = (uintptr_t)p + (uintptr_t)(ahead * (int64_t)sizeof(T));
  GRIT_UNROLL for (int b = 0; b < (int)(2 * W * sizeof(T)); b += LINE) __builtin_prefetch((const void*)(at + b), 0, 2);
}

// Elements between row t and the row read `rows` rows later: one of these rows or, past their end, of those from p.next on.
GRIT_INLINE int64_t ahead_of(const PoolRows& p, int64_t t, int64_t rows) {
  int64_t later = t + rows;
  if (later >= p.last) later = p.next < 0 ? t : p.next + later - p.last;
  return (later - t) * p.row_stride;
}

template <class T>
float inverse_rms(const T* row, int64_t columns, float eps, int64_t ahead) {
  vf a = {}, b = {};
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) {
    fetch(row + c, ahead);
    vf x = load(row + c), y = load(row + c + W);
    a = fma(x, x, a);
    b = fma(y, y, b);
  }
  for (; c < columns; c += W) {
    vf x = load_first(row + c, smaller<int64_t>(W, columns - c));
    a = fma(x, x, a);
  }
  float mean = sum_lanes(a + b) / (float)columns + eps;
  return 1.0f / __builtin_sqrtf(mean);
}

// out += sum_i coefficient[i] * row[i], in the order of the rows; out is overwritten when `fresh`
template <class T, int N, bool FETCH>
void add_rows(const T* const* row, const float* coefficient, int64_t columns, float* out, bool fresh, int64_t ahead) {
  vf w[N];
  GRIT_UNROLL for (int i = 0; i < N; ++i) w[i] = splat(coefficient[i]);
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) {
    vf a = fresh ? vf{} : load(out + c), b = fresh ? vf{} : load(out + c + W);
    GRIT_UNROLL for (int i = 0; i < N; ++i) {
      if constexpr (FETCH) fetch(row[i] + c, ahead);
      a = fma(w[i], load(row[i] + c), a);
      b = fma(w[i], load(row[i] + c + W), b);
    }
    store(out + c, a);
    store(out + c + W, b);
  }
  for (; c < columns; c += W) {
    int64_t n = smaller<int64_t>(W, columns - c);
    vf a = fresh ? vf{} : load_first(out + c, n);
    GRIT_UNROLL for (int i = 0; i < N; ++i) a = fma(w[i], load_first(row[i] + c, n), a);
    store_first(out + c, a, n);
  }
}

template <class T, bool NORMED>
void pool_typed(const PoolRows& p) {
  const T* hidden = (const T*)p.hidden;
  const T* row[ROWS];
  float coefficient[ROWS];
  int waiting = 0, done = 0;
  bool fresh = true;
  int64_t ahead = 0;
  for (int64_t t = p.first; t < p.last; ++t) {
    float weight = p.weights[t];
    if (weight == 0) continue;
    row[waiting] = hidden + t * p.row_stride;
    if (waiting == 0 || NORMED) ahead = ahead_of(p, t, ROWS);
    coefficient[waiting] = NORMED ? weight * inverse_rms(row[waiting], p.columns, p.eps, ahead) : weight;
    if (++waiting == ROWS) {
      add_rows<T, ROWS, !NORMED>(row, coefficient, p.columns, p.out, fresh, ahead);
      waiting = 0;
      fresh = false;
    }
  }
  auto add = [&]<int N>() {
    add_rows<T, N, !NORMED>(row + done, coefficient + done, p.columns, p.out, fresh, ahead);
    fresh = false;
    done += N;
  };
  if (waiting & 4) add.template operator()<4>();
  if (waiting & 2) add.template operator()<2>();
  if (waiting & 1) add.template operator()<1>();
  if (fresh) std::memset(p.out, 0, (size_t)p.columns * sizeof(float));
}

// Gradients of N rows with the norm: r (g - n mean(n g)) for each, where n = h r and g = weight * grad * gain
template <class T, int N>
void normed_gradients(const PoolBackwardRows& call, const int64_t (&t)[GRADIENT_ROWS]) {
  const PoolRows& p = call.rows;
  const int64_t columns = p.columns;
  const T* row[N];
  T* out[N];
  vf weight[N], r[N], sum[N], along[N];
  GRIT_UNROLL for (int i = 0; i < N; ++i) {
    row[i] = (const T*)p.hidden + t[i] * p.row_stride;
    out[i] = (T*)call.grad_hidden + t[i] * columns;
    weight[i] = splat(p.weights[t[i]]);
    r[i] = splat(inverse_rms(row[i], columns, p.eps, ahead_of(p, t[i], GRADIENT_ROWS)));
    sum[i] = vf{};
  }
  auto dots = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    const vf grad = load_up_to(call.grad + c, n), gain = load_up_to(call.gain + c, n);
    vf gain_sum = load_up_to(call.grad_gain + c, n);
    GRIT_UNROLL for (int i = 0; i < N; ++i) {
      const vf g_normed = grad * weight[i] * (load_up_to(row[i] + c, n) * r[i]);
      gain_sum += g_normed;
      sum[i] = fma(g_normed, gain, sum[i]);
    }
    store_up_to(call.grad_gain + c, gain_sum, n);
  };
  int64_t c = 0;
  for (; c + W <= columns; c += W) dots(c, W);
  if (c < columns) dots(c, columns - c);
  GRIT_UNROLL for (int i = 0; i < N; ++i) along[i] = splat(sum_lanes(sum[i]) / (float)columns);
  auto results = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    const vf grad = load_up_to(call.grad + c, n), gain = load_up_to(call.gain + c, n);
    GRIT_UNROLL for (int i = 0; i < N; ++i) {
      const vf normed = load_up_to(row[i] + c, n) * r[i];
      store_up_to(out[i] + c, (grad * weight[i] * gain - normed * along[i]) * r[i], n);
    }
  };
  for (c = 0; c + W <= columns; c += W) results(c, W);
  if (c < columns) results(c, columns - c);
}

template <class T>
void pool_backward_typed(const PoolBackwardRows& call) {
  const PoolRows& p = call.rows;
  const int64_t columns = p.columns;
  int64_t rows[GRADIENT_ROWS];
  int waiting = 0;
  for (int64_t t = p.first; t < p.last; ++t) {
    T* out = (T*)call.grad_hidden + t * columns;
    const float weight = p.weights[t];
    if (weight == 0) {
      std::memset((void*)out, 0, (size_t)columns * sizeof(T));
    } else if (p.normed) {
      rows[waiting] = t;
      if (++waiting < GRADIENT_ROWS) continue;
      normed_gradients<T, GRADIENT_ROWS>(call, rows);
      waiting = 0;
    } else {
      int64_t c = 0;
      for (; c + W <= columns; c += W) store(out + c, load(call.grad + c) * weight);
      if (c < columns) store_first(out + c, load_first(call.grad + c, columns - c) * weight, columns - c);
    }
  }
  for (int i = 0; i < waiting; ++i) {
    rows[0] = rows[i];
    normed_gradients<T, 1>(call, rows);
  }
}

}  // namespace

void pool_rows(const PoolRows& p) {
  auto run = [&]<class T>(T) { p.normed ? pool_typed<T, true>(p) : pool_typed<T, false>(p); };
  if (p.dtype == DType::bfloat16) return run(bf16{});
  if (p.dtype == DType::float16) return run(f16{});
  run(float{});
}

void pool_backward_rows(const PoolBackwardRows& p) {
  if (p.rows.dtype == DType::bfloat16) return pool_backward_typed<bf16>(p);
  if (p.rows.dtype == DType::float16) return pool_backward_typed<f16>(p);
  pool_backward_typed<float>(p);
}

}  // namespace grit::GRIT_ISA
