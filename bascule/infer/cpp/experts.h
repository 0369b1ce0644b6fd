// The mixture of experts of model/moe.py for the rows of one step: every expert multiplies the rows that chose it, and no others.
#pragma once
#include <vector>
#include "model.h"

typedef std::vector<float> Room;

static inline float *room(Room &memory, long numbers) {
  if ((long)memory.size() < numbers + LANES) memory.resize(numbers + LANES);
  return memory.data();
}

// x += down(silu(gate(h)) * up(h)) for m rows.
static void feed_forward(const Layer &layer, const float *h, float *x, long hidden, long m) {
  static thread_local Room gates, ups;
  const long size = layer.gate.n;
  float *gate = room(gates, m * size), *up = room(ups, m * size);
  products({{&layer.gate, gate, size}, {&layer.up, up, size}}, h, hidden, m);
  const long numbers = m * size, part = 1 << 12;
#pragma omp parallel for schedule(static) if (numbers > WORTH_THREADS)
  for (long at = 0; at < numbers; at += part) swiglu(gate + at, up + at, numbers - at < part ? numbers - at : part);
  product(layer.down, gate, size, x, hidden, m, true);
}

// NaN counts as largest, so that a spoiled router is seen in the logits.
static long largest(const float *values, long count) {
  long best = 0;
  for (long i = 1; i < count; i++)
    if (values[i] > values[best] || (std::isnan(values[i]) && !std::isnan(values[best]))) best = i;
  return best;
}

// Keep the groups whose best two experts sum highest; the others' experts become -inf.
static void keep_groups(const Experts &experts, float *biased) {
  const long size = experts.count / experts.groups;
  float strength[experts.groups];
  for (long g = 0; g < experts.groups; g++) {
    float *group = biased + g * size;
    const long best = largest(group, size);
    float second = size > 1 ? -INFINITY : 0;
    for (long i = 0; i < size; i++)
      if (i != best && group[i] > second) second = group[i];
    strength[g] = group[best] + second;
  }
  bool kept[experts.groups];
  for (long g = 0; g < experts.groups; g++) kept[g] = false;
  for (long n = 0; n < experts.kept_groups; n++) {
    const long g = largest(strength, experts.groups);
    kept[g] = true;
    strength[g] = -INFINITY;
  }
  for (long i = 0; i < experts.count; i++)
    if (!kept[i / size]) biased[i] = -INFINITY;
}

// `scores` of one row, before the sigmoid, become the weights of its chosen experts, 0 for the others.
static void route(const Experts &experts, float *scores) {
  float biased[experts.count], weights[experts.count];
  for (long e = 0; e < experts.count; e++) {
    scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    biased[e] = scores[e] + experts.bias[e];
    weights[e] = 0;
  }
  if (experts.groups > 1) keep_groups(experts, biased);
  float sum = experts.normalise ? 1e-20f : 1.0f;
  for (long n = 0; n < experts.chosen; n++) {
    const long e = largest(biased, experts.count);
    biased[e] = -INFINITY;
    weights[e] = scores[e];
    if (experts.normalise) sum += scores[e];
  }
  for (long e = 0; e < experts.count; e++) scores[e] = weights[e] / sum * experts.scaling;
}

static long panels_size(long n, long k) { return (n + width<float> - 1) / width<float> * width<float> * k; }

// x += the chosen experts of h, for m rows.
static void mixture(const Experts &experts, const float *h, float *x, long hidden, long m) {
  static thread_local Room routes, inputs, gates, outputs;
  const long count = experts.count, size = experts.size;
  float *weights = room(routes, m * count);
  product(experts.router, h, hidden, weights, count, m);
  for (long row = 0; row < m; row++) route(experts, weights + row * count);
  float *in = room(inputs, m * hidden), *gate = room(gates, 2 * m * size), *out = room(outputs, m * hidden);
  std::vector<long> rows;
  for (long e = 0; e < count; e++) {
    rows.clear();
    for (long row = 0; row < m; row++)
      if (!(weights[row * count + e] == 0)) rows.push_back(row);  // NaN chooses too, and is seen in the logits
    const long n = (long)rows.size();
    for (long i = 0; i < n; i++) std::memcpy(in + i * hidden, h + rows[i] * hidden, hidden * sizeof(float));
    const float *up = experts.up + e * panels_size(2 * size, hidden), *down = experts.down + e * panels_size(hidden, size);
    product({up, nullptr, nullptr, 2 * size, hidden}, in, hidden, gate, 2 * size, n);
    for (long i = 0; i < n; i++) swiglu(gate + i * 2 * size, gate + i * 2 * size + size, size);
    product({down, nullptr, nullptr, hidden, size}, gate, 2 * size, out, hidden, n);
    for (long i = 0; i < n; i++)
      for (long d = 0; d < hidden; d++) x[rows[i] * hidden + d] += weights[rows[i] * count + e] * out[i * hidden + d];
  }
}
