// What the decoder is told about a model: mirrored field by field in bascule/infer/decoder.py. Null pointers mean "this model has none".
#pragma once
#include "products.h"

struct Experts {
  Matrix router;
  const float *bias;           // steers the choice alone
  const float *up, *down;      // panels of all experts one after the other: [experts][2 * size, hidden], [experts][hidden, size]
  long count, size, chosen, groups, kept_groups, normalise;
  float scaling;
};

struct Layer {
  const float *norm, *ffn_norm;  // gains
  const float *q_gain, *k_gain;  // grouped queries: of each head; latent: of the low-rank query and of the latent
  Matrix q_low, q, k, v, o;      // latent: `k` makes latent and shared key together
  Matrix key, value;             // latent: the halves of kv_b, head after head, each like this one
  Matrix gate, up, down;         // the feed-forward, or the shared experts
  Experts experts;
  float *keys, *values;          // this layer's pages [heads][blocks][BLOCK][width]
};

struct Model {
  const Layer *layers;
  long count;
  const float *embedding, *norm;
  Matrix head;
  const float *next_norm, *hidden_norm;  // of a prediction layer: gains of the embedding and of the hidden state
  Matrix pair;
  const float *cos, *sin;  // [positions][rope]
  long hidden, heads, kv_heads, key, value, rope, neighbours, latent, nope, v_head, blocks;
  float eps, scale;
};
