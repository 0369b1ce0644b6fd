// y[m][n] = sum_k x[m][k] * w[n][k] with weights laid out in panels, for one row m or many.
//
// Every number of y is one chain of fused multiply-adds in the order of k, however many rows share the call and however many threads work:
// a row's bits never depend on the other rows. Weights are read once, in the order they lie in; while one panel is multiplied the next
// one is fetched, without which memory waits while arithmetic works (61 against 86 GFLOPS at 32 rows).
#pragma once
#include "vectors.h"

// n rows and k columns in panels [n / width][k][width], zeros where n is no multiple of the width. `w` is null where there is none.
struct Matrix {
  const void *w;
  const float *scale;  // [n]: w holds int8; null: fp32
  const float *bias;   // [n] or null
  long n, k;
};

// A line of the cache for each k: int8 panels are as wide as they can be read at once by one row.
template <class W>
constexpr long width = sizeof(W) == 1 ? 64 : 2 * LANES;

#ifdef __AVX512F__
constexpr long MOST_TILE = 12;  // rows whose sums fit the registers
#else
constexpr long MOST_TILE = 6;
#endif
constexpr long WORTH_THREADS = 1 << 16;

struct Fetch {
  const char *from;
  long pace;  // bytes for each k, in 256ths
};

static inline void finish(const Matrix &w, long column, vec sum, float *y, bool add) {
  if (column + LANES <= w.n) {
    if (w.scale) sum *= load(w.scale + column);
    if (w.bias) sum += load(w.bias + column);
    if (add) sum += load(y + column);
    store(y + column, sum);
    return;
  }
  for (long i = 0; column + i < w.n; i++) {
    float one = sum[i];
    if (w.scale) one *= w.scale[column + i];
    if (w.bias) one += w.bias[column + i];
    y[column + i] = add ? y[column + i] + one : one;
  }
}

// M rows of x with V vectors of columns. What there are fewer of waits in registers: weights, or numbers of x.
template <int M, int V, class W>
static inline void tile(const Matrix &matrix, const W *w, long column, const float *x, long x_step, float *y, long y_step, bool add, Fetch fetch) {
  vec sum[M][V] = {};
  for (long j = 0; j < matrix.k; j++, w += width<W>) {
    __builtin_prefetch(fetch.from + ((j * fetch.pace) >> 8), 0, 2);
    if constexpr (M > V) {
      vec weights[V];
      for (int v = 0; v < V; v++) weights[v] = load(w + v * LANES);
      for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sum[m][v] += weights[v] * x[m * x_step + j];
    } else {
      for (int v = 0; v < V; v++) {
        const vec weights = load(w + v * LANES);
        for (int m = 0; m < M; m++) sum[m][v] += weights * x[m * x_step + j];
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++)
      if (column + v * LANES < matrix.n) finish(matrix, column + v * LANES, sum[m][v], y + m * y_step, add);
}

template <int M, int V, class W>
static inline void strip(const Matrix &matrix, const W *w, long column, const float *x, long x_step, float *y, long y_step, bool add, Fetch fetch) {
  for (long c = 0; c < width<W>; c += V * LANES) {
    tile<M, V, W>(matrix, w + c, column + c, x, x_step, y, y_step, add, fetch);
    fetch.pace = 0;
  }
}

// As many vectors of columns as the sums of M rows leave registers for.
template <int M, class W>
constexpr int columns = M == 1 ? width<W> / LANES : M <= 3 && sizeof(W) == 1 ? 4 : 2;

template <int M, class W>
static inline void strips(long rows, const Matrix &matrix, const W *w, long column, const float *x, long x_step, float *y, long y_step, bool add, Fetch fetch) {
  if (rows == M) return strip<M, columns<M, W>, W>(matrix, w, column, x, x_step, y, y_step, add, fetch);
  if constexpr (M > 1) strips<M - 1, W>(rows, matrix, w, column, x, x_step, y, y_step, add, fetch);
}

template <class W>
static void panels(const Matrix &matrix, const float *x, long x_step, float *y, long y_step, long m, bool add) {
  const W *w = (const W *)matrix.w;
  const long size = width<W> * matrix.k, tiles = (m + MOST_TILE - 1) / MOST_TILE;
  const long share = (long)sizeof(W) * width<W> * 256 / tiles;
#pragma omp parallel for schedule(static) if (m * matrix.n * matrix.k > WORTH_THREADS)
  for (long panel = 0; panel < (matrix.n + width<W> - 1) / width<W>; panel++) {
    const W *here = w + panel * size;
    for (long t = 0; t < tiles; t++) {  // rows are shared out evenly: a tile of one row would wait for its own sums
      const long from = m * t / tiles, rows = m * (t + 1) / tiles - from;
      const Fetch fetch{(const char *)(here + size) + ((t * share * matrix.k) >> 8), share};
      strips<MOST_TILE, W>(rows, matrix, here, panel * width<W>, x + from * x_step, x_step, y + from * y_step, y_step, add, fetch);
    }
  }
}

// Rows that go through a matrix together: their numbers stay in the second cache while the panels pass by. 4,096 rows in one go cost 1.4 times as much.
constexpr long MOST_ROWS = 256;

// m rows; `x_step` and `y_step` are the distances between rows; `add` keeps what y holds.
static void product(const Matrix &w, const float *x, long x_step, float *y, long y_step, long m, bool add = false) {
  const long parts = (m + MOST_ROWS - 1) / MOST_ROWS;
  for (long part = 0; part < parts; part++) {
    const long from = m * part / parts, rows = m * (part + 1) / parts - from;
    if (w.scale) panels<int8_t>(w, x + from * x_step, x_step, y + from * y_step, y_step, rows, add);
    else panels<float>(w, x + from * x_step, x_step, y + from * y_step, y_step, rows, add);
  }
}
