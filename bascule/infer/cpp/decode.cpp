// One decoding step of a whole model for all rows of a batch: a call instead of thousands (docs/serve.md). Compiled when an engine starts.
//
// Every row is worked out alone (products.h, attention.h), so its bits depend neither on the other rows nor on the number of threads.
#include "attention.h"
#include "experts.h"

struct Rows {
  const int64_t *tables;  // [count][blocks]: where each row's tokens lie
  const int64_t *read;    // [count]: tokens before this one, which is also its position
  long count, blocks, first;  // `first`: the slot of a row's first token
  Span span(long row) const { return {tables + row * blocks, first, first + read[row] + 1}; }
  long place(long row) const {
    const long slot = first + read[row];
    return tables[row * blocks + slot / BLOCK] * BLOCK + slot % BLOCK;
  }
};

struct Rooms {
  Room h, q, k, v, out, low, wide, x;
};

static void norms(const float *x, long x_step, const float *gain, float eps, float *y, long y_step, long n, long m) {
#pragma omp parallel for schedule(static) if (m * n > WORTH_THREADS)
  for (long row = 0; row < m; row++) rms_norm(x + row * x_step, gain, eps, y + row * y_step, n);
}

static void turn(const Model &model, long position, float *x) {
  const float *cos = model.cos + position * model.rope, *sin = model.sin + position * model.rope;
  const long half = model.rope / 2, apart = model.neighbours ? 1 : half, step = model.neighbours ? 2 : 1;
  for (long i = 0; i < half; i++) {
    const long at = i * step;
    const float a = x[at], b = x[at + apart];
    x[at] = a * cos[at] + b * sin[at];
    x[at + apart] = b * cos[at + apart] + a * sin[at + apart];
  }
}

static void look_back(const Model &model, const Layer &layer, const Rows &rows, const float *q, float *out) {
  const long group = model.heads / model.kv_heads, each = model.blocks * BLOCK * model.key, pairs = rows.count * model.kv_heads;
#pragma omp parallel for schedule(dynamic) if (pairs > 1)
  for (long pair = 0; pair < pairs; pair++) {
    const long row = pair / model.kv_heads, k = pair % model.kv_heads, first = row * model.heads + k * group;
    const Head head{layer.keys + k * each, layer.values + k * each, model.key, model.value, model.key};
    attend(q + first * model.key, group, head, rows.span(row), out + first * model.value);
  }
}

// Queries, keys and values of grouped attention: normed and turned, the latter two written to the pages.
static float *grouped(const Model &model, const Layer &layer, const Rows &rows, const float *h, Rooms &rooms) {
  const long size = model.key, wide = model.heads * size, narrow = model.kv_heads * size, each = model.blocks * BLOCK * size;
  float *q = room(rooms.q, rows.count * wide), *k = room(rooms.k, rows.count * narrow), *v = room(rooms.v, rows.count * narrow);
  products({{&layer.q, q, wide}, {&layer.k, k, narrow}, {&layer.v, v, narrow}}, h, model.hidden, rows.count);
  for (long row = 0; row < rows.count; row++) {
    for (long head = 0; head < model.heads; head++) {
      float *one = q + row * wide + head * size;
      if (layer.q_gain) rms_norm(one, layer.q_gain, model.eps, one, size);
      turn(model, rows.read[row], one);
      for (long e = 0; e < size; e++) one[e] *= model.scale;
    }
    for (long head = 0; head < model.kv_heads; head++) {
      float *one = k + row * narrow + head * size;
      if (layer.k_gain) rms_norm(one, layer.k_gain, model.eps, one, size);
      turn(model, rows.read[row], one);
      const long at = head * each + rows.place(row) * size;
      std::memcpy(layer.keys + at, one, size * sizeof(float));
      std::memcpy(layer.values + at, v + row * narrow + head * size, size * sizeof(float));
    }
  }
  return q;
}

// The same of latent attention: queries folded into the latent's space (absorbed), latent and shared key written to the pages.
static float *latent(const Model &model, const Layer &layer, const Rows &rows, const float *h, Rooms &rooms) {
  const long m = rows.count, heads = model.heads, part = model.nope + model.rope, each = model.key, wide = heads * each;
  const float eps = 1e-6f;  // of the inner norms, whatever the model's own: model/attention.py
  float *plain = room(rooms.wide, m * heads * part), *q = room(rooms.q, m * wide), *k = room(rooms.k, m * each);
  const Product shared{&layer.k, k, each};
  if (layer.q_low.w) {
    const long size = layer.q_low.n;
    float *low = room(rooms.low, m * size);
    products({{&layer.q_low, low, size}, shared}, h, model.hidden, m);
    norms(low, size, layer.q_gain, eps, low, size, size, m);
    product(layer.q, low, size, plain, heads * part, m);
  } else {
    products({{&layer.q, plain, heads * part}, shared}, h, model.hidden, m);
  }
  for (long head = 0; head < heads; head++) {
    Matrix key = layer.key;
    key.w = (const float *)key.w + head * panels_size(key.n, key.k);
    product(key, plain + head * part, heads * part, q + head * each, wide, m);
  }
  for (long row = 0; row < m; row++) {
    for (long head = 0; head < heads; head++) {
      float *one = q + row * wide + head * each;
      std::memcpy(one + model.value, plain + (row * heads + head) * part + model.nope, model.rope * sizeof(float));
      turn(model, rows.read[row], one + model.value);
      for (long e = 0; e < each; e++) one[e] *= model.scale;
    }
    float *one = k + row * each;
    rms_norm(one, layer.k_gain, eps, one, model.value);
    turn(model, rows.read[row], one + model.value);
    std::memcpy(layer.keys + rows.place(row) * each, one, each * sizeof(float));
  }
  return q;
}

// x += the layer's attention.
static void attention(const Model &model, const Layer &layer, const Rows &rows, const float *h, float *x, Rooms &rooms) {
  const long m = rows.count, heads = model.heads, values = heads * model.value;
  const float *q = model.latent ? latent(model, layer, rows, h, rooms) : grouped(model, layer, rows, h, rooms);
  float *out = room(rooms.out, m * values);
  look_back(model, layer, rows, q, out);
  if (model.latent) {
    float *wide = room(rooms.wide, m * heads * model.v_head);
    for (long head = 0; head < heads; head++) {
      Matrix value = layer.value;
      value.w = (const float *)value.w + head * panels_size(value.n, value.k);
      product(value, out + head * model.value, values, wide + head * model.v_head, heads * model.v_head, m);
    }
    out = wide;
  }
  product(layer.o, out, layer.o.k, x, model.hidden, m, true);
}

static void run(const Model &model, const Rows &rows, float *x, Rooms &rooms) {
  float *h = room(rooms.h, rows.count * model.hidden);
  for (long number = 0; number < model.count; number++) {
    const Layer &layer = model.layers[number];
    norms(x, model.hidden, layer.norm, model.eps, h, model.hidden, model.hidden, rows.count);
    attention(model, layer, rows, h, x, rooms);
    norms(x, model.hidden, layer.ffn_norm, model.eps, h, model.hidden, model.hidden, rows.count);
    if (layer.gate.w) feed_forward(layer, h, x, model.hidden, rows.count);
    if (layer.experts.count) mixture(layer.experts, h, x, model.hidden, rows.count);
  }
}

// Append `tokens` to the rows. `before`: null, or the hidden states that a prediction layer pairs with the tokens. `hidden` [count][hidden]:
// what the head reads.
extern "C" void decode(const Model *model, const int64_t *tokens, const float *before, const int64_t *tables, const int64_t *read, long count, long blocks, long first, float *hidden) {
  static thread_local Rooms rooms;
  const Rows rows{tables, read, count, blocks, first};
  const long size = model->hidden;
  float *x = room(rooms.x, count * size);
  for (long row = 0; row < count; row++) std::memcpy(x + row * size, model->embedding + tokens[row] * size, size * sizeof(float));
  if (before) {
    float *both = room(rooms.wide, 2 * count * size);
    norms(x, size, model->next_norm, model->eps, both, 2 * size, size, count);
    norms(before, size, model->hidden_norm, model->eps, both + size, 2 * size, size, count);
    product(model->pair, both, 2 * size, x, size, count);
  }
  run(*model, rows, x, rooms);
  norms(x, size, model->norm, model->eps, hidden, size, size, count);
}

// y = x w^T + bias for m rows next to each other.
extern "C" void multiply(const Matrix *w, const float *x, float *y, long m) { product(*w, x, w->k, y, w->n, m); }

extern "C" long panel_width(long bytes) { return bytes == 1 ? width<int8_t> : width<float>; }
