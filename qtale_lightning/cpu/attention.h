// Attention of one new token a sequence, as in decoding: its query attends to itself and to all that the cache keeps of
// its sequence, which its key and value then join. Sequences differ in what they keep; no mask is made and no key moved.

#pragma once

#include "dense.h"

namespace qtale {

constexpr int64_t WIDEST = 256;  // width of a head

constexpr int64_t BLOCK = 256;  // values that stay in a near cache while all heads that share them read them

// Products of `shared` queries (shared, width) and `length` keys, to (shared, of_head).
template <typename T>
inline void score(const DenseInput<T>* queries, int64_t shared, const T* keys, int64_t length, int64_t width, int64_t of_head,
                  float* scores) {
  const int64_t whole = length / LANES * LANES;
  if (whole > 0) dense_linear<T>(keys, nullptr, queries, shared, width, of_head, 0, whole, scores);
  for (int64_t j = whole; j < length; j++)
    for (int64_t h = 0; h < shared; h++) {
      Lanes partial;
      dense_rows<1, 1>(keys + j * width, queries + h * width, width, &partial);
      scores[h * of_head + j] = sum(partial);
    }
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

// Adds `vectors` times sixteen columns of the values' weighted sums, of `heads` heads with weights (heads, of_head).
template <int heads, int vectors, typename T>
inline void add(const float* weights, int64_t of_head, const T* values, int64_t length, int64_t width, float* sums) {
  Lanes total[heads][vectors];
  for (int h = 0; h < heads; h++)
    for (int v = 0; v < vectors; v++) total[h][v] = load(sums + h * width + v * LANES);
  for (int64_t j = 0; j < length; j++) {
    Lanes value[vectors];
    for (int v = 0; v < vectors; v++) value[v] = load(values + j * width + v * LANES);
    for (int h = 0; h < heads; h++) {
      const Lanes weight = all(weights[h * of_head + j]);
      for (int v = 0; v < vectors; v++) total[h][v] = fma(weight, value[v], total[h][v]);
    }
  }
  for (int h = 0; h < heads; h++)
    for (int v = 0; v < vectors; v++) store(sums + h * width + v * LANES, total[h][v]);
}

// Adds the values' weighted sums of `shared` heads to (shared, width); what is widened of a value is used by several.
template <typename T>
inline void mix(const float* weights, int64_t shared, int64_t of_head, const T* values, int64_t length, int64_t width,
                float* sums) {
  constexpr int some = 4, vectors = LANES_HELD >= 32 ? 4 : 1;  // heads and sixteens at a time, whose sums fit the registers
  const auto heads = [&]<int count>(std::integral_constant<int, count>, int64_t h) {
    int64_t i = 0;
    for (; i + vectors * LANES <= width; i += vectors * LANES)
      add<count, vectors>(weights + h * of_head, of_head, values + i, length, width, sums + h * width + i);
    for (; i < width; i += LANES) add<count, 1>(weights + h * of_head, of_head, values + i, length, width, sums + h * width + i);
  };
  for (int64_t h = 0; h < shared; h += some)
    [&]<int... n>(std::integer_sequence<int, n...>) {
      const int64_t count = std::min<int64_t>(some, shared - h);
      ((count == n + 1 ? heads(std::integral_constant<int, n + 1>(), h) : void()), ...);
    }(std::make_integer_sequence<int, some>());
}

// Numbers that `attend_next` works in, of so many heads that share a key head and tokens that are kept, the new one too.
constexpr int64_t attention_room(int64_t shared, int64_t width, int64_t length) {
  return shared * (length + LANES + 2 * width + 1);
}

// The new token's `shared` query heads (shared, width) that share a key head, or some of them, its key and value (width),
// and the `kept` keys and values (kept, width) of this head before; y is (shared, width). Works in `room`.
template <typename T>
inline void attend_next(const T* query, const T* key, const T* value, const T* keys, const T* values, int64_t kept,
                        int64_t shared, int64_t width, float scaling, float* room, T* y) {
  const int64_t length = kept + 1, of_head = length + LANES;
  float *scores = room, *wide = scores + shared * of_head, *sums = wide + shared * width, *totals = sums + shared * width;
  const DenseInput<T>* queries;
  if constexpr (std::is_same_v<DenseInput<T>, T>) queries = query;
  else queries = wide;
  for (int64_t i = 0; i < shared * width; i += LANES) {
    if constexpr (!std::is_same_v<DenseInput<T>, T>) store(wide + i, load(query + i));
    store(sums + i, all(0));
  }
  score(queries, shared, keys, kept, width, of_head, scores);
  score(queries, shared, key, 1, width, of_head, scores + kept);
  for (int64_t h = 0; h < shared; h++) totals[h] = exponentials(scores + h * of_head, length, scaling);
  for (int64_t j = 0; j < kept; j += BLOCK)
    mix(scores + j, shared, of_head, values + j * width, std::min(BLOCK, kept - j), width, sums);
  mix(scores + kept, shared, of_head, value, 1, width, sums);
  for (int64_t i = 0; i < shared * width; i += LANES) store(y + i, load(sums + i) * all(1 / totals[i / width]));
}

// Writes a new token's key or value (width) behind the `kept` ones of its head's buffer.
template <typename T>
inline void append(const T* from, int64_t width, int64_t kept, T* buffer) {
  std::copy_n(from, width, buffer + kept * width);
}

}  // namespace qtale
