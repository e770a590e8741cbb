// Attention of one new token a sequence, as in decoding: its key and value join the cache, and its query attends to all
// that the cache keeps of its sequence. Sequences differ in what they keep; no mask is made and no key moved.

#pragma once

#include "lanes.h"

namespace qtale {

constexpr int64_t WIDEST = 256;  // width of a head

constexpr int64_t BLOCK = 256;  // keys or values that stay in a near cache while all heads that share them read them

// Products of a query and `length` keys.
template <typename T>
inline void score(const float* query, const T* keys, int64_t length, int64_t width, float* scores) {
  constexpr int64_t some = 4;  // keys at a time
  int64_t j = 0;
  for (; j + some <= length; j += some) products<some>(keys + j * width, query, width, scores + j);
  for (; j < length; j++) products<1>(keys + j * width, query, width, scores + j);
}

// In place exp(scaling · (score - largest)), and the sum of that; what is behind the scores, up to sixteen, becomes 0.
inline float exponentials(float* scores, int64_t length, float scaling) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  for (int64_t j = length; j % LANES != 0; j++) scores[j] = lowest;
  Lanes most = all(lowest), total = all(0);
  for (int64_t j = 0; j < length; j += LANES) most = max(load(scores + j), most);
  most = all(largest(most));
  for (int64_t j = 0; j < length; j += LANES) {
    const Lanes power = exp((load(scores + j) - most) * all(scaling));
    store(scores + j, power);
    total = total + power;
  }
  return sum(total);
}

// Adds `vectors` times sixteen columns of the values' weighted sum.
template <int vectors, typename T>
inline void add(const float* weights, const T* values, int64_t length, int64_t width, float* sums) {
  Lanes total[vectors];
  for (int v = 0; v < vectors; v++) total[v] = load(sums + v * LANES);
  for (int64_t j = 0; j < length; j++) {
    const Lanes weight = all(weights[j]);
    for (int v = 0; v < vectors; v++) total[v] = fma(weight, load(values + j * width + v * LANES), total[v]);
  }
  for (int v = 0; v < vectors; v++) store(sums + v * LANES, total[v]);
}

template <typename T>
inline void mix(const float* weights, const T* values, int64_t length, int64_t width, float* sums) {
  constexpr int some = 4;  // vectors at a time
  int64_t i = 0;
  for (; i + some * LANES <= width; i += some * LANES) add<some>(weights, values + i, length, width, sums + i);
  for (; i < width; i += LANES) add<1>(weights, values + i, length, width, sums + i);
}

// Numbers that `attend_next` works in, of so many heads that share a key head and tokens that are kept, the new one too.
constexpr int64_t attention_room(int64_t shared, int64_t width, int64_t length) {
  return shared * (length + LANES + 2 * width + 1);
}

// The new token's `shared` query heads (shared, width) that share a key head, its key and value (width), and the
// buffers keys and values (capacity, width) of this head, which keep `kept` tokens: the new ones are written behind
// these, and y is (shared, width). Works in `room`.
template <typename T>
inline void attend_next(const T* query, const T* key, const T* value, T* keys, T* values, int64_t kept, int64_t shared,
                        int64_t width, float scaling, float* room, T* y) {
  const int64_t length = kept + 1, of_head = length + LANES;
  float *scores = room, *wide = scores + shared * of_head, *sums = wide + shared * width, *totals = sums + shared * width;
  std::copy_n(key, width, keys + kept * width);
  std::copy_n(value, width, values + kept * width);
  for (int64_t i = 0; i < shared * width; i += LANES) {
    store(wide + i, load(query + i));
    store(sums + i, all(0));
  }
  for (int64_t j = 0; j < length; j += BLOCK)
    for (int64_t h = 0; h < shared; h++)
      score(wide + h * width, keys + j * width, std::min(BLOCK, length - j), width, scores + h * of_head + j);
  for (int64_t h = 0; h < shared; h++) totals[h] = exponentials(scores + h * of_head, length, scaling);
  for (int64_t j = 0; j < length; j += BLOCK)
    for (int64_t h = 0; h < shared; h++)
      mix(scores + h * of_head + j, values + j * width, std::min(BLOCK, length - j), width, sums + h * width);
  for (int64_t i = 0; i < shared * width; i += LANES) store(y + i, load(sums + i) * all(1 / totals[i / width]));
}

}  // namespace qtale
