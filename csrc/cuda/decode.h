// Attention of few rows over many keys, see attention/triton_decode.py: decoding, whose cost is to read keys and values once.
//
// A block of WARPS warps owns a share of one sample's keys, for one head of keys and PAIRS (row, query head) pairs that see it.
// In a warp, WIDTH neighbouring lanes share a key, LOADS times COLUMNS columns each (a load: 16 bytes of 16-bit numbers), so that
// LANES / WIDTH keys are read side by side; UNROLL of them per lane are in flight. Nothing is staged: a lane multiplies what it
// has read, the lanes of a key add up their products, and each lane keeps the columns of the running sum that it reads of the
// values. The streams of keys of a block (one per group of lanes that shares keys) are merged in its shared memory, the blocks
// of a sample by merge_column.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../cpu/pages.h"
#include "warp.h"

namespace grit {

constexpr int COLUMNS = 8;
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * LANES;
constexpr float LOG2_E = 1.44269504088896f, NATURAL_OF_2 = 0.693147180559945f;

struct DecodeArguments {
  // q (rows, heads, dim), k and v (keys, heads_kv, dim): strides in elements, dim contiguous; k and v begin every head of a key
  // at a multiple of 16 bytes
  Rows q, k, v;
  // k and v in pages: the first sample's, and from the table of one sample to that of the next
  Pages pages;
  int64_t entries;
  void* out;   // (rows, heads, dim), contiguous
  float* lse;  // (rows, heads)
  // where the keys of a sample are split: (splits, samples, most_rows, heads, dim) and without dim, the latter in units of log2
  float *part_out, *part_lse;
  const int32_t *q_start, *q_len, *k_start, *k_len, *left, *right, *hi;  // (samples), hi (rows) or null
  const uint8_t* used;  // (samples, slots), 0 where a slot of a sample's keys holds none; or null
  const void* sinks;    // (heads), one more score of every row without a value; or null
  DType sinks_dtype;
  int64_t slots, heads, dim, samples, most_rows, q_rows;
  int32_t group, splits;
  float q_factor;  // of q: the scores are products with it, in units of log2 unless capped
  float cap;       // softcap in units of log2, or 0
};

// COLUMNS numbers as they lie in memory
template <class T>
struct alignas(16) Columns {
  T x[COLUMNS];
};

template <class T>
GRIT_DEVICE Columns<T> load_columns(const T* p) {
#ifdef __CUDACC__
  union {
    Columns<T> columns;
    uint4 words[sizeof(Columns<T>) / 16];
  } loaded;
#pragma unroll
  for (int i = 0; i < (int)(sizeof(Columns<T>) / 16); ++i) loaded.words[i] = __ldg((const uint4*)p + i);
  return loaded.columns;
#else
  if ((uintptr_t)p % 16 != 0) throw std::logic_error("a load of columns that a GPU refuses: its address is no multiple of 16");
  Columns<T> loaded;
  std::memcpy(&loaded, p, sizeof(loaded));
  return loaded;
#endif
}

// (lse, factor of out) of a row whose softmax has one more score, a sink without a value; lse in units of log2
struct Sunk {
  float lse, factor;
};
GRIT_DEVICE Sunk with_sink(float lse, float sink) {
  if (lse == -INFINITY) return {lse, 0.0f};
  const float score = sink * LOG2_E, top = fmaxf(lse, score);
  const float all = top + log2f(exp2f(lse - top) + exp2f(score - top));
  return {all, exp2f(lse - all)};
}

GRIT_DEVICE Sample sample_of(const DecodeArguments& a, int64_t b) {
  const int64_t q_start = a.q_start[b];
  Pages pages = a.pages;
  if (pages.table) pages.table += b * a.entries;
  return {q_start, a.q_len[b], a.k_start[b], a.k_len[b], a.left[b], a.right[b], a.hi ? a.hi + q_start : nullptr, pages};
}

GRIT_DEVICE float sink_of(const DecodeArguments& a, int64_t head) {
  if (a.sinks_dtype == DType::float32) return ((const float*)a.sinks)[head];
  if (a.sinks_dtype == DType::bfloat16) return (float)((const torch::headeronly::BFloat16*)a.sinks)[head];
  return (float)((const torch::headeronly::Half*)a.sinks)[head];
}

// out and lse (in units of log2) of a row and head, of which `column` is computed
template <class T>
GRIT_DEVICE void store_result(const DecodeArguments& a, int64_t row, int64_t head, int64_t column, float value, float lse) {
  if (a.sinks) {
    const Sunk sunk = with_sink(lse, sink_of(a, head));
    value *= sunk.factor;
    lse = sunk.lse;
  }
  const int64_t place = row * a.heads + head;
  ((T*)a.out)[place * a.dim + column] = (T)value;
  if (column == 0) a.lse[place] = lse == -INFINITY ? lse : lse * NATURAL_OF_2;
}

constexpr int loads(int64_t dim) { return dim > LANES * COLUMNS ? 2 : 1; }

template <class Warp, class T, int DIM, int PAIRS>
struct Decode {
  static constexpr int LOADS = loads(DIM), SIDE_BY_SIDE = DIM / LOADS, WIDTH = SIDE_BY_SIDE / COLUMNS;
  static constexpr int KEYS = LANES / WIDTH;                         // side by side in a warp
  static constexpr int UNROLL = (sizeof(T) == 4 ? 2 : 4) / LOADS;    // of a lane, in flight
  static constexpr int STREAMS = WARPS * KEYS;

  struct Shared {
    float top[STREAMS][PAIRS], total[STREAMS][PAIRS], sums[STREAMS][PAIRS][DIM];
  };

  // What a block computes: pairs [first_pair, first_pair + PAIRS) of a sample and a head of keys, over keys [begin, end).
  struct Tile {
    Sample sample;
    int64_t index, head_kv;
    int32_t first_pair, part, begin, end;
    int32_t lo[PAIRS], hi[PAIRS];  // keys that a pair sees; none where its row is not real
  };

  // row of the sample and query head of a pair
  struct Place {
    int64_t row, head;
  };
  GRIT_DEVICE static Place place_of(const DecodeArguments& a, const Tile& t, int pair) {
    const int32_t row = (t.first_pair + pair) / a.group;
    return {row, t.head_kv * a.group + (t.first_pair + pair - row * a.group)};
  }

  GRIT_DEVICE static Tile tile_of(const DecodeArguments& a, int32_t tile_and_part, int64_t head_kv, int64_t index) {
    Tile t;
    t.sample = sample_of(a, index);
    t.index = index;
    t.head_kv = head_kv;
    t.part = tile_and_part % a.splits;
    t.first_pair = tile_and_part / a.splits * PAIRS;
    int32_t first = INT32_MAX, last = 0;
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      const int64_t row = place_of(a, t, pair).row;
      const bool real = row < t.sample.q_len;
      t.lo[pair] = real ? (int32_t)first_key(t.sample, row) : 0;
      t.hi[pair] = real ? (int32_t)last_key(t.sample, row) : 0;
      if (t.lo[pair] < t.hi[pair]) {
        first = t.lo[pair] < first ? t.lo[pair] : first;
        last = t.hi[pair] > last ? t.hi[pair] : last;
      }
    }
    const int32_t keys = last > first ? last - first : 0, share = (keys + a.splits - 1) / a.splits;
    t.begin = first < last ? first + t.part * share : 0;
    t.end = t.begin + share < last ? t.begin + share : last;
    return t;
  }

  // One warp's streams of keys, to shared memory.
  GRIT_DEVICE static void read_keys(const DecodeArguments& a, const Tile& t, int warp, Shared& shared) {
    typename Warp::template Each<float[PAIRS][LOADS * COLUMNS]> q, sums;
    typename Warp::template Each<float[PAIRS]> top, total;
    const T *keys = (const T*)a.k.data + t.head_kv * a.k.head, *values = (const T*)a.v.data + t.head_kv * a.v.head;
    const uint8_t* used = a.used ? a.used + t.index * a.slots : nullptr;
    const int dim = (int)a.dim;
    Warp::lanes([&](int lane) {
      const int column = lane % WIDTH * COLUMNS;
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        const Place place = place_of(a, t, pair);
        const T* from = (const T*)a.q.data + (t.sample.q_start + place.row) * a.q.row + place.head * a.q.head + column;
        const bool real = t.lo[pair] < t.hi[pair];
#pragma unroll
        for (int c = 0; c < LOADS * COLUMNS; ++c) {
          const int at = c / COLUMNS * SIDE_BY_SIDE;
          q[lane][pair][c] = real && column + at < dim ? (float)from[at + c % COLUMNS] * a.q_factor : 0.0f;
          sums[lane][pair][c] = 0.0f;
        }
        top[lane][pair] = -INFINITY;
        total[lane][pair] = 0.0f;
      }
    });
    for (int32_t first = t.begin + warp * (UNROLL * KEYS); first < t.end; first += WARPS * UNROLL * KEYS) {
      typename Warp::template Each<Columns<T>[UNROLL][LOADS]> value;
      typename Warp::template Each<float[UNROLL][PAIRS]> scores;
      Warp::lanes([&](int lane) {
        const int column = lane % WIDTH * COLUMNS;
        Columns<T> key[UNROLL][LOADS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const int32_t j = first + u * KEYS + lane / WIDTH;
#pragma unroll
          for (int n = 0; n < LOADS; ++n) {
            const int at = column + n * SIDE_BY_SIDE;
            // What is not read is 0: a slot without a key may hold anything, and 0 * NaN is NaN.
            key[u][n] = value[lane][u][n] = Columns<T>{};
            if (j < t.end && at < dim && (!used || used[j])) {
              key[u][n] = load_columns(keys + slot_offset(a.k, t.sample.pages, t.sample.k_start + j) + at);
              value[lane][u][n] = load_columns(values + slot_offset(a.v, t.sample.pages, t.sample.k_start + j) + at);
            }
          }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
          for (int pair = 0; pair < PAIRS; ++pair) {
            float score = 0.0f;
#pragma unroll
            for (int c = 0; c < LOADS * COLUMNS; ++c) score += q[lane][pair][c] * (float)key[u][c / COLUMNS].x[c % COLUMNS];
            scores[lane][u][pair] = score;
          }
      });
      Warp::template sum<WIDTH>(scores);
      Warp::lanes([&](int lane) {
        bool real[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const int32_t j = first + u * KEYS + lane / WIDTH;
          real[u] = j < t.end && (!used || used[j]);
        }
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
          float score[UNROLL], high = top[lane][pair];
#pragma unroll
          for (int u = 0; u < UNROLL; ++u) {
            const int32_t j = first + u * KEYS + lane / WIDTH;
            const float x = a.cap > 0.0f ? a.cap * tanhf(scores[lane][u][pair]) : scores[lane][u][pair];
            score[u] = real[u] && j >= t.lo[pair] && j < t.hi[pair] ? x : -INFINITY;
            high = fmaxf(high, score[u]);
          }
          const float base = high == -INFINITY ? 0.0f : high, keep = exp2f(top[lane][pair] - base);
          top[lane][pair] = high;
          total[lane][pair] *= keep;
#pragma unroll
          for (int c = 0; c < LOADS * COLUMNS; ++c) sums[lane][pair][c] *= keep;
#pragma unroll
          for (int u = 0; u < UNROLL; ++u) {
            const float p = exp2f(score[u] - base);
            total[lane][pair] += p;
#pragma unroll
            for (int c = 0; c < LOADS * COLUMNS; ++c) sums[lane][pair][c] += p * (float)value[lane][u][c / COLUMNS].x[c % COLUMNS];
          }
        }
      });
    }
    Warp::lanes([&](int lane) {
      const int stream = warp * KEYS + lane / WIDTH, column = lane % WIDTH * COLUMNS;
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        if (column == 0) {
          shared.top[stream][pair] = top[lane][pair];
          shared.total[stream][pair] = total[lane][pair];
        }
#pragma unroll
        for (int c = 0; c < LOADS * COLUMNS; ++c)
          shared.sums[stream][pair][column + c / COLUMNS * SIDE_BY_SIDE + c % COLUMNS] = sums[lane][pair][c];
      }
    });
  }

  // After all warps: one thread's share of the numbers of the tile.
  GRIT_DEVICE static void finish(const DecodeArguments& a, const Tile& t, int thread, const Shared& shared) {
    const int64_t owned = a.splits > 1 ? t.sample.q_len : t.sample.q_len > a.q_rows ? t.sample.q_len : a.q_rows;
    for (int i = thread; i < PAIRS * DIM; i += THREADS) {
      const int pair = i / DIM, column = i % DIM;
      const auto [row, head] = place_of(a, t, pair);
      if (row >= owned || column >= a.dim) continue;
      float high = -INFINITY, total = 0.0f, sum = 0.0f;
      for (int s = 0; s < STREAMS; ++s) high = fmaxf(high, shared.top[s][pair]);
      const float base = high == -INFINITY ? 0.0f : high;
      for (int s = 0; s < STREAMS; ++s) {
        const float weight = exp2f(shared.top[s][pair] - base);
        total += weight * shared.total[s][pair];
        sum += weight * shared.sums[s][pair][column];
      }
      const float value = total == 0.0f ? 0.0f : sum / total, lse = total == 0.0f ? -INFINITY : high + log2f(total);
      if (a.splits > 1) {
        const int64_t place = ((t.part * a.samples + t.index) * a.most_rows + row) * a.heads + head;
        a.part_out[place * a.dim + column] = value;
        if (column == 0) a.part_lse[place] = lse;
      } else {
        store_result<T>(a, t.sample.q_start + row, head, column, value, lse);
      }
    }
  }
};

// A column of a sample's row and head, over the parts of its keys in their order.
template <class T>
GRIT_DEVICE void merge_column(const DecodeArguments& a, int64_t index, int64_t row, int64_t head, int64_t column) {
  const Sample sample = sample_of(a, index);
  if (row >= (sample.q_len > a.q_rows ? sample.q_len : a.q_rows)) return;
  float high = -INFINITY, total = 0.0f, sum = 0.0f;
  for (int64_t part = 0; part < a.splits && row < sample.q_len; ++part) {
    const int64_t place = ((part * a.samples + index) * a.most_rows + row) * a.heads + head;
    const float lse = a.part_lse[place], above = fmaxf(high, lse), base = above == -INFINITY ? 0.0f : above;
    const float keep = exp2f(high - base), weight = exp2f(lse - base);
    total = total * keep + weight;
    sum = sum * keep + a.part_out[place * a.dim + column] * weight;
    high = above;
  }
  const float value = total == 0.0f ? 0.0f : sum / total, lse = total == 0.0f ? -INFINITY : high + log2f(total);
  store_result<T>(a, sample.q_start + row, head, column, value, lse);
}

}  // namespace grit
