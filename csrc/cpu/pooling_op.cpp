// pool_forward(hidden, weights, row_start, row_end, denominators, norm_weight?, norm_eps) -> out, see pooling/reference.py.
#include "pooling_op.h"

#include <algorithm>
#include <vector>

#include "convert.h"
#include "kernels.h"

namespace grit {
namespace {

// Rows per partial sum: fixed, so that the result depends neither on the number of threads nor on the rest of the batch.
constexpr int64_t CHUNK = 64;

struct Part {
  int64_t sample, first, last;
};

}  // namespace

Tensor pool_forward(Tensor hidden, Tensor weights, Tensor row_start, Tensor row_end, Tensor denominators,
                    std::optional<Tensor> norm_weight, double norm_eps) {
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden: accepted is (rows, columns), got ", hidden.dim(), " dimensions");
  const int64_t rows = hidden.size(0), columns = hidden.size(1), batch = row_start.numel();
  STD_TORCH_CHECK(columns == 0 || hidden.stride(1) == 1, "hidden: the last dimension must be contiguous");
  const int32_t* start = int32_data(row_start, batch, "row_start");
  const int32_t* end = int32_data(row_end, batch, "row_end");
  const float* denominator = float_data(denominators, batch, "denominators");
  PoolRows call = {};
  call.hidden = hidden.const_data_ptr();
  call.dtype = dtype_of(hidden, "hidden");
  call.row_stride = hidden.stride(0);
  call.weights = float_data(weights, rows, "weights");
  call.columns = columns;
  call.normed = norm_weight.has_value();
  call.eps = (float)norm_eps;
  std::vector<float> gain;
  if (norm_weight) gain = as_floats(*norm_weight, columns, "norm_weight");

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
  // every part sums into its own row, then each sample adds its parts in order; a sample of one part needs no detour
  std::vector<float> partial;
  partial.resize(parts.size() * (size_t)columns);
  const auto& pool_rows = kernels().pool_rows;
  torch::stable::parallel_for(0, (int64_t)parts.size(), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      PoolRows one = call;
      one.first = parts[i].first;
      one.last = parts[i].last;
      one.out = partial.data() + i * columns;
      pool_rows(one);
    }
  });
  torch::stable::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      float* row = result + b * columns;
      std::fill(row, row + columns, 0.0f);
      if (first_part[b] == first_part[b + 1]) continue;
      for (int64_t i = first_part[b]; i < first_part[b + 1]; ++i)
        for (int64_t c = 0; c < columns; ++c) row[c] += partial[i * columns + c];
      for (int64_t c = 0; c < columns; ++c) row[c] = (gain.empty() ? row[c] : row[c] * gain[c]) / denominator[b];
    }
  });
  return out;
}

}  // namespace grit
