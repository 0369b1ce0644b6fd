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

template <class W, int M>
static void product(const W *w, const float *scale, const float *x, float *y, long n, long k) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < n; row++) {
    const W *at = w + row * k;
    floats sum[M] = {};
    for (long j = 0; j < k; j += 16) {
      floats weights = load(at + j);
      for (int m = 0; m < M; m++) sum[m] += weights * load(x + m * k + j);
    }
    for (int m = 0; m < M; m++) {
      float total = 0;
      for (int i = 0; i < 16; i++) total += sum[m][i];
      y[m * n + row] = scale ? scale[row] * total : total;
    }
  }
}

template <class W>
static void products(const W *w, const float *scale, const float *x, float *y, long m, long n, long k) {
  for (; m > 4; m -= 4, x += 4 * k, y += 4 * n) product<W, 4>(w, scale, x, y, n, k);
  switch (m) {
    case 4: return product<W, 4>(w, scale, x, y, n, k);
    case 3: return product<W, 3>(w, scale, x, y, n, k);
    case 2: return product<W, 2>(w, scale, x, y, n, k);
    case 1: return product<W, 1>(w, scale, x, y, n, k);
  }
}

extern "C" void products_f32(const float *w, const float *scale, const float *x, float *y, long m, long n, long k) {
  products(w, scale, x, y, m, n, k);
}
extern "C" void products_i8(const int8_t *w, const float *scale, const float *x, float *y, long m, long n, long k) {
  products(w, scale, x, y, m, n, k);
}
