// y[m][n] = scale[n] * sum_k w[n][k] * x[m][k] for a few rows m. Compiled when an engine starts (rows.py).
//
// Every weight comes from memory once and one matrix row follows the other, which is what the CPU's prefetcher follows best:
// with several rows of w at a time, as BLAS libraries do it, half the bandwidth is lost. k must be a multiple of 16.
#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int ints __attribute__((vector_size(64)));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));

static inline floats load(const float *w) { return *(const floats *)w; }
static inline floats load(const int8_t *w) {
#ifdef __AVX512F__  // gcc 13 makes sixteen scalar conversions of the portable line
  return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
#endif
  return __builtin_convertvector(__builtin_convertvector(*(const bytes *)w, ints), floats);
}

// R rows of w with M rows of x. One row of w at a time while memory is the limit; two, each value of x used twice, when arithmetic is.
template <class W, int R, int M>
static inline void tile(const W *w, const float *scale, const float *x, float *y, long n, long k) {
  floats sum[R][M] = {};
  for (long j = 0; j < k; j += 16) {
    floats weights[R];
    for (int r = 0; r < R; r++) weights[r] = load(w + r * k + j);
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) sum[r][m] += weights[r] * load(x + m * k + j);
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) {
      float total = 0;
      for (int i = 0; i < 16; i++) total += sum[r][m][i];
      y[m * n + r] = scale ? scale[r] * total : total;
    }
}

template <class W, int R>
static void strip(const W *w, const float *scale, const float *x, float *y, long m, long n, long k) {
  for (; m >= 8; m -= 8, x += 8 * k, y += 8 * n) tile<W, R, 8>(w, scale, x, y, n, k);
  for (; m >= 4; m -= 4, x += 4 * k, y += 4 * n) tile<W, R, 4>(w, scale, x, y, n, k);
  switch (m) {
    case 3: return tile<W, R, 3>(w, scale, x, y, n, k);
    case 2: return tile<W, R, 2>(w, scale, x, y, n, k);
    case 1: return tile<W, R, 1>(w, scale, x, y, n, k);
  }
}

template <class W>
static void products(const W *w, const float *scale, const float *x, float *y, long m, long n, long k) {
  const long pairs = m > 8 ? n / 2 : 0;
#pragma omp parallel for schedule(static)
  for (long at = 0; at < 2 * pairs; at += 2) strip<W, 2>(w + at * k, scale ? scale + at : scale, x, y + at, m, n, k);
#pragma omp parallel for schedule(static)
  for (long at = 2 * pairs; at < n; at++) strip<W, 1>(w + at * k, scale ? scale + at : scale, x, y + at, m, n, k);
}

extern "C" void products_f32(const float *w, const float *scale, const float *x, float *y, long m, long n, long k) {
  products(w, scale, x, y, m, n, k);
}
extern "C" void products_i8(const int8_t *w, const float *scale, const float *x, float *y, long m, long n, long k) {
  products(w, scale, x, y, m, n, k);
}
