// Products of matrix tiles: AMX's bfloat16 instruction, or the same arithmetic in the same order without it.
//
// A tile holds 16 rows of 64 bytes. With rows a (16 x 16 words) and lanes b (16 words x 16 columns), each word a pair of bfloat16
// values, one instruction computes for every row m and column n, in FP32, rounding to nearest even, denormals counting as 0:
//   even, odd = 0;  for k = 0..15: even = fma(a[m][k].low, b[k][n].low, even), odd = fma(a[m][k].high, b[k][n].high, odd)
//   sum[m][n] += even + odd
// Of the eight tiles, four hold the sums of 2 x 2 products, two hold rows and two lanes: every loaded tile serves two products.
#pragma once

#include "simd.h"

#if defined(GRIT_ISA_TILES)

namespace grit::GRIT_ISA {

constexpr int TILE_ROWS = 16, TILE_WORDS = 16;
constexpr int TILE_SIZE = TILE_ROWS * TILE_WORDS;  // words

#if defined(GRIT_ISA_AMX)

// The tile registers of this thread, configured by enter_tiles. Their numbers must be literals: the intrinsics are macros.
struct Tiles {
  template <int R, int C>
  static GRIT_INLINE void zero() {
    if constexpr (R == 0 && C == 0) _tile_zero(0);
    else if constexpr (R == 0) _tile_zero(1);
    else if constexpr (C == 0) _tile_zero(2);
    else _tile_zero(3);
  }
  template <int R, int C>
  static GRIT_INLINE void load(const float* p, int64_t bytes) {
    if constexpr (R == 0 && C == 0) _tile_loadd(0, p, bytes);
    else if constexpr (R == 0) _tile_loadd(1, p, bytes);
    else if constexpr (C == 0) _tile_loadd(2, p, bytes);
    else _tile_loadd(3, p, bytes);
  }
  template <int R, int C>
  static GRIT_INLINE void store(float* p, int64_t bytes) {
    if constexpr (R == 0 && C == 0) _tile_stored(0, p, bytes);
    else if constexpr (R == 0) _tile_stored(1, p, bytes);
    else if constexpr (C == 0) _tile_stored(2, p, bytes);
    else _tile_stored(3, p, bytes);
  }
  template <int R>
  static GRIT_INLINE void load_rows(const uint32_t* p, int64_t bytes) {
    if constexpr (R == 0) _tile_loadd(4, p, bytes);
    else _tile_loadd(5, p, bytes);
  }
  template <int C>
  static GRIT_INLINE void load_lanes(const uint32_t* p, int64_t bytes) {
    if constexpr (C == 0) _tile_loadd(6, p, bytes);
    else _tile_loadd(7, p, bytes);
  }
  template <int R, int C>
  static GRIT_INLINE void multiply() {
    if constexpr (R == 0 && C == 0) _tile_dpbf16ps(0, 4, 6);
    else if constexpr (R == 0) _tile_dpbf16ps(1, 4, 7);
    else if constexpr (C == 0) _tile_dpbf16ps(2, 5, 6);
    else _tile_dpbf16ps(3, 5, 7);
  }
};

// gcc's intrinsics do not tell the compiler that a load reads memory: earlier stores must not be moved past it
GRIT_INLINE void finish_stores() { asm volatile("" ::: "memory"); }

// Configures all eight tiles of this thread as 16 rows of 64 bytes; leave_tiles returns the registers to their initial state.
inline void enter_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" : : "m"(config) : "memory");  // gcc 12 assumes that the next instruction reads only 8 bytes
  _tile_loadconfig(&config);
}
inline void leave_tiles() { _tile_release(); }

#else

struct Tiles {
  alignas(64) float sums[2][2][TILE_ROWS][W];
  alignas(64) uint32_t rows[2][TILE_ROWS][TILE_WORDS];
  alignas(64) uint32_t lanes[2][TILE_WORDS][W];
  uint32_t control = _mm_getcsr();

  GRIT_INLINE Tiles() { _mm_setcsr((control & ~0xe040u) | 0x8040u); }  // denormals are 0 on input and output; to nearest even
  GRIT_INLINE ~Tiles() { _mm_setcsr(control); }

  static GRIT_INLINE void copy(const void* from, int64_t from_bytes, void* to, int64_t to_bytes) {
    for (int i = 0; i < TILE_ROWS; ++i) std::memcpy((char*)to + i * to_bytes, (const char*)from + i * from_bytes, 64);
  }
  template <int R, int C>
  GRIT_INLINE void zero() { std::memset(sums[R][C], 0, sizeof(sums[R][C])); }
  template <int R, int C>
  GRIT_INLINE void load(const float* p, int64_t bytes) { copy(p, bytes, sums[R][C], 64); }
  template <int R, int C>
  GRIT_INLINE void store(float* p, int64_t bytes) { copy(sums[R][C], 64, p, bytes); }
  template <int R>
  GRIT_INLINE void load_rows(const uint32_t* p, int64_t bytes) { copy(p, bytes, rows[R], 64); }
  template <int C>
  GRIT_INLINE void load_lanes(const uint32_t* p, int64_t bytes) { copy(p, bytes, lanes[C], 64); }
  template <int R, int C>
  GRIT_INLINE void multiply() {
    for (int m = 0; m < TILE_ROWS; ++m) {
      vf even = {}, odd = {};
      for (int k = 0; k < TILE_WORDS; ++k) {
        const uint32_t a = rows[R][m][k];
        const vu b = load_words(lanes[C][k]);
        even = fma(splat(bits_as<float>(a << 16)), (vf)(b << 16), even);
        odd = fma(splat(bits_as<float>(a & 0xffff0000u)), (vf)(b & 0xffff0000u), odd);
      }
      grit::GRIT_ISA::store(sums[R][C][m], grit::GRIT_ISA::load(sums[R][C][m]) + (even + odd));
    }
  }
};

GRIT_INLINE void finish_stores() {}
inline void enter_tiles() {}
inline void leave_tiles() {}

#endif

// Rows of a product: tile (r, n), 16 rows from 16 r on and 16 words from 16 n on, lies at data + r * row_step + n * word_step.
struct TileRows {
  const uint32_t* data;
  int64_t row_step, word_step, stride;  // words; stride: between rows of a tile
};

// Lanes of a product: 16 words from 16 n on of 16 columns from 16 c on lie at data + n * word_step + 16 c.
struct TileLanes {
  const uint32_t* data;
  int64_t word_step, stride;  // words; stride: between words of a column
};

constexpr int64_t STEPS = 8;  // tiles of words between two visits to the sums at most, where several pairs of rows share their lanes:
                              // these stay in the first-level cache

template <int R, int C>
GRIT_INLINE void multiply_corner(Tiles& t, float* sums, int64_t stride, const TileRows& a, const TileLanes& b, int64_t steps, bool add) {
  float* const second = sums + TILE_ROWS * stride;
  const int64_t bytes = stride * 4;
  if (add) {
    t.template load<0, 0>(sums, bytes);
    if constexpr (C == 2) t.template load<0, 1>(sums + W, bytes);
    if constexpr (R == 2) t.template load<1, 0>(second, bytes);
    if constexpr (R == 2 && C == 2) t.template load<1, 1>(second + W, bytes);
  } else {
    t.template zero<0, 0>();
    if constexpr (C == 2) t.template zero<0, 1>();
    if constexpr (R == 2) t.template zero<1, 0>();
    if constexpr (R == 2 && C == 2) t.template zero<1, 1>();
  }
  const uint32_t *rows = a.data, *lanes = b.data;
  for (int64_t n = 0; n < steps; ++n, rows += a.word_step, lanes += b.word_step) {
    t.template load_rows<0>(rows, a.stride * 4);
    t.template load_lanes<0>(lanes, b.stride * 4);
    t.template multiply<0, 0>();
    if constexpr (C == 2) {
      t.template load_lanes<1>(lanes + W, b.stride * 4);
      t.template multiply<0, 1>();
    }
    if constexpr (R == 2) {
      t.template load_rows<1>(rows + a.row_step, a.stride * 4);
      t.template multiply<1, 0>();
      if constexpr (C == 2) t.template multiply<1, 1>();
    }
  }
  t.template store<0, 0>(sums, bytes);
  if constexpr (C == 2) t.template store<0, 1>(sums + W, bytes);
  if constexpr (R == 2) t.template store<1, 0>(second, bytes);
  if constexpr (R == 2 && C == 2) t.template store<1, 1>(second + W, bytes);
}

// sums [16 rows][16 columns], `stride` floats between rows, = or += rows x lanes over 16 `steps` words.
inline void multiply_tiles(float* sums, int64_t stride, int64_t rows, int64_t columns, const TileRows& a, const TileLanes& b, int64_t steps,
                           bool add) {
  finish_stores();
  Tiles t;
  const int64_t visits = rows <= 2 ? 1 : (steps + STEPS - 1) / STEPS, most = visits ? (steps + visits - 1) / visits : steps;
  for (int64_t n = 0; n < steps; n += most) {
    const int64_t here = smaller(most, steps - n);
    for (int64_t c = 0; c < columns; c += 2)
      for (int64_t r = 0; r < rows; r += 2) {
        const TileRows ra{a.data + r * a.row_step + n * a.word_step, a.row_step, a.word_step, a.stride};
        const TileLanes rb{b.data + n * b.word_step + c * W, b.word_step, b.stride};
        float* out = sums + r * TILE_ROWS * stride + c * W;
        const bool two_rows = r + 1 < rows, two_columns = c + 1 < columns, more = add || n > 0;
        if (two_rows && two_columns) multiply_corner<2, 2>(t, out, stride, ra, rb, here, more);
        else if (two_rows) multiply_corner<2, 1>(t, out, stride, ra, rb, here, more);
        else if (two_columns) multiply_corner<1, 2>(t, out, stride, ra, rb, here, more);
        else multiply_corner<1, 1>(t, out, stride, ra, rb, here, more);
      }
  }
}

}  // namespace grit::GRIT_ISA

#endif
