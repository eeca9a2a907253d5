// The kernels of fused.h. Memory bound: a row is read from memory once and stays in the first-level cache for its second use.
#include "fused.h"

#include "kernels.h"
#include "products.h"
#include "simd.h"

namespace grit::GRIT_ISA {
namespace {

// calls f(c, n) for each n elements from column c on: W of them, or fewer at the end
template <class Function>
GRIT_INLINE void each_vector(int64_t columns, const Function& f) {
  int64_t c = 0;
  for (; c + W <= columns; c += W) f(c, (int64_t)W);
  if (c < columns) f(c, columns - c);
}

template <class Function>
GRIT_INLINE void with_type(DType dtype, const Function& f) {
  if (dtype == DType::bfloat16) return f(bf16{});
  if (dtype == DType::float16) return f(f16{});
  f(float{});
}

// calls f(a, b) with two types that are the same, or one of which is float
template <class Function>
GRIT_INLINE void with_types(DType a, DType b, const Function& f) {
  if (a == DType::float32) return with_type(b, [&](auto second) { f(float{}, second); });
  if (b == DType::float32) return with_type(a, [&](auto first) { f(first, float{}); });
  with_type(a, [&](auto both) { f(both, both); });
}

// total = x + residual, and the sum of squares of what was stored
template <class X, class R, class T>
float add_and_square(const X* x, const R* residual, T* total, int64_t columns) {
  vf sum = {};
  each_vector(columns, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    vf t = load_up_to(x + c, n) + load_up_to(residual + c, n);
    store_up_to(total + c, t, n);
    if constexpr (sizeof(T) < 4) t = load_up_to(total + c, n);
    sum = fma(t, t, sum);
  });
  return sum_lanes(sum);
}

template <class T>
float squares(const T* x, int64_t columns) {
  vf a = {}, b = {};
  int64_t c = 0;
  for (; c + 2 * W <= columns; c += 2 * W) {
    const vf x0 = load(x + c), x1 = load(x + c + W);
    a = fma(x0, x0, a);
    b = fma(x1, x1, b);
  }
  for (; c < columns; c += W) {
    const vf rest = load_first(x + c, smaller<int64_t>(W, columns - c));
    a = fma(rest, rest, a);
  }
  return sum_lanes(a + b);
}

GRIT_INLINE float inverse_rms(float sum, int64_t columns, float eps) {
  return 1.0f / __builtin_sqrtf(sum / (float)columns + eps);
}

void norm_row(const NormRow& p) {
  float sum = 0;
  const void* total = p.residual ? p.total : p.x;
  if (!p.residual) {
    with_type(p.x_dtype, [&]<class T>(T) { sum = squares((const T*)p.x, p.columns); });
  } else if (p.total_dtype == DType::float32) {
    with_types(p.x_dtype, p.residual_dtype, [&]<class X, class R>(X, R) {
      sum = add_and_square((const X*)p.x, (const R*)p.residual, (float*)p.total, p.columns);
    });
  } else {
    with_type(p.total_dtype, [&]<class T>(T) {
      sum = add_and_square((const T*)p.x, (const T*)p.residual, (T*)p.total, p.columns);
    });
  }
  const vf scale = splat(inverse_rms(sum, p.columns, p.eps));
  with_types(p.total_dtype, p.out_dtype, [&]<class T, class O>(T, O) {
    each_vector(p.columns, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      store_up_to((O*)p.out + c, load_up_to((const T*)total + c, n) * scale * load_up_to(p.gain + c, n), n);
    });
  });
}

// With n = total * r:  grad_x = r (g gain - n mean(g gain n)) + grad_total,  grad_gain += g n
template <class O, class T, bool PASSED>
void norm_gradient(const NormGradientRow& p) {
  const O* grad = (const O*)p.grad_out;
  const T *total = (const T*)p.total, *passed = (const T*)p.grad_total;
  const int64_t columns = p.columns;
  vf square_sum = {}, dot_sum = {};
  each_vector(columns, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    const vf x = load_up_to(total + c, n);
    square_sum = fma(x, x, square_sum);
    dot_sum = fma(load_up_to(grad + c, n) * load_up_to(p.gain + c, n), x, dot_sum);
  });
  const float inverse = inverse_rms(sum_lanes(square_sum), columns, p.eps);
  const vf r = splat(inverse), along = splat(sum_lanes(dot_sum) * inverse / (float)columns);
  each_vector(columns, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    const vf normed = load_up_to(total + c, n) * r, g = load_up_to(grad + c, n);
    if (p.grad_gain) store_up_to(p.grad_gain + c, fma(g, normed, load_up_to(p.grad_gain + c, n)), n);
    vf result = (g * load_up_to(p.gain + c, n) - normed * along) * r;
    if constexpr (PASSED) result += load_up_to(passed + c, n);
    store_up_to((T*)p.grad_x + c, result, n);
  });
}

void norm_backward_row(const NormGradientRow& p) {
  with_types(p.out_dtype, p.total_dtype, [&]<class O, class T>(O, T) {
    if (p.grad_total) norm_gradient<O, T, true>(p);
    else norm_gradient<O, T, false>(p);
  });
}

template <class T, class C, bool TRANSPOSED>
void rotate(const RotaryRow& p) {
  const int64_t half = p.rotated / 2, rest = p.dim - p.rotated;
  const C *cos = (const C*)p.cos, *sin = (const C*)p.sin;
  for (int64_t h = 0; h < p.heads; ++h) {
    const T* x = (const T*)p.x + h * p.x_head;
    T* out = (T*)p.out + h * p.out_head;
    each_vector(half, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const vf first = load_up_to(x + c, n), second = load_up_to(x + half + c, n);
      const vf sin_first = load_up_to(sin + c, n), sin_second = load_up_to(sin + half + c, n);
      const vf along_first = first * load_up_to(cos + c, n), along_second = second * load_up_to(cos + half + c, n);
      store_up_to(out + c, fma(second, TRANSPOSED ? sin_second : -sin_first, along_first), n);
      store_up_to(out + half + c, fma(first, TRANSPOSED ? -sin_first : sin_second, along_second), n);
    });
    if (rest) std::memcpy((void*)(out + p.rotated), x + p.rotated, (size_t)rest * sizeof(T));
  }
}

void rotary_row(const RotaryRow& p) {
  with_types(p.dtype, p.table_dtype, [&]<class T, class C>(T, C) {
    if (p.transposed) rotate<T, C, true>(p);
    else rotate<T, C, false>(p);
  });
}

// Both activations are x sigmoid(u): u = x for SiLU, u = 2 sqrt(2 / pi) (x + 0.044715 x^3) for the tanh form of GELU
constexpr float SLOPE = 1.5957691216057308f, CUBE = 0.044715f * SLOPE;

// bounded, so that the 0 of a saturated sigmoid is never multiplied by infinity; vmin returns a NaN that is its second argument
GRIT_INLINE vf squared(vf x) { return vmin(splat(1e30f), x * x); }
template <Gate KIND>
GRIT_INLINE vf inner(vf x) {
  if constexpr (KIND == Gate::silu) return x;
  return x * fma(squared(x), splat(CUBE), splat(SLOPE));
}
template <Gate KIND>
GRIT_INLINE vf inner_slope(vf x) {
  if constexpr (KIND == Gate::silu) return splat(1.0f);
  return fma(squared(x), splat(3 * CUBE), splat(SLOPE));
}
// 0 where e^-u overflows FP32
GRIT_INLINE vf sigmoid(vf u) {
  const vf power = u * -LOG2_E;
  const vf s = 1.0f / (1.0f + exp2_of<5>(vmin(splat(126.0f), power)));
  return power > 126.0f ? vf{} : s;
}

template <class Function>
GRIT_INLINE void with_gate(const GatedRow& p, const Function& f) {
  with_type(p.dtype, [&]<class T>(T) {
    if (p.kind == Gate::silu) f.template operator()<T, Gate::silu>();
    else f.template operator()<T, Gate::gelu_tanh>();
  });
}

void gated_row(const GatedRow& p) {
  with_gate(p, [&]<class T, Gate KIND>() {
    each_vector(p.columns, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const vf x = load_up_to((const T*)p.gate + c, n);
      store_up_to((T*)p.out + c, x * sigmoid(inner<KIND>(x)) * load_up_to((const T*)p.up + c, n), n);
    });
  });
}

// act' = s + x s (1 - s) u'
void gated_backward_row(const GatedRow& p) {
  with_gate(p, [&]<class T, Gate KIND>() {
    each_vector(p.columns, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const vf x = load_up_to((const T*)p.gate + c, n), g = load_up_to((const T*)p.grad + c, n);
      const vf s = sigmoid(inner<KIND>(x)), act = x * s;
      store_up_to((T*)p.grad_gate + c, g * load_up_to((const T*)p.up + c, n) * fma(act * (1.0f - s), inner_slope<KIND>(x), s), n);
      store_up_to((T*)p.grad_up + c, g * act, n);
    });
  });
}

}  // namespace

extern const FusedKernels fused_table;
const FusedKernels fused_table = {norm_row, norm_backward_row, rotary_row, gated_row, gated_backward_row};

}  // namespace grit::GRIT_ISA
