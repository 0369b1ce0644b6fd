// Vectors of floats as the compiler knows them, and the functions of one number that a decoder needs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr long LANES = 16;
#else
constexpr long LANES = 8;
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));

static inline vec load(const float *w) { return *(const vec *)w; }
static inline void store(float *y, vec v) { *(vec *)y = v; }
static inline vec load(const int8_t *w) {
#if defined(__AVX512F__)  // compilers make scalar conversions of the portable line
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
#else
  vec v;
  for (long i = 0; i < LANES; i++) v[i] = w[i];
  return v;
#endif
}

// e^x to two units in the last place; NaN stays NaN. Below -87 it is the least normal number, not 0. (Cephes' polynomial.)
static inline vec exponential(vec x) {
  const vec least = vec{} - 87.0f, most = vec{} + 88.0f;
  x = x < least ? least : x;
  x = x > most ? most : x;
  const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the whole part comes to lie in the lowest bits
  const vec whole = shifted - 12582912.0f;
  const vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (vec)(((ints)shifted << 23) + 0x3f800000);
}

// gate <- silu(gate) * up, for n numbers.
static inline void swiglu(float *gate, const float *up, long n) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vec g = load(gate + i);
    store(gate + i, g / (1.0f + exponential(-g)) * load(up + i));
  }
  for (; i < n; i++) gate[i] = gate[i] / (1.0f + exponential(vec{} - gate[i])[0]) * up[i];
}

static inline float total(vec v) {
  float sum = 0;
  for (long i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

static inline void rms_norm(const float *x, const float *gain, float eps, float *y, long n) {
  vec sums[2] = {};
  long i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES)
    for (long s = 0; s < 2; s++) sums[s] += load(x + i + s * LANES) * load(x + i + s * LANES);
  float squares = total(sums[0] + sums[1]);
  for (; i < n; i++) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / n + eps);
  for (i = 0; i < n; i++) y[i] = x[i] * scale * gain[i];
}
