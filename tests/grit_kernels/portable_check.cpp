// The portable kernels against sums in double precision, without torch: what a CPU of another family runs. Prints the largest error
// of each kernel and returns 1 where one is too large.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.h"

namespace grit::portable {
extern const Kernels table;
}

namespace {

using namespace grit;
using Floats = std::vector<float>;

const Kernels& isa = portable::table;
bool failed = false;

void report(const char* what, double error, double allowed) {
  std::printf("%s: error %.3g, allowed %.3g\n", what, error, allowed);
  failed |= !(error <= allowed);
}

Floats draw(int64_t count, unsigned seed) {
  Floats x(count);
  for (float& value : x) {
    seed = seed * 1664525u + 1013904223u;
    value = (float)((double)(seed >> 8) / (1 << 24) * 2 - 1);
  }
  return x;
}

double error_of(const Floats& found, const std::vector<double>& wanted) {
  double error = 0;
  for (size_t i = 0; i < wanted.size(); ++i) error = std::fmax(error, std::isnan(found[i]) ? INFINITY : std::fabs(found[i] - wanted[i]));
  return error;
}

struct Memory64 {
  void* data;
  explicit Memory64(int64_t bytes) : data(std::aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64)) {}
  ~Memory64() { std::free(data); }
};

// one causal sample of `rows` queries, `keys` keys, 2 heads that share one key head; `sunk`: with a sink each
void check_attention(int64_t rows, int64_t keys, int64_t dim, bool decode, bool sunk) {
  const int64_t heads = 2;
  const Floats q = draw(rows * heads * dim, 1), k = draw(keys * dim, 2), v = draw(keys * dim, 3), grad = draw(rows * heads * dim, 4);
  Floats out(rows * heads * dim), lse(rows * heads), dq(out.size()), dk(keys * dim), dv(keys * dim);
  const float scale = 0.3f;
  Attention a = {};
  a.dtype = DType::float32;
  a.dim = dim, a.heads_q = heads, a.heads_kv = 1, a.group = heads;
  a.q = {q.data(), heads * dim, dim}, a.k = {k.data(), dim, dim}, a.v = {v.data(), dim, dim};
  a.out = out.data(), a.lse = lse.data(), a.scale_log2 = scale * 1.4426950408889634f;
  const double sinks[] = {1.5, -0.5};
  const float sinks_log2[] = {(float)(sinks[0] * 1.4426950408889634), (float)(sinks[1] * 1.4426950408889634)};
  a.sinks_log2 = sunk ? sinks_log2 : nullptr;
  const Sample s = {0, rows, 0, keys, keys, 0, nullptr};
  const Layout l = isa.layout(a.dtype, dim);
  const int64_t slots = l.slots(s, heads), tiles = l.tiles(s, heads), words = l.key_words(keys);
  auto tile_of = [&](int64_t t) { return Tile{0, t * l.vectors, std::min(l.vectors, slots - t * l.vectors)}; };

  std::vector<double> want_out(out.size()), want_lse(lse.size()), want_dq(out.size()), want_dk(dk.size()), want_dv(dv.size()), want_dsinks(heads);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t seen = r + keys - rows + 1, at = (r * heads + h) * dim;
      std::vector<double> p(seen), dp(seen);
      double total = 0, delta = 0;
      for (int64_t j = 0; j < seen; ++j) {
        for (int64_t d = 0; d < dim; ++d) p[j] += (double)q[at + d] * k[j * dim + d] * scale;
        total += std::exp(p[j]);
      }
      if (sunk) total += std::exp(sinks[h]);
      want_lse[r * heads + h] = std::log(total);
      for (int64_t j = 0; j < seen; ++j) {
        p[j] = std::exp(p[j]) / total;
        for (int64_t d = 0; d < dim; ++d) {
          want_out[at + d] += p[j] * v[j * dim + d];
          dp[j] += (double)grad[at + d] * v[j * dim + d];
          want_dv[j * dim + d] += p[j] * grad[at + d];
        }
        delta += p[j] * dp[j];
      }
      if (sunk) want_dsinks[h] -= std::exp(sinks[h]) / total * delta;
      for (int64_t j = 0; j < seen; ++j)
        for (int64_t d = 0; d < dim; ++d) {
          want_dq[at + d] += p[j] * (dp[j] - delta) * scale * k[j * dim + d];
          want_dk[j * dim + d] += p[j] * (dp[j] - delta) * scale * q[at + d];
        }
    }

  Memory64 scratch(std::max(isa.forward_scratch(a.dtype, dim), isa.backward_scratch(a.dtype, dim)));
  if (decode) {
    const int64_t states = rows * heads;
    Memory64 memory(states * (1 + l.lanes + decode_dim(dim)) * 4);
    float *sums = (float*)memory.data, *total = sums + states * decode_dim(dim), *maximum = total + states * l.lanes;
    isa.decode_part(a, s, 0, keys, keys, maximum, total, sums);
    for (int64_t i = 0; i < states; ++i)
      isa.decode_join(a, i / heads, i % heads, 1, states, maximum + i, total + i * l.lanes, sums + i * decode_dim(dim));
    report("decode", error_of(out, want_out), 2e-5);
    report("decode lse", error_of(lse, want_lse), 2e-5);
    return;
  }
  Memory64 packed(3 * words * 4);
  uint32_t* keys_packed = (uint32_t*)packed.data;
  isa.pack_keys(a, s, 0, keys_packed, keys_packed + words);
  for (int64_t t = 0; t < tiles; ++t) isa.forward_tile(a, s, tile_of(t), keys_packed, keys_packed + words, scratch.data);
  report("forward", error_of(out, want_out), 2e-5);
  report("forward lse", error_of(lse, want_lse), 2e-5);

  Gradients g = {};
  g.grad_out = {grad.data(), heads * dim, dim}, g.out = {out.data(), heads * dim, dim}, g.lse = lse.data();
  g.dq = dq.data(), g.dk = dk.data(), g.dv = dv.data(), g.softmax_scale = g.magnitude = scale;
  Floats sink_shares(rows * heads), dsinks(heads);
  g.sink_shares = sink_shares.data();
  isa.backward_pack_keys(a, s, 0, keys_packed, keys_packed + words, keys_packed + 2 * words);
  const int64_t n = l.query_words(), each = 4 * n + 5 * l.tile_lanes;
  Memory64 queries(tiles * each * 4);
  std::vector<QueryPack> packs;
  for (int64_t t = 0; t < tiles; ++t) {
    uint32_t* p = (uint32_t*)queries.data + t * each;
    float* numbers = (float*)(p + 4 * n);
    packs.push_back({p, p + n, p + 2 * n, p + 3 * n, numbers, numbers + l.tile_lanes, numbers + 2 * l.tile_lanes,
                     (int32_t*)numbers + 3 * l.tile_lanes, (int32_t*)numbers + 4 * l.tile_lanes, false});
    isa.backward_pack_queries(a, g, s, tile_of(t), packs[t]);
  }
  Floats partial(tiles * l.padded_dim * l.tile_lanes);
  isa.backward_keys(a, g, s, 0, 0, keys, 0, {keys_packed, keys_packed + words, keys_packed + 2 * words}, packs.data(), partial.data(),
                    scratch.data);
  for (int64_t t = 0; t < tiles; ++t) {
    const float* part = partial.data() + t * l.padded_dim * l.tile_lanes;
    isa.backward_store_dq(a, g, s, tile_of(t), packs[t], 1, &part, scratch.data);
  }
  report("dq", error_of(dq, want_dq), 5e-5);
  report("dk", error_of(dk, want_dk), 5e-5);
  report("dv", error_of(dv, want_dv), 5e-5);
  for (int64_t i = 0; i < rows * heads; ++i) dsinks[i % heads] += sink_shares[i];
  report("dsinks", error_of(dsinks, want_dsinks), 5e-5);
}

void check_pooling(int64_t rows, int64_t columns) {
  const Floats hidden = draw(rows * columns, 5), weights = draw(rows, 6);
  Floats out(columns);
  std::vector<double> wanted(columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) wanted[c] += (double)weights[r] * hidden[r * columns + c];
  isa.pool_rows({hidden.data(), DType::float32, columns, weights.data(), 0, rows, columns, -1, false, 0, out.data()});
  report("pool", error_of(out, wanted), 2e-5);
}

// the losses of one tile of queries; own: a query's candidates are its own passages only
void check_contrastive(int64_t queries, int64_t passages, int64_t width, bool own) {
  const Floats q = draw(queries * width, 7), p = draw(passages * width, 8);
  const ContrastiveKernels& kernels = *isa.contrastive;
  const ContrastiveLayout l = kernels.layout(DType::float32, width);
  const int64_t group = passages / queries, padded = (passages + l.step - 1) / l.step * l.step;
  std::vector<uint32_t> panels(padded * l.words), lanes(l.words * l.tile);
  kernels.pack_panels(DType::float32, p.data(), width, passages, padded, width, panels.data());
  kernels.pack_lanes(DType::float32, q.data(), width, queries, width, lanes.data());
  Floats scale(l.tile), top(l.tile, NO_CANDIDATE), total(l.tile), below(l.tile), positive(l.tile), losses(queries);
  std::vector<int32_t> targets(l.tile, -1), best(l.tile);
  std::vector<double> wanted(queries);
  for (int64_t i = 0; i < queries; ++i) {
    scale[i] = 0.5f, targets[i] = (int32_t)(i * group);
    for (int64_t j = own ? i * group : 0; j < (own ? (i + 1) * group : passages); ++j) {
      double score = 0;
      for (int64_t d = 0; d < width; ++d) score += 0.5 * q[i * width + d] * p[j * width + d];
      wanted[i] += std::exp(score);
      if (j == targets[i]) losses[i] = (float)score;
    }
    wanted[i] = std::log(wanted[i]) - losses[i];
  }
  Contrastive c = {};
  c.dtype = DType::float32, c.queries = queries, c.passages = passages, c.width = width;
  c.query_scale = scale.data(), c.targets = targets.data(), c.own = own ? group : 0;
  kernels.forward(c, panels.data(), lanes.data(), 0, 0, padded, {top.data(), total.data(), below.data(), positive.data(), best.data(), nullptr});
  for (int64_t i = 0; i < queries; ++i) losses[i] = top[i] - positive[i] + std::log(total[i]);
  report(own ? "contrastive, own passages" : "contrastive", error_of(losses, wanted), 2e-5);
}

}  // namespace

int main() {
  for (bool sunk : {false, true}) {
    check_attention(37, 150, 72, false, sunk);
    check_attention(3, 77, 40, true, sunk);
  }
  check_pooling(90, 37);
  check_contrastive(7, 21, 37, false);
  check_contrastive(7, 21, 37, true);
  return failed;
}
