// pool_forward and pool_backward, see pooling/reference.py.
#include "pooling_op.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "parallel.h"

namespace grit {
namespace {

// Rows per partial sum: fixed, so that the result depends neither on the number of threads nor on the rest of the batch.
constexpr int64_t CHUNK = 64;
constexpr int64_t ITEMS_PER_THREAD = 4, LEAST_COLUMNS = 1024;

struct Part {
  int64_t sample, first, last;
};

// per sample, of a checked problem
struct Ranges {
  const int32_t *start, *end;
  const float* denominator;
  explicit Ranges(const PoolingProblem& p)
      : start(p.row_start.const_data_ptr<int32_t>()),
        end(p.row_end.const_data_ptr<int32_t>()),
        denominator(p.denominators.const_data_ptr<float>()) {}
};

}  // namespace

Tensor pool_forward(const PoolingProblem& problem) {
  problem.check();
  const Tensor& hidden = problem.hidden;
  const int64_t rows = problem.rows(), columns = problem.columns(), batch = problem.samples();
  const auto [start, end, denominator] = Ranges(problem);
  PoolRows call = {};
  call.hidden = hidden.const_data_ptr();
  call.dtype = dtype_of(hidden, "hidden");
  call.row_stride = hidden.stride(0);
  call.weights = problem.weights.const_data_ptr<float>();
  call.columns = columns;
  call.normed = problem.norm_weight.has_value();
  call.eps = (float)problem.norm_eps;
  std::vector<float> gain;
  if (problem.norm_weight) gain = as_floats(*problem.norm_weight, columns, "norm_weight");

  std::vector<Part> parts;
  std::vector<int64_t> first_part(batch + 1, 0);
  for (int64_t b = 0; b < batch; ++b) {
    first_part[b] = (int64_t)parts.size();
    if (start[b] >= end[b] || !(denominator[b] > 0)) continue;
    STD_TORCH_CHECK(start[b] >= 0 && end[b] <= rows, "row_start, row_end: sample ", b, " has rows [", start[b], ", ", end[b],
                    "), hidden has ", rows);
    for (int64_t r = start[b]; r < end[b]; r += CHUNK) parts.push_back({b, r, std::min<int64_t>(r + CHUNK, end[b])});
  }
  first_part[batch] = (int64_t)parts.size();

  Tensor out = torch::stable::empty({batch, columns}, ScalarType::Float);
  float* result = (float*)out.mutable_data_ptr();
  auto finish = [&](int64_t b, int64_t from, int64_t to) {
    float* row = result + b * columns;
    for (int64_t c = from; c < to; ++c) row[c] = (gain.empty() ? row[c] : row[c] * gain[c]) / denominator[b];
  };
  // A sample is the sum of its parts in order. An item is a run of parts: it sums into the result where it holds a sample's first
  // part; sums of a sample that began in an earlier item are added at the end.
  const int64_t count = (int64_t)parts.size();
  const int64_t items = std::min<int64_t>(count, ITEMS_PER_THREAD * torch::stable::get_num_threads());
  auto first_of = [&](int64_t item) { return count * item / items; };
  std::vector<int64_t> slot(items + 1, 0);  // of the first part that an item leaves for the end
  auto left_by = [&](int64_t item) {
    const int64_t sample = parts[first_of(item)].sample;
    if (first_part[sample] >= first_of(item)) return (int64_t)0;
    return std::min(first_part[sample + 1], first_of(item + 1)) - first_of(item);
  };
  for (int64_t i = 0; i < items; ++i) slot[i + 1] = slot[i] + left_by(i);
  Memory left = allocate(slot[items] * columns * 4);
  const auto& pool_rows = kernels().pool_rows;
  run_items(items, columns * 4, [&](int64_t item, void* scratch) {
    const int64_t first = first_of(item), end = first_of(item + 1), leave = left_by(item);
    for (int64_t i = first; i < end; ++i) {
      const int64_t sample = parts[i].sample;
      float* row = result + sample * columns;
      const bool begins = i == first_part[sample], leaves = i - first < leave;
      PoolRows one = call;
      one.first = parts[i].first;
      one.last = parts[i].last;
      one.next = i + 1 < end ? parts[i + 1].first : -1;
      one.out = begins ? row : leaves ? (float*)left.get() + (slot[item] + i - first) * columns : (float*)scratch;
      pool_rows(one);
      if (!begins && !leaves)
        for (int64_t c = 0; c < columns; ++c) row[c] += one.out[c];
      if (!leaves && i + 1 == first_part[sample + 1]) finish(sample, 0, columns);
    }
  });
  for (int64_t b = 0; b < batch; ++b)
    if (first_part[b] == first_part[b + 1]) std::fill_n(result + b * columns, columns, 0.0f);
  if (slot[items] == 0) return out;
  torch::stable::parallel_for(0, columns, LEAST_COLUMNS, [&](int64_t from, int64_t to) {
    for (int64_t item = 1; item < items; ++item) {
      const int64_t leave = left_by(item), sample = parts[first_of(item)].sample;
      float* row = result + sample * columns;
      for (int64_t i = 0; i < leave; ++i) {
        const float* part = (const float*)left.get() + (slot[item] + i) * columns;
        for (int64_t c = from; c < to; ++c) row[c] += part[c];
      }
      if (leave && first_of(item) + leave == first_part[sample + 1]) finish(sample, from, to);
    }
  });
  return out;
}

// Every row of grad_hidden is written once: rows of samples by the kernel, the rows between samples by zeros. The partial sums of
// the norm weight's gradient have a fixed length in rows and are added in order.
std::tuple<Tensor, Tensor> pool_backward(const PoolingProblem& problem, Tensor grad_out) {
  problem.check();
  const Tensor& hidden = problem.hidden;
  const int64_t rows = problem.rows(), columns = problem.columns(), batch = problem.samples();
  const auto [start, end, denominator] = Ranges(problem);
  dtype_of(hidden, "hidden");
  const float* grad = float_data(grad_out, batch * columns, "grad_out");
  const bool normed = problem.norm_weight.has_value();
  std::vector<float> gain;
  if (normed) gain = as_floats(*problem.norm_weight, columns, "norm_weight");

  Tensor grad_hidden = torch::stable::empty({rows, columns}, hidden.scalar_type());
  Tensor grad_gain = torch::stable::empty({normed ? columns : 0}, ScalarType::Float);
  char* result = (char*)grad_hidden.mutable_data_ptr();
  const int64_t row_bytes = columns * (hidden.scalar_type() == ScalarType::Float ? 4 : 2);
  use_large_pages(result, rows * row_bytes);

  // parts in row order; sample -1: rows that belong to no sample or to one without anything pooled
  std::vector<Part> parts;
  int64_t at = 0, pooled_parts = 0;
  auto add = [&](int64_t sample, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r += CHUNK) parts.push_back({sample, r, std::min(r + CHUNK, last)});
  };
  for (int64_t b = 0; b < batch; ++b) {
    if (start[b] >= end[b] || !(denominator[b] > 0)) continue;
    STD_TORCH_CHECK(start[b] >= at && end[b] <= rows, "row_start, row_end: expected ranges in order that do not overlap, within ",
                    rows, " rows, got [", start[b], ", ", end[b], ") for sample ", b);
    add(-1, at, start[b]);
    add(b, start[b], end[b]);
    at = end[b];
  }
  add(-1, at, rows);

  std::vector<float> scaled((size_t)(batch * columns));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < columns; ++c)
      scaled[b * columns + c] = denominator[b] > 0 ? grad[b * columns + c] / denominator[b] : 0.0f;
  std::vector<int64_t> slot(parts.size(), 0);
  for (size_t i = 0; i < parts.size(); ++i) slot[i] = parts[i].sample < 0 ? 0 : pooled_parts++;
  std::vector<float> partial(normed ? (size_t)(pooled_parts * columns) : 0, 0.0f);

  const auto& backward_rows = kernels().pool_backward_rows;
  torch::stable::parallel_for(0, (int64_t)parts.size(), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Part& part = parts[i];
      if (part.sample < 0) {
        std::memset(result + part.first * row_bytes, 0, (size_t)((part.last - part.first) * row_bytes));
        continue;
      }
      PoolBackwardRows call = {};
      call.rows.hidden = hidden.const_data_ptr();
      call.rows.dtype = dtype_of(hidden, "hidden");
      call.rows.row_stride = hidden.stride(0);
      call.rows.weights = problem.weights.const_data_ptr<float>();
      call.rows.first = part.first;
      call.rows.last = part.last;
      call.rows.next = i + 1 < to && parts[i + 1].sample >= 0 ? parts[i + 1].first : -1;
      call.rows.columns = columns;
      call.rows.normed = normed;
      call.rows.eps = (float)problem.norm_eps;
      call.grad = scaled.data() + part.sample * columns;
      call.gain = gain.data();
      call.grad_hidden = result;
      call.grad_gain = partial.data() + slot[i] * columns;
      backward_rows(call);
    }
  });
  if (normed) {
    float* sum = (float*)grad_gain.mutable_data_ptr();
    std::fill(sum, sum + columns, 0.0f);
    for (int64_t i = 0; i < pooled_parts; ++i)
      for (int64_t c = 0; c < columns; ++c) sum[c] += partial[i * columns + c];
  }
  return {grad_hidden, grad_gain};
}

}  // namespace grit
