// One token's attention to its row's cached tokens, where they lie in the pages: nothing is gathered, no key head is repeated.
//
// Grouped queries and absorbed latent attention (one key head whose first numbers are the values) are the same sums. A row's bits depend on
// its own tokens alone.
#pragma once
#include <vector>
#include "vectors.h"

constexpr long BLOCK = 16;  // tokens: model/pages.py

// One layer's pages of one key head: [blocks][BLOCK][width]. `values` may be `keys` again.
struct Head {
  const float *keys, *values;
  long key, value, value_step;  // numbers a token; numbers from token to token
};

// Where a row's tokens lie: slots `first` to `end` of the blocks in its table.
struct Span {
  const int64_t *table;
  long first, end;
};

static inline void prefetch(const float *from, long bytes) {
  for (long at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + at, 0, 2);
}

static inline void sums_of_four(const eight *v, float *y) {
#ifdef __AVX__
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]), _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (long t = 0; t < 4; t++) y[t] = ((v[t][0] + v[t][1]) + (v[t][2] + v[t][3])) + ((v[t][4] + v[t][5]) + (v[t][6] + v[t][7]));
#endif
}

// Scores of G queries with four neighbouring tokens.
template <int G>
static inline void dots(const float *q, const float *keys, long key, float *scores, long step) {
  eight sum[G][4] = {};
  long e = 0;
  for (; e + 8 <= key; e += 8)
    for (long t = 0; t < 4; t++) {
      const eight k = *(const eight *)(keys + t * key + e);
      for (int g = 0; g < G; g++) sum[g][t] += k * *(const eight *)(q + g * key + e);
    }
  for (int g = 0; g < G; g++) {
    sums_of_four(sum[g], scores + g * step);
    for (long t = 0; t < 4; t++)
      for (long rest = e; rest < key; rest++) scores[g * step + t] += q[g * key + rest] * keys[t * key + rest];
  }
}

// out[g] += weights[g][t] * values[t] over some tokens, V vectors of it at a time.
template <int G, int V>
static inline void mix(const float *weights, long step, const float *values, long value_step, long tokens, float *out, long out_step) {
  eight sum[G][V];
  for (int g = 0; g < G; g++)
    for (int v = 0; v < V; v++) sum[g][v] = *(eight *)(out + g * out_step + 8 * v);
  for (long t = 0; t < tokens; t++)
    for (int v = 0; v < V; v++) {
      const eight value = *(const eight *)(values + t * value_step + 8 * v);
      for (int g = 0; g < G; g++) sum[g][v] += value * weights[g * step + t];
    }
  for (int g = 0; g < G; g++)
    for (int v = 0; v < V; v++) *(eight *)(out + g * out_step + 8 * v) = sum[g][v];
}

template <int G>
static inline void mix_all(const float *weights, long step, const Head &head, const float *values, long tokens, float *out) {
  constexpr int V = G > 2 ? 2 : 4;
  long e = 0;
  for (; e + 8 * V <= head.value; e += 8 * V) mix<G, V>(weights, step, values + e, head.value_step, tokens, out + e, head.value);
  for (; e + 8 <= head.value; e += 8) mix<G, 1>(weights, step, values + e, head.value_step, tokens, out + e, head.value);
  for (; e < head.value; e++)
    for (int g = 0; g < G; g++)
      for (long t = 0; t < tokens; t++) out[g * head.value + e] += weights[g * step + t] * values[t * head.value_step + e];
}

// In place: e^(score - largest), for `count` numbers; the rest up to a whole vector is spoiled. Returns one over their sum.
static inline float soften(float *scores, long count) {
  const long whole = (count + LANES - 1) / LANES * LANES;
  for (long i = count; i < whole; i++) scores[i] = -INFINITY;
  vec most = load(scores);
  for (long i = LANES; i < whole; i += LANES) most = most > load(scores + i) ? most : load(scores + i);
  float largest = most[0];
  for (long i = 1; i < LANES; i++) largest = largest > most[i] ? largest : most[i];
  vec sum = {};
  for (long i = 0; i < whole; i += LANES) {
    const vec weight = exponential(load(scores + i) - largest);
    store(scores + i, weight);
    sum += weight;
  }
  return 1.0f / total(sum);
}

template <int G>
static void attend_group(const float *q, const Head &head, const Span &span, float *out) {
  static thread_local std::vector<float> room;
  const long start = span.first / BLOCK, stop = (span.end + BLOCK - 1) / BLOCK, step = (stop - start) * BLOCK + LANES;
  if ((long)room.size() < G * step) room.resize(G * step);
  float *scores = room.data(), scale[G];
  for (long block = start; block < stop; block++) {
    const float *keys = head.keys + span.table[block] * BLOCK * head.key;
    const float *next = head.keys + span.table[block + 1 < stop ? block + 1 : block] * BLOCK * head.key;
    for (long t = 0; t < BLOCK && block * BLOCK + t < span.end; t += 4) {
      prefetch(next + t * head.key, 16 * head.key);
      dots<G>(q, keys + t * head.key, head.key, scores + (block - start) * BLOCK + t, step);
    }
  }
  const long skip = span.first - start * BLOCK;
  for (int g = 0; g < G; g++) scale[g] = soften(scores + g * step + skip, span.end - span.first);
  for (long i = 0; i < G * head.value; i++) out[i] = 0;
  for (long block = start; block < stop; block++) {
    const long from = block == start ? skip : 0, until = span.end - block * BLOCK < BLOCK ? span.end - block * BLOCK : BLOCK;
    const float *values = head.values + (span.table[block] * BLOCK + from) * head.value_step;
    prefetch(head.values + span.table[block + 1 < stop ? block + 1 : block] * BLOCK * head.value_step, 4 * BLOCK * head.value_step);
    mix_all<G>(scores + (block - start) * BLOCK + from, step, head, values, until - from, out);
  }
  for (int g = 0; g < G; g++)
    for (long e = 0; e < head.value; e++) out[g * head.value + e] *= scale[g];
}

// `group` queries [group][key], already scaled, of one key head; their means of the values to out [group][value].
static void attend(const float *q, long group, const Head &head, const Span &span, float *out) {
  for (; group >= 4; group -= 4, q += 4 * head.key, out += 4 * head.value) attend_group<4>(q, head, span, out);
  switch (group) {
    case 3: return attend_group<3>(q, head, span, out);
    case 2: return attend_group<2>(q, head, span, out);
    case 1: return attend_group<1>(q, head, span, out);
  }
}
