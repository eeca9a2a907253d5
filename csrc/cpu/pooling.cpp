// Weighted sum of rows: the inner part of pool_forward. Memory bound: each row is read once, four rows per pass over the sums.
#include "kernels.h"
#include "simd.h"

namespace grit::GRIT_ISA {
namespace {

constexpr int ROWS = 4;

template <class T>
GRIT_INLINE vf load_first_or_all(const T* p, int64_t n) {
  return n == W ? load(p) : load_first(p, n);
}

template <class T>
float inverse_rms(const T* row, int64_t columns, float eps) {
  vf a = {}, b = {};
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) {
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

// out += sum_i coefficient[i] * row[i]; out is overwritten when `fresh`
template <class T, int N>
void add_rows(const T* const* row, const float* coefficient, int64_t columns, float* out, bool fresh) {
  vf w[N];
  GRIT_UNROLL for (int i = 0; i < N; ++i) w[i] = splat(coefficient[i]);
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) {
    vf a = fresh ? vf{} : load(out + c), b = fresh ? vf{} : load(out + c + W);
    GRIT_UNROLL for (int i = 0; i < N; ++i) {
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

template <class T>
void pool_typed(const PoolRows& p) {
  const T* hidden = (const T*)p.hidden;
  const T* row[ROWS];
  float coefficient[ROWS];
  int waiting = 0;
  bool fresh = true;
  for (int64_t t = p.first; t < p.last; ++t) {
    float weight = p.weights[t];
    if (weight == 0) continue;
    row[waiting] = hidden + t * p.row_stride;
    coefficient[waiting] = p.normed ? weight * inverse_rms(row[waiting], p.columns, p.eps) : weight;
    if (++waiting == ROWS) {
      add_rows<T, ROWS>(row, coefficient, p.columns, p.out, fresh);
      waiting = 0;
      fresh = false;
    }
  }
  for (int i = 0; i < waiting; ++i, fresh = false) add_rows<T, 1>(row + i, coefficient + i, p.columns, p.out, fresh);
  if (fresh) std::memset(p.out, 0, (size_t)p.columns * sizeof(float));
}

template <class T>
void pool_backward_typed(const PoolBackwardRows& call) {
  const PoolRows& p = call.rows;
  const int64_t columns = p.columns;
  for (int64_t t = p.first; t < p.last; ++t) {
    T* out = (T*)call.grad_hidden + t * columns;
    const float weight = p.weights[t];
    if (weight == 0) {
      std::memset((void*)out, 0, (size_t)columns * sizeof(T));
      continue;
    }
    if (!p.normed) {
      for (int64_t c = 0; c < columns; c += W) {
        const int64_t n = smaller<int64_t>(W, columns - c);
        if (n == W) store(out + c, load(call.grad + c) * weight);
        else store_first(out + c, load_first(call.grad + c, n) * weight, n);
      }
      continue;
    }
    const T* row = (const T*)p.hidden + t * p.row_stride;
    const float r = inverse_rms(row, columns, p.eps);
    // with n = h r, the row's gradient is r (g - n mean(n g)) for g = weight * grad * gain
    vf sum = {};
    for (int64_t c = 0; c < columns; c += W) {
      const int64_t n = smaller<int64_t>(W, columns - c);
      const vf g = load_first_or_all(call.grad + c, n) * weight, normed = load_first_or_all(row + c, n) * r;
      const vf g_normed = g * normed;
      const vf gain_sum = load_first_or_all(call.grad_gain + c, n) + g_normed;
      if (n == W) store(call.grad_gain + c, gain_sum);
      else store_first(call.grad_gain + c, gain_sum, n);
      sum = fma(g_normed, load_first_or_all(call.gain + c, n), sum);
    }
    const float along = sum_lanes(sum) / (float)columns;
    for (int64_t c = 0; c < columns; c += W) {
      const int64_t n = smaller<int64_t>(W, columns - c);
      const vf g = load_first_or_all(call.grad + c, n) * weight * load_first_or_all(call.gain + c, n);
      const vf normed = load_first_or_all(row + c, n) * r;
      const vf result = (g - normed * along) * r;
      if (n == W) store(out + c, result);
      else store_first(out + c, result, n);
    }
  }
}

}  // namespace

void pool_rows(const PoolRows& p) {
  if (p.dtype == DType::bfloat16) return pool_typed<bf16>(p);
  if (p.dtype == DType::float16) return pool_typed<f16>(p);
  pool_typed<float>(p);
}

void pool_backward_rows(const PoolBackwardRows& p) {
  if (p.rows.dtype == DType::bfloat16) return pool_backward_typed<bf16>(p);
  if (p.rows.dtype == DType::float16) return pool_backward_typed<f16>(p);
  pool_backward_typed<float>(p);
}

}  // namespace grit::GRIT_ISA
