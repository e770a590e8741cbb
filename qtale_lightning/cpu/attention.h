// Attention of one new token a sequence, as in decoding: its key and value join the cache, and its query attends to all
// that the cache keeps of its sequence. Sequences differ in what they keep; no mask is made and no key moved.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

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
  for (int64_t j = length; j % LANES != 0; j++) scores[j] = -std::numeric_limits<float>::infinity();
  __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < length; j += LANES) largest = _mm512_max_ps(load(scores + j), largest);
  largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < length; j += LANES) {
    const __m512 below = _mm512_mul_ps(_mm512_sub_ps(load(scores + j), largest), _mm512_set1_ps(scaling));
    const __m512 power = at::vec::Vectorized<float>(below).exp();
    store(scores + j, power);
    sum = _mm512_add_ps(sum, power);
  }
  return _mm512_reduce_add_ps(sum);
}

// Adds `vectors` times sixteen columns of the values' weighted sum.
template <int vectors, typename T>
inline void add(const float* weights, const T* values, int64_t length, int64_t width, float* sums) {
  __m512 sum[vectors];
  for (int v = 0; v < vectors; v++) sum[v] = load(sums + v * LANES);
  for (int64_t j = 0; j < length; j++) {
    const __m512 weight = _mm512_set1_ps(weights[j]);
    for (int v = 0; v < vectors; v++) sum[v] = _mm512_fmadd_ps(weight, load(values + j * width + v * LANES), sum[v]);
  }
  for (int v = 0; v < vectors; v++) store(sums + v * LANES, sum[v]);
}

template <typename T>
inline void mix(const float* weights, const T* values, int64_t length, int64_t width, float* sums) {
  constexpr int some = 4;  // vectors at a time
  int64_t i = 0;
  for (; i + some * LANES <= width; i += some * LANES) add<some>(weights, values + i, length, width, sums + i);
  for (; i < width; i += LANES) add<1>(weights, values + i, length, width, sums + i);
}

// query (…, H, d), key and value (…, G, d): tokens of the sequences `rows`, one each, which keep `lengths` tokens in the
// buffers keys and values (B, G, capacity, d); the new ones are written behind these. Tokens behind those of sequences
// repeat the last of them. Returns (…, H, d).
inline at::Tensor attend_next(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              at::Tensor& keys, at::Tensor& values, at::IntArrayRef rows, at::IntArrayRef lengths,
                              double scaling) {
  const int64_t heads = query.size(-2), width = query.size(-1), groups = key.size(-2), count = rows.size();
  const int64_t shared = heads / groups;  // query heads of a key head
  const int64_t tokens = query.numel() / (heads * width), capacity = keys.size(2);
  TORCH_CHECK(query.is_contiguous() && key.is_contiguous() && value.is_contiguous() && keys.is_contiguous() &&
                  values.is_contiguous() && width % LANES == 0 && width <= WIDEST,
              "attend_next takes contiguous heads of a multiple of ", LANES, ", at most ", WIDEST);
  TORCH_CHECK(0 < count && count <= tokens && key.numel() == tokens * groups * width && value.sizes() == key.sizes() &&
                  lengths.size() == rows.size() && scaling > 0,
              "attend_next takes a query, a key and a value for each of the sequences");
  for (int64_t n = 0; n < count; n++)
    TORCH_CHECK(0 <= lengths[n] && lengths[n] < capacity && 0 <= rows[n] && rows[n] < keys.size(0),
                "attend_next: the cache has no room");
  at::Tensor output = at::empty_like(query);
  int64_t longest = 0;
  for (int64_t length : lengths) longest = std::max(longest, length + 1);
  dispatch(query, [&](auto type) {
    using T = decltype(type);
    const T *queries = query.const_data_ptr<T>(), *new_key = key.const_data_ptr<T>(),
            *new_value = value.const_data_ptr<T>();
    T *all_keys = keys.mutable_data_ptr<T>(), *all_values = values.mutable_data_ptr<T>(),
      *out = output.mutable_data_ptr<T>();
    at::parallel_for(0, count * groups, grain(longest * width), [&](int64_t begin, int64_t end) {
      const int64_t room = longest + LANES;
      std::vector<float> scores(shared * room), wide(shared * width), sums(shared * width), totals(shared);
      for (int64_t item = begin; item < end; item++) {
        const int64_t n = item / groups, group = item % groups, length = lengths[n] + 1;
        const int64_t first = (n * heads + group * shared) * width;  // of the heads that share these keys
        T* kept_keys = all_keys + (rows[n] * groups + group) * capacity * width;
        T* kept_values = all_values + (rows[n] * groups + group) * capacity * width;
        std::copy_n(new_key + item * width, width, kept_keys + lengths[n] * width);
        std::copy_n(new_value + item * width, width, kept_values + lengths[n] * width);
        for (int64_t i = 0; i < shared * width; i += LANES) {
          store(wide.data() + i, load(queries + first + i));
          store(sums.data() + i, _mm512_setzero_ps());
        }
        for (int64_t j = 0; j < length; j += BLOCK)
          for (int64_t h = 0; h < shared; h++)
            score(wide.data() + h * width, kept_keys + j * width, std::min(BLOCK, length - j), width,
                  scores.data() + h * room + j);
        for (int64_t h = 0; h < shared; h++)
          totals[h] = exponentials(scores.data() + h * room, length, static_cast<float>(scaling));
        for (int64_t j = 0; j < length; j += BLOCK)
          for (int64_t h = 0; h < shared; h++)
            mix(scores.data() + h * room + j, kept_values + j * width, std::min(BLOCK, length - j), width,
                sums.data() + h * width);
        for (int64_t i = 0; i < shared * width; i += LANES)
          store(out + first + i, _mm512_mul_ps(load(sums.data() + i), _mm512_set1_ps(1 / totals[i / width])));
      }
    });
    for (int64_t token = count; token < tokens; token++)
      std::copy_n(out + (count - 1) * heads * width, heads * width, out + token * heads * width);
  });
  return output;
}

}  // namespace qtale
