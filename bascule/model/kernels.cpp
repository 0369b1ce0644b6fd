// What lies between the matrix products of a training step, one pass over memory each: forward and backward (kernels.py, fused.py).
//
// Every sum has an order of its own that depends on neither the number of threads nor the other rows of the batch, so runs repeat bit
// for bit. Rows go to threads in fixed strips; sums over rows are made in CHUNKS parts, which are then added in order.
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float lanes __attribute__((vector_size(32), aligned(4), may_alias));
static const long WIDTH = 8, CHUNKS = 32, FEW = 64;  // rows below FEW are not worth waking threads for

// Within 2 units in the last place of exp; 0 below -87.
static inline float exp_(float x) {
  x = x > 88.0f ? 88.0f : x;
  const float low = x < -87.0f ? 0.0f : 1.0f;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = ((bits - 0x4B400000) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale * low;
}

typedef int32_t bits __attribute__((vector_size(32), aligned(4), may_alias));

// For x up to 88: shares of a softmax, whose scores have their largest taken off.
static inline lanes exp_(lanes x) {
  const lanes zero = {};
  const bits alive = !(x < -87.0f);
  x = x < -87.0f ? zero - 87.0f : x;
  const lanes shifted = x * 1.44269504088896341f + 12582912.0f;
  const lanes n = shifted - 12582912.0f;
  const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  lanes p = zero + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p *= (lanes)(((bits)shifted - 0x4B400000 + 127) << 23);
  return (lanes)((bits)p & alive);
}

static inline float sum_of(lanes x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// ---- RMS norm, alone or after the residual's addition (delta != 0: sum = x + delta is written too) ----

extern "C" void rms_norm(const float *x, long sx, const float *delta, float *sum, const float *w, float *y, float *rstd,
                         long rows, long n, double eps) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long r = 0; r < rows; r++) {
    const float *in = x + r * sx;
    float *out = y + r * n;
    if (delta) {
      const float *d = delta + r * n;
      float *s = sum + r * n;
#pragma omp simd
      for (long i = 0; i < n; i++) s[i] = in[i] + d[i];
      in = s;
    }
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < n; i++) squares += in[i] * in[i];
    const float scale = 1.0f / sqrtf(squares / n + (float)eps);
    rstd[r] = scale;
#pragma omp simd
    for (long i = 0; i < n; i++) out[i] = in[i] * scale * w[i];
  }
}

// dx = rstd (w dy) - x rstd^3 / n (w dy . x), plus `dsum` if given; parts [CHUNKS, n] becomes the parts of dw, then dw their sum.
extern "C" void rms_norm_backward(const float *dy, const float *dsum, const float *x, long sx, const float *w, const float *rstd,
                                  float *dx, float *parts, float *dw, long rows, long n) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long c = 0; c < CHUNKS; c++) {
    float *part = parts + c * n;
    memset(part, 0, n * sizeof(float));
    for (long r = rows * c / CHUNKS; r < rows * (c + 1) / CHUNKS; r++) {
      const float *g = dy + r * n, *in = x + r * sx;
      float *out = dx + r * n, dot = 0;
      const float scale = rstd[r];
#pragma omp simd reduction(+ : dot)
      for (long i = 0; i < n; i++) {
        const float gx = g[i] * in[i];
        part[i] += gx * scale;
        dot += gx * w[i];
      }
      const float back = dot * scale * scale * scale / n;
      if (dsum) {
        const float *more = dsum + r * n;
#pragma omp simd
        for (long i = 0; i < n; i++) out[i] = more[i] + g[i] * w[i] * scale - in[i] * back;
      } else {
#pragma omp simd
        for (long i = 0; i < n; i++) out[i] = g[i] * w[i] * scale - in[i] * back;
      }
    }
  }
  memcpy(dw, parts, n * sizeof(float));
  for (long c = 1; c < CHUNKS; c++)
#pragma omp simd
    for (long i = 0; i < n; i++) dw[i] += parts[c * n + i];
}

// ---- SwiGLU: h = silu(gate) up; the strides are those of rows ----

extern "C" void swiglu(const float *gate, long sg, const float *up, long su, float *h, long rows, long n) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long r = 0; r < rows; r++) {
    const float *g = gate + r * sg, *u = up + r * su;
    float *out = h + r * n;
#pragma omp simd
    for (long i = 0; i < n; i++) out[i] = g[i] * sigmoid(g[i]) * u[i];
  }
}

extern "C" void swiglu_backward(const float *dh, const float *gate, long sg, const float *up, long su, float *dgate, long sdg,
                                float *dup, long sdu, long rows, long n) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long r = 0; r < rows; r++) {
    const float *d = dh + r * n, *g = gate + r * sg, *u = up + r * su;
    float *dg = dgate + r * sdg, *du = dup + r * sdu;
#pragma omp simd
    for (long i = 0; i < n; i++) {
      const float s = sigmoid(g[i]), ds = d[i] * s;
      du[i] = ds * g[i];
      dg[i] = ds * u[i] * (1.0f + g[i] * (1.0f - s));
    }
  }
}

// ---- log-probability of one target a row ----

// Backward takes the largest entry off again: with a logsumexp, whose rounding grows with the logits, its rows would not sum to zero.
static inline float largest(const float *x, long n) {
  float top = x[0];
#pragma omp simd reduction(max : top)
  for (long i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
  return top;
}

extern "C" void token_logprobs(const float *x, const int64_t *targets, float *logp, float *sums, long rows, long n) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long r = 0; r < rows; r++) {
    const float *in = x + r * n;
    const float top = largest(in, n);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += exp_(in[i] - top);
    sums[r] = sum;
    logp[r] = (in[targets[r]] - top) - logf(sum);
  }
}

extern "C" void token_logprobs_backward(const float *d, const float *x, const int64_t *targets, const float *sums, float *dx, long rows,
                                        long n) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long r = 0; r < rows; r++) {
    const float *in = x + r * n, g = d[r];
    float *out = dx + r * n;
    if (g == 0.0f) {  // a target that does not count
      memset(out, 0, n * sizeof(float));
      continue;
    }
    const float top = largest(in, n), share = -g / sums[r];
#pragma omp simd
    for (long i = 0; i < n; i++) out[i] = share * exp_(in[i] - top);
    out[targets[r]] += g;
  }
}

// ---- experts: a stable counting sort of the choices, the rows gathered by it, and the weighted sum of what came back ----

extern "C" void expert_order(const int64_t *chosen, int64_t *order, int64_t *place, int64_t *counts, long choices, long experts) {
  memset(counts, 0, experts * sizeof(int64_t));
  for (long i = 0; i < choices; i++) counts[chosen[i]]++;
  int64_t at[experts];
  for (long e = 0, sum = 0; e < experts; sum += counts[e++]) at[e] = sum;
  for (long i = 0; i < choices; i++) {
    place[i] = at[chosen[i]]++;
    order[place[i]] = i;
  }
}

extern "C" void gather_rows(const float *x, const int64_t *order, float *y, long choices, long k, long n) {
#pragma omp parallel for schedule(static) if (choices > FEW)
  for (long m = 0; m < choices; m++) memcpy(y + m * n, x + order[m] / k * n, n * sizeof(float));
}

// dx[order[m]] += dy[m], in the order of m; rows that nobody took become 0.
extern "C" void add_rows(const float *dy, const int64_t *order, float *dx, long choices, long rows, long n) {
  memset(dx, 0, rows * n * sizeof(float));
  for (long m = 0; m < choices; m++) {
    float *out = dx + order[m] * n;
    const float *in = dy + m * n;
#pragma omp simd
    for (long i = 0; i < n; i++) out[i] += in[i];
  }
}

extern "C" void gather_rows_backward(const float *dy, const int64_t *place, float *dx, long rows, long k, long n) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long r = 0; r < rows; r++) {
    float *out = dx + r * n;
    memcpy(out, dy + place[r * k] * n, n * sizeof(float));
    for (long j = 1; j < k; j++) {
      const float *more = dy + place[r * k + j] * n;
#pragma omp simd
      for (long i = 0; i < n; i++) out[i] += more[i];
    }
  }
}

extern "C" void combine(const float *shared, const float *done, const int64_t *place, const float *weights, float *y, long rows, long k,
                        long n) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long r = 0; r < rows; r++) {
    float *out = y + r * n;
    memcpy(out, shared + r * n, n * sizeof(float));
    for (long j = 0; j < k; j++) {
      const float *in = done + place[r * k + j] * n, w = weights[r * k + j];
#pragma omp simd
      for (long i = 0; i < n; i++) out[i] += w * in[i];
    }
  }
}

extern "C" void combine_backward(const float *dy, const float *done, const int64_t *place, const float *weights, float *ddone,
                                 float *dweights, long rows, long k, long n) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long r = 0; r < rows; r++) {
    const float *g = dy + r * n;
    for (long j = 0; j < k; j++) {
      const float *in = done + place[r * k + j] * n, w = weights[r * k + j];
      float *out = ddone + place[r * k + j] * n, dot = 0;
#pragma omp simd reduction(+ : dot)
      for (long i = 0; i < n; i++) {
        out[i] = w * g[i];
        dot += g[i] * in[i];
      }
      dweights[r * k + j] = dot;
    }
  }
}

// ---- rotary: y = x cos + swap(x) sin, the signs in the sine table; `halves` pairs i with i + r/2, else neighbours turn together ----

static inline void turn(const float *x, const float *cos, const float *sin, float *y, long r, bool halves, bool back) {
  const float sign = back ? -1.0f : 1.0f;
  if (halves) {
    const long h = r / 2;
#pragma omp simd
    for (long i = 0; i < h; i++) {
      const float a = x[i], b = x[i + h];
      y[i] = a * cos[i] + sign * sin[i] * b;
      y[i + h] = b * cos[i + h] + sign * sin[i + h] * a;
    }
  } else {
    for (long i = 0; i < r; i += 2) {
      const float a = x[i], b = x[i + 1];
      y[i] = a * cos[i] + sign * sin[i] * b;
      y[i + 1] = b * cos[i + 1] + sign * sin[i + 1] * a;
    }
  }
}

// x [rows, heads, r] with row stride sx; y contiguous; the tables [tokens, r] or, by st != 0, [rows, r].
extern "C" void rotate(const float *x, long sx, const float *cos, const float *sin, long tokens, float *y, long rows, long heads, long r,
                       long halves, long back) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (long t = 0; t < rows; t++)
    for (long h = 0; h < heads; h++)
      turn(x + t * sx + h * r, cos + t % tokens * r, sin + t % tokens * r, y + (t * heads + h) * r, r, halves, back);
}

// MLA's heads. In, by token: q [H (n+r)], kr [r] (row stride sk), kv [H (n+v)]. Out, by head: q and k [B,H,T,n+r], v [B,H,T,v].
extern "C" void latent_heads(const float *q, const float *kr, long sk, const float *kv, const float *cos, const float *sin, long period,
                             float *qh, float *kh, float *vh, long batch, long tokens, long heads, long n, long r, long v) {
  const long e = n + r;
#pragma omp parallel for schedule(static) if (batch * tokens > FEW)
  for (long at = 0; at < batch * tokens; at++) {
    const long b = at / tokens, t = at % tokens;
    const float *c = cos + at % period * r, *s = sin + at % period * r;
    float key[r];
    turn(kr + at * sk, c, s, key, r, false, false);
    for (long h = 0; h < heads; h++) {
      const float *qi = q + (at * heads + h) * e, *ki = kv + (at * heads + h) * (n + v);
      const long place = (b * heads + h) * tokens + t;
      memcpy(qh + place * e, qi, n * sizeof(float));
      turn(qi + n, c, s, qh + place * e + n, r, false, false);
      memcpy(kh + place * e, ki, n * sizeof(float));
      memcpy(kh + place * e + n, key, r * sizeof(float));
      memcpy(vh + place * v, ki + n, v * sizeof(float));
    }
  }
}

extern "C" void latent_heads_backward(const float *dqh, const float *dkh, const float *dvh, const float *cos, const float *sin, long period,
                                      float *dq, float *dkr, float *dkv, long batch, long tokens, long heads, long n, long r, long v) {
  const long e = n + r;
#pragma omp parallel for schedule(static) if (batch * tokens > FEW)
  for (long at = 0; at < batch * tokens; at++) {
    const long b = at / tokens, t = at % tokens;
    const float *c = cos + at % period * r, *s = sin + at % period * r;
    float key[r];
    memset(key, 0, sizeof(key));
    for (long h = 0; h < heads; h++) {
      float *qi = dq + (at * heads + h) * e, *ki = dkv + (at * heads + h) * (n + v);
      const long place = (b * heads + h) * tokens + t;
      memcpy(qi, dqh + place * e, n * sizeof(float));
      turn(dqh + place * e + n, c, s, qi + n, r, false, true);
      memcpy(ki, dkh + place * e, n * sizeof(float));
      for (long i = 0; i < r; i++) key[i] += dkh[place * e + n + i];
      memcpy(ki + n, dvh + place * v, v * sizeof(float));
    }
    turn(key, c, s, dkr + at * r, r, false, true);
  }
}

// ---- causal attention. Small products with their operands in the first cache: C[m][n] (+)= sum_k A(m,k) B[k][n] ----

// Keeps a value in a register: GCC would read it from memory again for every row, and loads are what these loops wait for.
#ifdef __x86_64__
#define HOLD(x) __asm__("" : "+x"(x))
#else
#define HOLD(x)
#endif

template <bool ADD, int R, int C>
static inline void tile(const float *a, long am, long ak, const float *b, long ldb, float *c, long ldc, long k) {
  lanes sum[R][C];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < C; j++) sum[i][j] = ADD ? *(const lanes *)(c + i * ldc + j * WIDTH) : lanes{};
  for (long p = 0; p < k; p++, b += ldb, a += ak) {
    lanes right[C];
    for (int j = 0; j < C; j++) right[j] = *(const lanes *)(b + j * WIDTH);
    for (int j = 0; j < C; j++) HOLD(right[j]);
    for (int i = 0; i < R; i++) {
      const float left = a[i * am];
      for (int j = 0; j < C; j++) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < C; j++) *(lanes *)(c + i * ldc + j * WIDTH) = sum[i][j];
}

// R rows at a time, as many as the sixteen registers hold beside C columns.
template <bool ADD, int R, int C>
static void columns(const float *a, long am, long ak, const float *b, long ldb, float *c, long ldc, long m, long k) {
  for (; m >= R; m -= R, a += R * am, c += R * ldc) tile<ADD, R, C>(a, am, ak, b, ldb, c, ldc, k);
  for (; m >= 2; m -= 2, a += 2 * am, c += 2 * ldc) tile<ADD, 2, C>(a, am, ak, b, ldb, c, ldc, k);
  if (m) tile<ADD, 1, C>(a, am, ak, b, ldb, c, ldc, k);
}

// n a multiple of WIDTH.
template <bool ADD>
static void product(const float *a, long am, long ak, const float *b, long ldb, float *c, long ldc, long m, long n, long k) {
  for (; n >= 3 * WIDTH && n != 4 * WIDTH; n -= 3 * WIDTH, b += 3 * WIDTH, c += 3 * WIDTH)
    columns<ADD, 4, 3>(a, am, ak, b, ldb, c, ldc, m, k);
  for (; n >= 2 * WIDTH; n -= 2 * WIDTH, b += 2 * WIDTH, c += 2 * WIDTH) columns<ADD, 4, 2>(a, am, ak, b, ldb, c, ldc, m, k);
  if (n) columns<ADD, 8, 1>(a, am, ak, b, ldb, c, ldc, m, k);
}

#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

// Eight by eight in registers: pairs, then pairs of pairs, then halves.
static inline void transpose_square(const float *x, long sx, float *y, long ldy) {
  lanes a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = *(const lanes *)(x + i * sx);
  for (int i = 0; i < 8; i += 2) {
    b[i] = PICK(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = PICK(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = PICK(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = PICK(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    *(lanes *)(y + i * ldy) = PICK(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *(lanes *)(y + (i + 4) * ldy) = PICK(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// n a multiple of WIDTH.
static void transpose(const float *x, long sx, float *y, long ldy, long rows, long n) {
  long r = 0;
  for (; r + WIDTH <= rows; r += WIDTH)
    for (long i = 0; i < n; i += WIDTH) transpose_square(x + r * sx + i, sx, y + i * ldy + r, ldy);
  for (; r < rows; r++)
    for (long i = 0; i < n; i++) y[i * ldy + r] = x[r * sx + i];
}

static const long BLOCK = 16;  // queries at a time; keys past the block's last query are not touched

static inline long padded(long x) { return (x + WIDTH - 1) / WIDTH * WIDTH; }

// The first `mine` scores of a row stay; the others of its last lanes become -inf and those after them, up to `seen`, 0. Where the lanes end.
static inline long hide(float *row, long mine, long seen) {
  const long end = padded(mine);
  const bits place = {0, 1, 2, 3, 4, 5, 6, 7};
  lanes *last = (lanes *)(row + end - WIDTH);
  *last = place < (int32_t)(mine - end + WIDTH) ? *last : lanes{} - INFINITY;
  for (long j = end; j < seen; j++) row[j] = 0;
  return end;
}

struct Strides {
  long b, h, t;
};

// q [B,H,T,e], k [B,K,T,e], v [B,K,T,v], last dimension dense, H a multiple of K, e and v multiples of WIDTH.
// out the same by its strides; lse [B,H,T]. scratch: per thread, (e + BLOCK) * padded(T) floats.
extern "C" void attention(const float *q, const float *k, const float *v, float *out, float *lse, float *scratch, const long *strides,
                          long batch, long heads, long kv_heads, long tokens, long e, long size, double scale, long threads) {
  const Strides *s = (const Strides *)strides;
  const long wide = padded(tokens), group = heads / kv_heads, each = (e + BLOCK) * wide, tasks = batch * kv_heads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long worker = 0; worker < threads; worker++) {
    float *kt = scratch + worker * each, *p = kt + e * wide;
    memset(kt, 0, e * wide * sizeof(float));
    for (long task = tasks * worker / threads; task < tasks * (worker + 1) / threads; task++) {
      const long b = task / kv_heads, kh = task % kv_heads;
      const float *keys = k + b * s[1].b + kh * s[1].h, *values = v + b * s[2].b + kh * s[2].h;
      transpose(keys, s[1].t, kt, wide, tokens, e);
      for (long h = kh * group; h < (kh + 1) * group; h++) {
        const float *queries = q + b * s[0].b + h * s[0].h;
        float *to = out + b * s[3].b + h * s[3].h, *sums = lse + (b * heads + h) * tokens;
        for (long t = 0; t < tokens; t += BLOCK) {
          const long rows = tokens - t < BLOCK ? tokens - t : BLOCK, seen = t + rows;
          product<false>(queries + t * s[0].t, s[0].t, 1, kt, wide, p, wide, rows, padded(seen), e);
          for (long r = 0; r < rows; r++) {
            float *row = p + r * wide, top = -INFINITY;
            const long end = hide(row, t + r + 1, seen);
            lanes tops = *(lanes *)row, total = {};
            for (long j = WIDTH; j < end; j += WIDTH) {
              const lanes x = *(lanes *)(row + j);
              tops = x > tops ? x : tops;
            }
            for (int i = 0; i < WIDTH; i++) top = tops[i] > top ? tops[i] : top;
            top *= (float)scale;
            for (long j = 0; j < end; j += WIDTH) total += *(lanes *)(row + j) = exp_(*(lanes *)(row + j) * (float)scale - top);
            const float sum = sum_of(total), share = 1.0f / sum;
            sums[t + r] = top + logf(sum);
            for (long j = 0; j < end; j += WIDTH) *(lanes *)(row + j) *= share;
          }
          product<false>(p, wide, 1, values, s[2].t, to + t * s[3].t, s[3].t, rows, size, seen);
        }
      }
    }
  }
}

// dq, dk, dv dense as [B,H,T,e], [B,K,T,e], [B,K,T,v]. scratch: per thread, (e + size + 2 BLOCK) * padded(T) floats.
extern "C" void attention_backward(const float *dout, const float *q, const float *k, const float *v, const float *out, const float *lse,
                                   float *dq, float *dk, float *dv, float *scratch, const long *strides, long batch, long heads,
                                   long kv_heads, long tokens, long e, long size, double scale, long threads) {
  const Strides *s = (const Strides *)strides;  // of q, k, v, out, dout
  const long wide = padded(tokens), group = heads / kv_heads, each = (e + size + 2 * BLOCK) * wide, tasks = batch * kv_heads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long worker = 0; worker < threads; worker++) {
    float *kt = scratch + worker * each, *vt = kt + e * wide, *p = vt + size * wide, *dp = p + BLOCK * wide;
    memset(kt, 0, (e + size) * wide * sizeof(float));
    for (long task = tasks * worker / threads; task < tasks * (worker + 1) / threads; task++) {
      const long b = task / kv_heads, kh = task % kv_heads;
      const float *keys = k + b * s[1].b + kh * s[1].h, *values = v + b * s[2].b + kh * s[2].h;
      float *dkeys = dk + task * tokens * e, *dvalues = dv + task * tokens * size;
      transpose(keys, s[1].t, kt, wide, tokens, e);
      transpose(values, s[2].t, vt, wide, tokens, size);
      memset(dkeys, 0, tokens * e * sizeof(float));
      memset(dvalues, 0, tokens * size * sizeof(float));
      for (long h = kh * group; h < (kh + 1) * group; h++) {
        const float *queries = q + b * s[0].b + h * s[0].h, *made = out + b * s[3].b + h * s[3].h;
        const float *given = dout + b * s[4].b + h * s[4].h, *sums = lse + (b * heads + h) * tokens;
        float *dqueries = dq + (b * heads + h) * tokens * e;
        for (long t = 0; t < tokens; t += BLOCK) {
          const long rows = tokens - t < BLOCK ? tokens - t : BLOCK, seen = t + rows;
          product<false>(queries + t * s[0].t, s[0].t, 1, kt, wide, p, wide, rows, padded(seen), e);
          product<false>(given + t * s[4].t, s[4].t, 1, vt, wide, dp, wide, rows, padded(seen), size);
          for (long r = 0; r < rows; r++) {
            float *row = p + r * wide, *drow = dp + r * wide;
            const float *g = given + (t + r) * s[4].t, *o = made + (t + r) * s[3].t, norm = sums[t + r];
            const long end = hide(row, t + r + 1, seen);
            lanes along = {};
            for (long i = 0; i < size; i += WIDTH) along += *(const lanes *)(g + i) * *(const lanes *)(o + i);
            const float dot = sum_of(along);
            for (long j = 0; j < end; j += WIDTH) {
              const lanes share = exp_(*(lanes *)(row + j) * (float)scale - norm);
              *(lanes *)(row + j) = share;
              *(lanes *)(drow + j) = share * (*(lanes *)(drow + j) - dot) * (float)scale;
            }
            for (long j = end; j < seen; j++) drow[j] = 0;
          }
          product<false>(dp, wide, 1, keys, s[1].t, dqueries + t * e, e, rows, e, seen);
          product<true>(p, 1, wide, given + t * s[4].t, s[4].t, dvalues, size, seen, size, rows);
          product<true>(dp, 1, wide, queries + t * s[0].t, s[0].t, dkeys, e, seen, e, rows);
        }
      }
    }
  }
}

// ---- AdamW in place; `rate` and `spread` carry the bias corrections, `keep` = 1 - rate * decay ----

extern "C" void adamw(float *p, float *first, float *second, const float *grad, long n, double grad_scale, double beta1, double beta2,
                      double keep, double rate, double correction, double eps) {
  const float gs = grad_scale, b1 = 1.0 - beta1, b2 = beta2, c2 = 1.0 - beta2, kp = keep, r = rate, cor = correction, ep = eps;
#pragma omp parallel for simd schedule(static) if (n > 65536)
  for (long i = 0; i < n; i++) {
    const float g = grad[i] * gs;
    first[i] += b1 * (g - first[i]);
    second[i] = second[i] * b2 + c2 * g * g;
    p[i] = p[i] * kp - r * first[i] / (sqrtf(second[i] * cor) + ep);
  }
}
