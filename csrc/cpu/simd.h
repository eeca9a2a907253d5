// One vector of W float lanes, for whichever instruction set this file is compiled for.
//
// A kernel is written once in terms of vf and vi and compiled once per instruction set (CMakeLists.txt defines GRIT_ISA and those
// of GRIT_ISA_* that apply; GRIT_ISA_TILES comes with AVX512 and multiplies bfloat16 matrices with tiles.h). Everything is in a
// namespace named after the set, and nothing here may instantiate a template of the standard library: the linker keeps one copy of
// such a function, possibly one that an older CPU cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(GRIT_ISA_AVX512) || defined(GRIT_ISA_AVX2)
#include <immintrin.h>
#endif

#define GRIT_INLINE __attribute__((always_inline)) inline
#define GRIT_UNROLL _Pragma("GCC unroll 16")

namespace grit::GRIT_ISA {

#if defined(GRIT_ISA_AVX512)
constexpr int W = 16;
#elif defined(GRIT_ISA_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
GRIT_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
GRIT_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

template <class To, class From>
GRIT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

GRIT_INLINE vf splat(float x) { return x - vf{}; }
GRIT_INLINE vi splat_int(int32_t x) { return x - vi{}; }
GRIT_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
GRIT_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }
GRIT_INLINE vu load_words(const uint32_t* p) {
  vu x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
GRIT_INLINE void store_words(uint32_t* p, vu x) { std::memcpy(p, &x, sizeof(x)); }

GRIT_INLINE vi lane_numbers() {
  vi x;
  GRIT_UNROLL for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

// a * b + c, rounded once where the hardware can
GRIT_INLINE vf fma(vf a, vf b, vf c) {
#if defined(GRIT_ISA_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(GRIT_ISA_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

GRIT_INLINE vf vmax(vf a, vf b) {
#if defined(GRIT_ISA_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(GRIT_ISA_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

GRIT_INLINE vf vmin(vf a, vf b) { return -vmax(-a, -b); }
GRIT_INLINE vf vabs(vf a) { return (vf)((vu)a & 0x7fffffffu); }

GRIT_INLINE bool any(vi mask) {
#if defined(GRIT_ISA_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(GRIT_ISA_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < W; ++i) all |= mask[i];
  return all != 0;
#endif
}

GRIT_INLINE float sum_lanes(vf x) {
#if defined(GRIT_ISA_AVX512)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
#endif
}

GRIT_INLINE float max_lanes(vf x) {
#if defined(GRIT_ISA_AVX512)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float s = x[0];
  for (int i = 1; i < W; ++i) s = x[i] > s ? x[i] : s;
  return s;
#endif
}

// ---- conversions between the storage types and FP32

GRIT_INLINE vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof(h));
#if defined(GRIT_ISA_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(GRIT_ISA_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

// FP32 to the nearest bfloat16, ties to even; a NaN stays a NaN
GRIT_INLINE vh to_bf16(vf x) {
#if defined(GRIT_ISA_AVX512_BF16)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  vu chosen = (vu)((x == x) ? (vi)rounded : (vi)quiet);
#if defined(GRIT_ISA_AVX512)
  return (vh)_mm512_cvtepi32_epi16((__m512i)chosen);
#else
  return __builtin_convertvector(chosen, vh);
#endif
#endif
}

GRIT_INLINE void store(bf16* p, vf x) {
  vh h = to_bf16(x);
  std::memcpy(p, &h, sizeof(h));
}

// lane i = first[i] and, in the upper half of the word, second[i], both as bfloat16
GRIT_INLINE vu pair_words(vf first, vf second) {
#if defined(GRIT_ISA_AVX512_BF16)
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                         4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
  return __builtin_convertvector(to_bf16(first), vu) | __builtin_convertvector(to_bf16(second), vu) << 16;
#endif
}

GRIT_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return bits_as<float>(sign | ((rest << 13) + 0x38000000u));
  float subnormal = (float)rest * 5.9604644775390625e-8f;  // 2^-24
  return bits_as<float>(sign | bits_as<uint32_t>(subnormal));
}

GRIT_INLINE uint16_t float_to_half(float x) {
  uint32_t u = bits_as<uint32_t>(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
  if (rest < 0x38800000u) {                                   // subnormal: let an FP32 addition round to a multiple of 2^-24
    float shifted = bits_as<float>(rest) + 0.5f;
    return (uint16_t)(sign | (bits_as<uint32_t>(shifted) - 0x3f000000u));
  }
  return (uint16_t)(sign | (rest + 0xfffu + (rest >> 13 & 1) - 0x38000000u) >> 13);
}

GRIT_INLINE vf load(const f16* p) {
#if defined(GRIT_ISA_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(GRIT_ISA_AVX2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = half_to_float(p[i].bits);
  return x;
#endif
}

GRIT_INLINE void store(f16* p, vf x) {
#if defined(GRIT_ISA_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(GRIT_ISA_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < W; ++i) p[i].bits = float_to_half(x[i]);
#endif
}

// the first n < W elements, the other lanes 0; never reads past them
template <class T>
GRIT_INLINE vf load_first(const T* p, int64_t n) {
  T buffer[W] = {};
  std::memcpy(buffer, p, (size_t)n * sizeof(T));
  return load(buffer);
}
template <class T>
GRIT_INLINE void store_first(T* p, vf x, int64_t n) {
  T buffer[W];
  store(buffer, x);
  std::memcpy(p, buffer, (size_t)n * sizeof(T));
}

// the first min(n, W) elements
template <class T>
GRIT_INLINE vf load_up_to(const T* p, int64_t n) {
  return n >= W ? load(p) : load_first(p, n);
}
template <class T>
GRIT_INLINE void store_up_to(T* p, vf x, int64_t n) {
  if (n >= W) store(p, x);
  else store_first(p, x, n);
}

}  // namespace grit::GRIT_ISA
