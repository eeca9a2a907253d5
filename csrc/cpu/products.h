// The arithmetic that the attention and contrastive kernels share: packed operands, two micro-kernels, exp2 and tanh on vectors.
#pragma once

#include "attention.h"
#include "pages.h"
#include "simd.h"
#include "tiles.h"

namespace grit::GRIT_ISA {

#if defined(GRIT_ISA_AVX512)
constexpr int PANEL = 8;  // broadcast operands per step: PANEL x VECTORS sums fit the registers
constexpr int ROW_VECTORS = 2;
#else
constexpr int PANEL = 4;
constexpr int ROW_VECTORS = 3;
#endif
#if defined(GRIT_ISA_TILES)
constexpr int VECTORS = 2;       // tiles are multiplied two by two
constexpr int64_t ROW_STEP = 32;  // keys (or passages) and head dimensions are padded to whole steps: 32 make 16 pairs
#else
constexpr int VECTORS = 3;
constexpr int64_t ROW_STEP = 16;
#endif
constexpr int TILE = VECTORS * W;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float MINUS_INFINITY = -__builtin_inff();

// ---- formats of a packed word: one FP32 value, or two bfloat16 values whose products are summed in FP32
//
// panel: rows side by side in a packed operand. tiled: panels hold tiles, and products leave their sums in memory (tiles.h).

struct Single {
  static constexpr int values = 1;
  static constexpr bool tiled = false;
  static constexpr int panel = PANEL;
  static constexpr int exp_degree = 5;
  static GRIT_INLINE vf multiply_add(vf sum, uint32_t a, vu b) { return fma(splat(bits_as<float>(a)), (vf)b, sum); }
  static GRIT_INLINE vf multiply_add(vf sum, vu a, vu b) { return fma((vf)a, (vf)b, sum); }
};

#if defined(GRIT_ISA_AVX512_BF16) || defined(GRIT_ISA_TILES)
struct Pair {
  static constexpr int values = 2;
#if defined(GRIT_ISA_TILES)
  static constexpr bool tiled = true;
  static constexpr int panel = TILE_ROWS;
#else
  static constexpr bool tiled = false;
  static constexpr int panel = PANEL;
#endif
  static constexpr int exp_degree = 4;  // error 3e-6: far below the rounding of a bfloat16 probability
  static GRIT_INLINE vf multiply_add(vf sum, uint32_t a, vu b) { return multiply_add(sum, (vu)_mm512_set1_epi32((int)a), b); }
  static GRIT_INLINE vf multiply_add(vf sum, vu a, vu b) {
#if defined(GRIT_ISA_AVX512_BF16)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return fma((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), fma((vf)(a << 16), (vf)(b << 16), sum));
#endif
  }
};
#endif

// Calls f with the word format and storage type of a dtype.
template <class Function>
GRIT_INLINE auto with_format([[maybe_unused]] DType dtype, Function f) {
#if defined(GRIT_ISA_TILES)
  return f(Pair{}, bf16{});  // there are no tiles for other dtypes: dispatch.cpp gives them another set
#else
  switch (dtype) {
#if defined(GRIT_ISA_AVX512_BF16)
    case DType::bfloat16:
      return f(Pair{}, bf16{});
#else
    case DType::bfloat16:
      return f(Single{}, bf16{});
#endif
    case DType::float16:
      return f(Single{}, f16{});
    default:
      return f(Single{}, float{});
  }
#endif
}

// Calls f(Count<n>) for 1 <= n <= VECTORS, so that a loop over a tile's slots has constant bounds.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class Function>
GRIT_INLINE auto with_count(int64_t n, Function f) {
  if constexpr (VECTORS == 3)
    if (n == 3) return f(Count<3>{});
  return n == 2 ? f(Count<2>{}) : f(Count<1>{});
}

GRIT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
GRIT_INLINE int64_t padded_dim(int64_t dim) { return round_up(dim, ROW_STEP); }

// ---- rows in memory, for packing

template <class T>
struct StridedRows {
  const T* data;
  int64_t stride;
  GRIT_MEMBER const T* row(int64_t j) const { return data + j * stride; }
};

// keys or values of a sample and one head
template <class T>
struct KeyRows {
  const T* data;
  const Rows& x;
  const Sample& s;
  KeyRows(const Rows& x, const Sample& s, int64_t kv_head) : data((const T*)x.data + kv_head * x.head), x(x), s(s) {}
  GRIT_MEMBER const T* row(int64_t j) const { return data + slot_offset(x, s.pages, s.k_start + j); }
};

// where rows j to j + N - 1 begin; null past the last of `rows` rows
template <template <class> class Source, class T, int N>
GRIT_INLINE void find_rows(const Source<T>& source, int64_t rows, int64_t j, const T* (&found)[N]) {
  GRIT_UNROLL for (int i = 0; i < N; ++i) found[i] = j + i < rows ? source.row(j + i) : nullptr;
}

// row `first` of one head
template <class T>
GRIT_INLINE const T* head_rows(const Rows& x, int64_t first, int64_t head) {
  return (const T*)x.data + first * x.row + head * x.head;
}

// W words of a row from word d on; 0 past the end of the row, and if the row does not exist
template <class F, class T>
GRIT_INLINE vu row_words(const T* row, int64_t d, int64_t dim) {
  if constexpr (F::values == 2) {
    const int64_t left = dim / 2 - d;
    const uint32_t* words = (const uint32_t*)row + d;
    return left >= W ? load_words(words) : left <= 0 ? vu{} : (vu)load_first((const float*)words, left);
  } else {
    const int64_t left = dim - d;
    return left >= W ? (vu)load(row + d) : left <= 0 ? vu{} : (vu)load_first(row + d, left);
  }
}

// the same; WHOLE: the row is known to hold all W words
template <class F, class T, bool WHOLE>
GRIT_INLINE vu some_words(const T* row, int64_t d, int64_t dim) {
  if constexpr (!WHOLE) return row_words<F>(row, d, dim);
  else if constexpr (F::values == 2) return load_words((const uint32_t*)row + d);
  else return (vu)load(row + d);
}

// ---- transposes W x W words by log2(W) perfect shuffles

GRIT_INLINE vu interleave_low(vu a, vu b) {
#if defined(GRIT_ISA_AVX512)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(GRIT_ISA_AVX2)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
GRIT_INLINE vu interleave_high(vu a, vu b) {
#if defined(GRIT_ISA_AVX512)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(GRIT_ISA_AVX2)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

GRIT_INLINE void transpose(vu (&r)[W]) {
  vu t[W];
  GRIT_UNROLL for (int stage = 1; stage < W; stage *= 2) {
    GRIT_UNROLL for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = interleave_low(r[i], r[i + W / 2]);
      t[2 * i + 1] = interleave_high(r[i], r[i + W / 2]);
    }
    GRIT_UNROLL for (int i = 0; i < W; ++i) r[i] = t[i];
  }
}

// lane i = sum of the lanes of x[i]; destroys x
GRIT_INLINE vf sums_of_each(vf (&x)[W]) {
  GRIT_UNROLL for (int n = W / 2; n > 0; n /= 2)
    GRIT_UNROLL for (int i = 0; i < n; ++i)
      x[i] = (vf)interleave_low((vu)x[i], (vu)x[i + n]) + (vf)interleave_high((vu)x[i], (vu)x[i + n]);
  return x[0];
}

// ---- packing

// Rows [0, rows) of T as panels of PANEL rows: out [padded / PANEL][words][PANEL], 0 after the last row and the last word.
// Tiled: out [padded / 16][words / 16][16 rows][16 words]. In both the panels of rows from j on start at out + j * words.
template <class F, template <class> class Source, class T>
void pack_row_panels(const Source<T>& source, int64_t rows, int64_t padded, int64_t dim, uint32_t* out) {
  const int64_t words = padded_dim(dim) / F::values;
  if constexpr (F::tiled) {
    for (int64_t j = 0; j < padded; ++j) {
      const T* row[1];
      find_rows(source, rows, j, row);
      for (int64_t d = 0; d < words; d += W)
        store_words(out + (j / 16 * words + d) * 16 + j % 16 * 16, row[0] ? row_words<F>(row[0], d, dim) : vu{});
    }
    return;
  }
  for (int64_t j = 0; j < padded; j += W) {
    const T* row[W];
    find_rows(source, rows, j, row);
    for (int64_t d = 0; d < words; d += W) {
      vu r[W];
      GRIT_UNROLL for (int i = 0; i < W; ++i) r[i] = row[i] ? row_words<F>(row[i], d, dim) : vu{};
      transpose(r);
      const int64_t here = smaller<int64_t>(W, words - d);
      for (int64_t i = 0; i < here; ++i)
        GRIT_UNROLL for (int p = 0; p < W; p += PANEL)
          std::memcpy(out + (j + p) * words + (d + i) * PANEL, (const uint32_t*)&r[i] + p, PANEL * sizeof(uint32_t));
    }
  }
}

// W columns from d on of a word that holds `values` consecutive rows, which begin at row[0], row[1]; null: 0
template <class F, class T>
GRIT_INLINE vu column_words(const T* const* row, int64_t d, int64_t dim) {
  const vu word = row[0] ? row_words<Single>(row[0], d, dim) : vu{};
  if constexpr (F::values == 1) return word;
  const vu next = row[1] ? row_words<Single>(row[1], d, dim) : vu{};
  return word >> 16 | next;  // a bfloat16 widened to FP32 has zeros below its 16 bits
}

// Rows as column panels: out [padded_dim / PANEL][padded / values][PANEL]; a word holds `values` consecutive rows of a column.
// Tiled: out [padded_dim / 16][padded / 32][16 columns][16 words].
template <class F, template <class> class Source, class T>
void pack_column_panels(const Source<T>& source, int64_t rows, int64_t padded, int64_t dim, uint32_t* out) {
  const int64_t wide = padded_dim(dim), panel = padded / F::values * PANEL;
  if constexpr (F::tiled) {
    for (int64_t j = 0; j < padded; j += 2 * W) {
      const T* row[2 * W];
      find_rows(source, rows, j, row);
      for (int64_t d = 0; d < wide; d += W) {
        vu r[W];
        GRIT_UNROLL for (int i = 0; i < W; ++i) r[i] = column_words<F>(row + 2 * i, d, dim);
        transpose(r);
        GRIT_UNROLL for (int i = 0; i < W; ++i) store_words(out + (d * (padded / 2) + j / 2 * W) + i * W, r[i]);
      }
    }
    return;
  }
  for (int64_t j = 0; j < padded; j += F::values) {
    const T* row[F::values];
    find_rows(source, rows, j, row);
    for (int64_t d = 0; d < wide; d += W) {
      const vu word = column_words<F>(row, d, dim);
      GRIT_UNROLL for (int p = 0; p < W; p += PANEL)
        std::memcpy(out + (d + p) / PANEL * panel + j / F::values * PANEL, (const uint32_t*)&word + p, PANEL * sizeof(uint32_t));
    }
  }
}

// Up to W rows as lanes: out[word * TILE + lane]; lanes without a row are 0. `flip` is xored into every word.
template <class F, class T>
GRIT_INLINE void pack_lanes(const T* data, int64_t stride, int64_t rows, int64_t dim, uint32_t flip, uint32_t* out) {
  const int64_t words = padded_dim(dim) / F::values;
  for (int64_t d = 0; d < words; d += W) {
    vu r[W];
    GRIT_UNROLL for (int i = 0; i < W; ++i) r[i] = i < rows ? row_words<F>(data + i * stride, d, dim) : vu{};
    transpose(r);
    const int64_t here = smaller<int64_t>(W, words - d);
    for (int64_t i = 0; i < here; ++i) store_words(out + (d + i) * TILE, r[i] ^ flip);
  }
}

template <class F>
GRIT_INLINE uint32_t sign_flip(bool negate) {
  return !negate ? 0u : F::values == 2 ? 0x80008000u : 0x80000000u;
}

// FP32 lanes [dim][TILE], times `factor` per lane, to rows of T; a lane whose factor is 0 gives 0 whatever it holds
template <class T>
GRIT_INLINE void store_lanes(const float* lanes, vf factor, int64_t rows, int64_t dim, T* data, int64_t stride) {
  const vi dead = factor == 0.0f;
  for (int64_t d = 0; d < dim; d += W) {
    vu r[W];
    GRIT_UNROLL for (int i = 0; i < W; ++i) {
      vf x = load(lanes + (d + i) * TILE) * factor;
      r[i] = (vu)(dead ? vf{} : x);
    }
    transpose(r);
    const int64_t here = dim - d;
    GRIT_UNROLL for (int i = 0; i < W; ++i) {
      if (i >= rows) break;
      if (here >= W) store(data + i * stride + d, (vf)r[i]);
      else store_first(data + i * stride + d, (vf)r[i], here);
    }
  }
}

// ---- micro-kernels
//
// Their sums must stay in registers: every loop over them has constant bounds and is unrolled, and they are zeroed one by one (an
// array initialiser would go through memory).

template <int N, int NV>
GRIT_INLINE void set_zero(vf (&x)[N][NV]) {
  GRIT_UNROLL for (int i = 0; i < N; ++i)
    GRIT_UNROLL for (int v = 0; v < NV; ++v) x[i][v] = vf{};
}

// rows of TILE floats
template <int N, int NV>
GRIT_INLINE void load_all(const float* from, vf (&x)[N][NV]) {
  GRIT_UNROLL for (int i = 0; i < N; ++i)
    GRIT_UNROLL for (int v = 0; v < NV; ++v) x[i][v] = load(from + i * TILE + v * W);
}
template <int N, int NV>
GRIT_INLINE void store_all(float* to, const vf (&x)[N][NV]) {
  GRIT_UNROLL for (int i = 0; i < N; ++i)
    GRIT_UNROLL for (int v = 0; v < NV; ++v) store(to + i * TILE + v * W, x[i][v]);
}

// sum[i][v] += sum over n of panel[n * PANEL + i] * vectors[n * TILE + v * W]
template <class F, int NV>
GRIT_INLINE void multiply_panel(const uint32_t* panel, const uint32_t* vectors, int64_t count, vf (&sum)[PANEL][NV]) {
  _Pragma("GCC unroll 4") for (int64_t n = 0; n < count; ++n) {
    vu b[NV];
    GRIT_UNROLL for (int v = 0; v < NV; ++v) b[v] = load_words(vectors + n * TILE + v * W);
    GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
      const uint32_t a = panel[n * PANEL + i];
      GRIT_UNROLL for (int v = 0; v < NV; ++v) sum[i][v] = F::multiply_add(sum[i][v], a, b[v]);
    }
  }
}

#if defined(GRIT_ISA_TILES)
// operands as packed: panels of `count` words, column panels of `padded` rows from row j on, lanes [words][TILE]
GRIT_INLINE TileRows panel_tiles(const uint32_t* panels, int64_t count) { return {panels, 16 * count, TILE_SIZE, 16}; }
GRIT_INLINE TileRows column_tiles(const uint32_t* columns, int64_t padded, int64_t j) {
  return {columns + j / 2 * 16, padded / 2 * 16, TILE_SIZE, 16};
}
GRIT_INLINE TileLanes lane_tiles(const uint32_t* lanes) { return {lanes, 16 * TILE, TILE}; }
#endif

// sums [rows][TILE] of a tiled format = row panels x lanes; other formats compute them panel by panel (panel_sums)
template <class F, int NV>
GRIT_INLINE void compute_sums([[maybe_unused]] float* sums, [[maybe_unused]] int64_t rows, [[maybe_unused]] const uint32_t* panels,
                              [[maybe_unused]] const uint32_t* lanes, [[maybe_unused]] int64_t words) {
#if defined(GRIT_ISA_TILES)
  if constexpr (F::tiled) multiply_tiles(sums, TILE, rows / 16, NV, panel_tiles(panels, words), lane_tiles(lanes), words / 16, false);
#endif
}

// PANEL rows of those sums: x = panel x lanes, or what compute_sums has left at `sums`
template <class F, int NV>
GRIT_INLINE void panel_sums([[maybe_unused]] const float* sums, [[maybe_unused]] const uint32_t* panel, [[maybe_unused]] const uint32_t* lanes,
                            [[maybe_unused]] int64_t words, vf (&x)[PANEL][NV]) {
  if constexpr (F::tiled) {
    load_all(sums, x);
  } else {
    set_zero(x);
    multiply_panel<F, NV>(panel, lanes, words, x);
  }
}

// sum[i][v] += sum over n of a[i * a_stride + n] * rows[n * row_stride + v * W]
template <class F, int NV>
GRIT_INLINE void multiply_rows(const uint32_t* a, int64_t a_stride, const uint32_t* rows, int64_t row_stride, int64_t count,
                               vf (&sum)[PANEL][NV]) {
  _Pragma("GCC unroll 4") for (int64_t n = 0; n < count; ++n) {
    vu b[NV];
    GRIT_UNROLL for (int v = 0; v < NV; ++v) b[v] = load_words(rows + n * row_stride + v * W);
    GRIT_UNROLL for (int i = 0; i < PANEL; ++i) {
      const uint32_t x = a[i * a_stride + n];
      GRIT_UNROLL for (int v = 0; v < NV; ++v) sum[i][v] = F::multiply_add(sum[i][v], x, b[v]);
    }
  }
}

// ---- functions

// 2^x for x <= about 100; exactly 1 at 0. x below -126 gives 2^-126: a caller that masks must write its own 0. A NaN stays a NaN.
template <int DEGREE>
GRIT_INLINE vf exp2_of(vf x) {
#if defined(GRIT_ISA_TILES)
  if constexpr (DEGREE == 4) {  // next to tile products, exponentials dominate: 6 instructions instead of 10; 0 for -inf
    const vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
    vf p = fma(splat(1.342667e-2f), f, splat(5.22425e-2f));
    p = fma(p, f, splat(2.4128019e-1f));
    p = fma(p, f, splat(6.9304485e-1f));
    p = fma(p, f, splat(1.0f));
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
  }
#endif
  x = vmax(splat(-126.0f), x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);  // -0.5 .. 0.5
  vf p;
  if constexpr (DEGREE == 4) {
    p = fma(splat(9.582852993e-03f), f, splat(5.590642474e-02f));
    p = fma(p, f, splat(2.402409861e-01f));
    p = fma(p, f, splat(6.931241934e-01f));
  } else {
    p = fma(splat(1.326472707e-03f), f, splat(9.671512649e-03f));
    p = fma(p, f, splat(5.550733744e-02f));
    p = fma(p, f, splat(2.402224209e-01f));
    p = fma(p, f, splat(6.931469776e-01f));
  }
  p = fma(p, f, splat(1.0f));
  return (vf)((vu)p + ((vu)shifted << 23));
}

GRIT_INLINE vf tanh_of(vf x) {
  const vf size = vabs(x), square = x * x;
  // below 0.625 an odd polynomial keeps the relative error small, above it 1 - 2 / (e^2x + 1)
  vf p = fma(splat(-5.717037894e-03f), square, splat(2.065058126e-02f));
  p = fma(p, square, splat(-5.374349636e-02f));
  p = fma(p, square, splat(1.333149127e-01f));
  p = fma(p, square, splat(-3.333328392e-01f));
  const vf near_zero = fma(p * square, x, x);
  const vf e = exp2_of<5>(vmin(splat(10.0f), size) * (2 * LOG2_E));  // vmin returns a NaN that is its second argument
  const vf far = 1.0f - 2.0f / (e + 1.0f);
  const vf of_sign = (vf)((vu)far | ((vu)x & 0x80000000u));
  return size < 0.625f ? near_zero : of_sign;
}

// 2^x for x <= about 100, and 0 below -126
GRIT_INLINE vf exp2_or_zero(vf x) { return x < -126.0f ? vf{} : exp2_of<5>(x); }

// Adds a base-2 score without a value to the softmax of rows with this highest score and this sum of exponentials relative to it,
// and returns what their sums of values are multiplied by then. Rows that have seen no key stay as they are.
GRIT_INLINE vf add_sink(vf sink, vf& maximum, vf& total) {
  const vf higher = vmax(maximum, sink), rescale = exp2_or_zero(maximum - higher);
  const vf sum = fma(total, rescale, exp2_or_zero(sink - higher));
  maximum = total == 0.0f ? maximum : higher;
  total = total == 0.0f ? total : sum;
  return rescale;
}

// From this base-2 score on, scores are rounded before the maximum is subtracted, as SDPA does: in one fused operation the
// difference would keep digits that the maximum has lost, and its exponential could overflow from 2^31 on.
constexpr float LARGE_SCORE = 4096;

// multiplies `rows` rows of raw products by the scale, rounded, in the chosen lanes
inline void scale_scores(float* scores, int64_t rows, float scale, vi chosen) {
  for (int64_t i = 0; i < rows; ++i) {
    const vf x = load(scores + i * TILE);
    store(scores + i * TILE, chosen ? x * scale : x);
  }
}

// turns raw products [PANEL][TILE] into capped scores, in place; slope, if given, receives the derivative of the cap
inline void cap_scores(float* raw, float cap_in, float cap_out, float* slope) {
  for (int64_t i = 0; i < PANEL * TILE; i += W) {
    const vf t = tanh_of(load(raw + i) * cap_in);
    store(raw + i, t * cap_out);
    if (slope) store(slope + i, 1.0f - t * t);
  }
}

}  // namespace grit::GRIT_ISA
