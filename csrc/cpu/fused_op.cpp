// rms_norm, rotary and gated activations, see fused/reference.py.
#include "fused_op.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "parallel.h"

namespace grit {
namespace {

// Values per share of work: a smaller call runs on one thread, since starting another would take longer.
constexpr int64_t GRAIN = 16384;
// Rows per partial sum of a weight's gradient: fixed, so that the result does not depend on the number of threads.
constexpr int64_t CHUNK = 64;
constexpr int MAX_DIMS = 8;

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// A tensor as rows of its last dimension, which is contiguous; the other dimensions may have any strides.
struct View {
  char* data;
  DType dtype;
  int64_t rows, columns, element;
  int dims = 0;  // of the rows, innermost first; adjacent contiguous ones are merged
  int64_t size[MAX_DIMS], stride[MAX_DIMS];

  View(const Tensor& t, const char* name) {
    dtype = dtype_of(t, name);
    STD_TORCH_CHECK(t.dim() >= 1 && t.dim() <= MAX_DIMS, name, ": expected 1 to ", MAX_DIMS, " dimensions, got ", t.dim());
    columns = t.size(t.dim() - 1);
    STD_TORCH_CHECK(columns <= 1 || t.stride(t.dim() - 1) == 1, name, ": the last dimension must be contiguous");
    data = (char*)const_cast<void*>(t.const_data_ptr());
    element = size_of(dtype);
    rows = 1;
    for (int64_t d = t.dim() - 2; d >= 0; --d) {
      rows *= t.size(d);
      if (t.size(d) == 1) continue;
      if (dims && t.stride(d) == stride[dims - 1] * size[dims - 1]) {
        size[dims - 1] *= t.size(d);
      } else {
        size[dims] = t.size(d);
        stride[dims++] = t.stride(d);
      }
    }
  }

  void* row(int64_t r) const {
    int64_t at = 0;
    for (int d = 0; d < dims - 1; ++d) {
      at += r % size[d] * stride[d];
      r /= size[d];
    }
    if (dims) at += r * stride[dims - 1];
    return data + at * element;
  }
};

Tensor like(const Tensor& t, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Float ? 4 : 2;
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) bytes *= sizes[d] = t.size(d);
  Tensor made = torch::stable::empty(sizes, dtype);
  if (bytes >= 2 * LARGE_PAGE) use_large_pages(made.mutable_data_ptr(), bytes);
  return made;
}

void check_shape(const Tensor& t, const Tensor& as, const char* name, const char* other) {
  bool same = t.dim() == as.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == as.size(d);
  STD_TORCH_CHECK(same, name, ": expected the shape of ", other);
}

std::vector<float> gain_of(const Tensor& weight, int64_t columns, double offset) {
  std::vector<float> gain = as_floats(weight, columns, "weight");
  if (offset != 0)
    for (float& g : gain) g += (float)offset;
  return gain;
}

// two dtypes go together if they are the same or one of them is float32
bool fits(ScalarType a, ScalarType b) { return a == b || a == ScalarType::Float || b == ScalarType::Float; }

template <class Function>
void each_row(int64_t rows, int64_t columns, const Function& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, columns)),
                              [&](int64_t from, int64_t to) {
                                for (int64_t r = from; r < to; ++r) f(r);
                              });
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, std::optional<Tensor> residual, double eps, double offset,
                                            ScalarType out_dtype) {
  const View from(x, "x");
  const std::vector<float> gain = gain_of(weight, from.columns, offset);
  ScalarType total_dtype = x.scalar_type();
  if (residual) {
    check_shape(*residual, x, "residual", "x");
    if (residual->scalar_type() != total_dtype) total_dtype = ScalarType::Float;
  }
  STD_TORCH_CHECK(fits(total_dtype, out_dtype), "out_dtype: expected float32 or the dtype of x");
  Tensor out = like(x, out_dtype);
  Tensor total = residual ? like(x, total_dtype) : torch::stable::empty({0}, total_dtype);
  const View to(out, "out"), sum(residual ? total : x, "total"), added(residual ? *residual : x, "residual");
  const auto& norm = kernels().fused->norm;
  each_row(from.rows, from.columns, [&](int64_t r) {
    norm({from.row(r), residual ? added.row(r) : nullptr, residual ? sum.row(r) : nullptr, to.row(r), gain.data(), from.columns,
          (float)eps, from.dtype, added.dtype, sum.dtype, to.dtype});
  });
  return {out, total};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_out, std::optional<Tensor> grad_total, Tensor total, Tensor weight,
                                             double eps, double offset, bool need_weight) {
  const View grad(grad_out, "grad_out"), from(total, "total"), passed(grad_total ? *grad_total : total, "grad_total");
  check_shape(grad_out, total, "grad_out", "x");
  check_shape(grad_total ? *grad_total : total, total, "grad_total", "x");
  STD_TORCH_CHECK(passed.dtype == from.dtype && fits(grad_out.scalar_type(), total.scalar_type()),
                  "grad_out, grad_total: expected the dtypes of out and total");
  const std::vector<float> gain = gain_of(weight, from.columns, offset);
  const int64_t columns = from.columns, chunks = (from.rows + CHUNK - 1) / CHUNK;
  Tensor grad_x = like(total, total.scalar_type());
  Tensor grad_weight = torch::stable::empty({need_weight ? columns : 0}, ScalarType::Float);
  const View to(grad_x, "grad_x");
  std::vector<float> partial(need_weight ? (size_t)(chunks * columns) : 0, 0.0f);
  const auto& backward = kernels().fused->norm_backward;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first * CHUNK; r < std::min(last * CHUNK, from.rows); ++r)
      backward({grad.row(r), from.row(r), grad_total ? passed.row(r) : nullptr, to.row(r), gain.data(),
                need_weight ? partial.data() + r / CHUNK * columns : nullptr, columns, (float)eps, grad.dtype, from.dtype});
  });
  if (need_weight) {
    float* sum = (float*)grad_weight.mutable_data_ptr();
    std::fill(sum, sum + columns, 0.0f);
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t c = 0; c < columns; ++c) sum[c] += partial[i * columns + c];
  }
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && cos.dim() == 3, "q, k, cos: expected (B, T, heads, D) twice and (B, T, R)");
  check_shape(sin, cos, "sin", "cos");
  const int64_t batch = q.size(0), length = q.size(1), dim = q.size(3), rotated = cos.size(2);
  STD_TORCH_CHECK(k.size(0) == batch && k.size(1) == length && k.size(3) == dim, "k: expected batch, tokens and dim of q");
  STD_TORCH_CHECK((cos.size(0) == batch || cos.size(0) == 1) && cos.size(1) == length && rotated <= dim && rotated % 2 == 0,
                  "cos: expected (B or 1, T, R) with an even R up to the dim of q");
  STD_TORCH_CHECK(sin.scalar_type() == cos.scalar_type() && k.scalar_type() == q.scalar_type() &&
                      fits(q.scalar_type(), cos.scalar_type()),
                  "q, k, cos, sin: their dtypes do not fit");
  Tensor q_out = like(q, q.scalar_type()), k_out = like(k, k.scalar_type());
  const View tables[2] = {View(cos, "cos"), View(sin, "sin")};
  struct Side {
    View from, to;
    int64_t heads, head, out_head, row, sample, out_row;
  };
  auto side = [&](const Tensor& x, const Tensor& out, const char* name) -> Side {
    return {View(x, name), View(out, name), x.size(2), x.stride(2), dim, x.stride(1), x.stride(0), x.size(2) * dim};
  };
  const Side sides[2] = {side(q, q_out, "q"), side(k, k_out, "k")};
  const auto& rotate = kernels().fused->rotary;
  each_row(batch * length, (q.size(2) + k.size(2)) * dim, [&](int64_t r) {
    const int64_t b = r / length, t = r % length, at = cos.size(0) == 1 ? t : r;
    for (const Side& s : sides)
      rotate({s.from.data + (b * s.sample + t * s.row) * s.from.element, s.to.data + r * s.out_row * s.to.element,
              tables[0].row(at), tables[1].row(at), s.heads, s.head, s.out_head, dim, rotated, s.from.dtype, tables[0].dtype,
              transposed});
  });
  return {q_out, k_out};
}

Tensor gated_forward(Tensor gate, Tensor up, int64_t kind) {
  check_shape(up, gate, "up", "gate");
  Tensor out = like(gate, gate.scalar_type());
  const View g(gate, "gate"), u(up, "up"), o(out, "out");
  STD_TORCH_CHECK(u.dtype == g.dtype, "up: expected the dtype of gate");
  const auto& gated = kernels().fused->gated;
  each_row(g.rows, g.columns, [&](int64_t r) {
    gated({g.row(r), u.row(r), nullptr, o.row(r), nullptr, nullptr, g.columns, g.dtype, (Gate)kind});
  });
  return out;
}

std::tuple<Tensor, Tensor> gated_backward(Tensor grad, Tensor gate, Tensor up, int64_t kind) {
  check_shape(up, gate, "up", "gate");
  check_shape(grad, gate, "grad", "gate");
  Tensor grad_gate = like(gate, gate.scalar_type()), grad_up = like(gate, gate.scalar_type());
  const View d(grad, "grad"), g(gate, "gate"), u(up, "up"), to_gate(grad_gate, "grad_gate"), to_up(grad_up, "grad_up");
  STD_TORCH_CHECK(u.dtype == g.dtype && d.dtype == g.dtype, "grad, up: expected the dtype of gate");
  const auto& backward = kernels().fused->gated_backward;
  each_row(g.rows, g.columns, [&](int64_t r) {
    backward({g.row(r), u.row(r), d.row(r), nullptr, to_gate.row(r), to_up.row(r), g.columns, g.dtype, (Gate)kind});
  });
  return {grad_gate, grad_up};
}

}  // namespace grit
