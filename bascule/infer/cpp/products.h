// y[m][n] = sum_k x[m][k] * w[n][k] with weights laid out in panels, for one row m or many.
//
// Every number of y is one chain of fused multiply-adds in the order of k, however many rows share the call and however many threads work:
// a row's bits never depend on the other rows. Weights are read once. Up to three rows wait for memory alone, and pass several panels side by
// side: the CPU fetches each stream ahead by itself. More rows go panel by panel, and while one is multiplied the next one is asked for, without
// which memory waits while arithmetic works (61 against 86 GFLOPS at 32 rows).
#pragma once
#include <algorithm>
#include <initializer_list>
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
constexpr long MOST_TILE = 12, LEAST_SHARE = 4;  // rows whose sums fit the registers; the fewest in a tile of more than 3 rows (next_tile)
#else
constexpr long MOST_TILE = 6, LEAST_SHARE = 2;
#endif
constexpr long WORTH_THREADS = 1 << 16;

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

// M rows of x with V vectors of columns of P panels. What there are fewer of waits in registers: weights, or numbers of x. Meanwhile `pace` bytes for
// each k, in 256ths, are asked for from `ahead` on, in STREAMS places at once: a CPU that sees several streams fetches further by itself.
template <int M, int V, int P, int STREAMS, class W>
static inline void tile(const Matrix &matrix, const W *w, long column, const float *x, long x_step, float *y, long y_step, bool add, const char *ahead, long pace) {
  const long size = width<W> * matrix.k, apart = STREAMS ? ((pace * matrix.k) >> 8) / STREAMS : 0;
  vec sum[P][M][V] = {};
  for (long j = 0; j < matrix.k; j++, w += width<W>) {
    if constexpr (STREAMS > 0) __builtin_prefetch(ahead + j % STREAMS * apart + ((j / STREAMS * pace) >> 8), 0, 2);
    for (int p = 0; p < P; p++) {
      const W *here = w + p * size;
      if constexpr (M > V) {
        vec weights[V];
        for (int v = 0; v < V; v++) weights[v] = load(here + v * LANES);
        for (int m = 0; m < M; m++)
          for (int v = 0; v < V; v++) sum[p][m][v] += weights[v] * x[m * x_step + j];
      } else {
        for (int v = 0; v < V; v++) {
          const vec weights = load(here + v * LANES);
          for (int m = 0; m < M; m++) sum[p][m][v] += weights * x[m * x_step + j];
        }
      }
    }
  }
  for (int p = 0; p < P; p++, column += width<W>)
    for (int m = 0; m < M; m++)
      for (int v = 0; v < V; v++)
        if (column + v * LANES < matrix.n) finish(matrix, column + v * LANES, sum[p][m][v], y + m * y_step, add);
}

// As many vectors of columns as the sums of M rows leave registers for, and as many panels side by side: one row reads 21 GB/s of four panels,
// 15 of one that is asked for beforehand (EPYC, one thread). int8 waits for its conversion.
template <int M, class W>
constexpr int columns = M == 1 ? width<W> / LANES : M <= 3 && sizeof(W) == 1 ? 4 : 2;
template <int M, class W>
constexpr int abreast = sizeof(W) == 1 || M > 3 ? 1 : M == 1 ? 4 : 5 - M;

// M rows with some neighbouring panels, P at once. `share`: bytes to ask for, for each k, row and vector of columns, in 256ths.
template <int M, int P, int STREAMS, class W>
static inline void strip(long panels, const Matrix &matrix, const W *w, long column, const float *x, long x_step, float *y, long y_step, bool add, const char *&ahead, long share) {
  constexpr int V = columns<M, W>;
  const long pace = share * M * V * P;
  for (; panels >= P; panels -= P, w += P * width<W> * matrix.k, column += P * width<W>) {
    for (long c = 0; c < width<W>; c += V * LANES) {
      tile<M, V, P, STREAMS, W>(matrix, w + c, column + c, x, x_step, y, y_step, add, ahead, pace);
      ahead += (pace * matrix.k) >> 8;
    }
  }
  if constexpr (P > 1) {
    if (panels > 0) strip<M, P - 1, STREAMS, W>(panels, matrix, w, column, x, x_step, y, y_step, add, ahead, share);
  }
}

template <int M, int LEAST, int STREAMS, class W>
static inline void strips(long rows, long panels, const Matrix &matrix, const W *w, long column, const float *x, long x_step, float *y, long y_step, bool add, const char *&ahead, long share) {
  if (rows == M) return strip<M, abreast<M, W>, STREAMS, W>(panels, matrix, w, column, x, x_step, y, y_step, add, ahead, share);
  if constexpr (M > LEAST) strips<M - 1, LEAST, STREAMS, W>(rows, panels, matrix, w, column, x, x_step, y, y_step, add, ahead, share);
}

template <class W>
constexpr long most_abreast(long rows) {
  return rows == 1 ? abreast<1, W> : rows == 2 ? abreast<2, W> : rows == 3 ? abreast<3, W> : 1;
}

// How many of the rows that are left share the next tile.
static inline long next_tile(long left) {
  if (left <= MOST_TILE) return left;
#ifdef __AVX512F__  // 5 rows have chains enough: even shares
  const long tiles = (left + MOST_TILE - 1) / MOST_TILE;
  return (left + tiles - 1) / tiles;
#else  // tiles of 5 and 6 rows reach 84 and 90 GFLOP/s, of 4 only 60 (8 chains), of 2 and 3 with panels side by side 80 (EPYC, one thread)
  return left % 6 == 1 || left % 6 == 4 ? 5 : 6;
#endif
}

// One of several products that read the same rows: in one go threads wait for each other once, not after each.
struct Product {
  const Matrix *w;
  float *y;
  long y_step;  // the distance between rows
  long panels() const { return w->scale ? (w->n + width<int8_t> - 1) / width<int8_t> : (w->n + width<float> - 1) / width<float>; }
};

// Panels `first` to `end` of one product, by as many at a time as its narrowest tile has side by side.
template <int LEAST, int MOST, int STREAMS, class W>
static void pass(const Product &one, long first, long end, const float *x, long x_step, long m, bool add) {
  const Matrix &matrix = *one.w;
  const long size = width<W> * matrix.k, share = (long)sizeof(W) * LANES * 256 / m;
  long most = 1;
  for (long left = m; left > 0; left -= next_tile(left)) most = std::max(most, most_abreast<W>(next_tile(left)));
  for (long panel = first, count; panel < end; panel += count) {
    count = std::min(end - panel, most);
    const W *here = (const W *)matrix.w + panel * size;
    const char *ahead = (const char *)(here + count * size);
    for (long from = 0, rows; from < m; from += rows) {
      rows = next_tile(m - from);
      strips<MOST, LEAST, STREAMS, W>(rows, count, matrix, here, panel * width<W>, x + from * x_step, x_step, one.y + from * one.y_step, one.y_step, add, ahead, share);
    }
  }
}

// Up to 3 rows of fp32 wait for memory alone, up to 8 still more for it than for arithmetic: asked for in four places 8 rows reach 64 GFLOP/s, in one
// 55; 16 rows lose by it, 82 to 77 (EPYC, one thread).
static void pass_rows(const Product &one, long first, long end, const float *x, long x_step, long m, bool add) {
  if (one.w->scale) return pass<1, MOST_TILE, 1, int8_t>(one, first, end, x, x_step, m, add);
  if (m <= 3) return pass<1, 3, 0, float>(one, first, end, x, x_step, m, add);
  if (m <= 8) return pass<LEAST_SHARE, MOST_TILE, 4, float>(one, first, end, x, x_step, m, add);
  return pass<LEAST_SHARE, MOST_TILE, 1, float>(one, first, end, x, x_step, m, add);
}

extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

// Rows that go through a matrix together: their numbers stay in the second cache while the panels pass by. 4,096 rows in one go cost 1.4 times as much.
constexpr long MOST_ROWS = 256;

// Matrices of the same k; m rows, `x_step` apart; `add` keeps what y holds. Every thread takes its share of all panels, which have the same bytes for
// each k whatever they hold, and passes all rows by it before it waits for the others: on a loaded machine every wait costs a turn of the scheduler.
static void products(std::initializer_list<Product> all, const float *x, long x_step, long m, bool add = false) {
  long panels = 0, work = 0;
  for (const Product &one : all) panels += one.panels(), work += m * one.w->n * one.w->k;
  const long parts = (m + MOST_ROWS - 1) / MOST_ROWS;
#pragma omp parallel if (work > WORTH_THREADS)
  {
    const long me = omp_get_thread_num(), threads = omp_get_num_threads();
    for (long part = 0; part < parts; part++) {
      const long row = m * part / parts, rows = m * (part + 1) / parts - row;
      long first = panels * me / threads, end = panels * (me + 1) / threads;
      for (const Product &one : all) {
        const long own = one.panels();
        const Product moved{one.w, one.y + row * one.y_step, one.y_step};
        pass_rows(moved, std::max(first, 0L), std::min(end, own), x + row * x_step, x_step, rows, add);
        first -= own, end -= own;
      }
    }
  }
}

static void product(const Matrix &w, const float *x, long x_step, float *y, long y_step, long m, bool add = false) {
  products({{&w, y, y_step}}, x, x_step, m, add);
}
