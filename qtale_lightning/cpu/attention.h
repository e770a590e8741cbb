// Attention of one new token a sequence, as in decoding: its key and value join the cache, and its query attends to all
// that the cache keeps of its sequence. Sequences differ in what they keep; no mask is made and no key moved.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "lanes.h"

namespace qtale {

constexpr int64_t WIDEST = 256;     // width of a head

template <typename T>
inline float dot(const T* a, const T* b, int64_t width) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += LANES) sum = _mm512_fmadd_ps(load(a + i), load(b + i), sum);
  return _mm512_reduce_add_ps(sum);
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
                  lengths.size() == rows.size(),
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
      std::vector<float> scores(longest);
      alignas(64) float sum[WIDEST];
      for (int64_t item = begin; item < end; item++) {
        const int64_t n = item / groups, group = item % groups, length = lengths[n] + 1;
        T* kept_keys = all_keys + (rows[n] * groups + group) * capacity * width;
        T* kept_values = all_values + (rows[n] * groups + group) * capacity * width;
        std::copy_n(new_key + item * width, width, kept_keys + lengths[n] * width);
        std::copy_n(new_value + item * width, width, kept_values + lengths[n] * width);
        for (int64_t head = n * heads + group * shared; head < n * heads + (group + 1) * shared; head++) {
          float largest = -std::numeric_limits<float>::infinity();
          for (int64_t j = 0; j < length; j++) {
            scores[j] = dot(queries + head * width, kept_keys + j * width, width) * static_cast<float>(scaling);
            largest = std::max(largest, scores[j]);
          }
          float total = 0;
          for (int64_t i = 0; i < width; i += LANES) _mm512_store_ps(sum + i, _mm512_setzero_ps());
          for (int64_t j = 0; j < length; j++) {
            const float weight = std::exp(scores[j] - largest);
            total += weight;
            const __m512 weights = _mm512_set1_ps(weight);
            const T* row = kept_values + j * width;
            for (int64_t i = 0; i < width; i += LANES)
              _mm512_store_ps(sum + i, _mm512_fmadd_ps(weights, load(row + i), _mm512_load_ps(sum + i)));
          }
          const __m512 share = _mm512_set1_ps(1 / total);
          for (int64_t i = 0; i < width; i += LANES)
            store(out + head * width + i, _mm512_mul_ps(_mm512_load_ps(sum + i), share));
        }
      }
    });
    for (int64_t token = count; token < tokens; token++)
      std::copy_n(out + (count - 1) * heads * width, heads * width, out + token * heads * width);
  });
  return output;
}

}  // namespace qtale
