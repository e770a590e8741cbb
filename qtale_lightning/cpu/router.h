// A router on a few tokens: Linear, RMSNorm, SiLU, Linear, in float32, the first one's weights in float32 or bfloat16.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include "lanes.h"

namespace qtale {

// Products of `rows` neighbouring rows of a weight with one token.
template <int rows, typename T>
inline void products(const T* weight, const float* x, int64_t inputs, float* y) {
  __m512 sum[rows];
  for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += LANES) {
    const __m512 value = load(x + i);
    for (int r = 0; r < rows; r++) sum[r] = _mm512_fmadd_ps(load(weight + r * inputs + i), value, sum[r]);
  }
  for (int r = 0; r < rows; r++) y[r] = _mm512_reduce_add_ps(sum[r]);
}

// Logits (N, 2) of tokens (N, D).
inline at::Tensor route(const at::Tensor& x, const at::Tensor& down, const at::Tensor& bias, const at::Tensor& norm,
                        double eps, const at::Tensor& out, const at::Tensor& out_bias) {
  constexpr int rows = 4;  // at a time
  const int64_t tokens = x.size(0), inputs = x.size(1), width = down.size(0);
  TORCH_CHECK(x.is_contiguous() && down.is_contiguous() && out.is_contiguous() && down.size(1) == inputs &&
                  inputs % LANES == 0 && width % LANES == 0,
              "route takes contiguous tokens and weights, widths of a multiple of ", LANES);
  const at::Tensor wide_x = x.to(at::kFloat);
  std::vector<float> wide(tokens * width);
  const float* in = wide_x.const_data_ptr<float>();
  dispatch(down, [&](auto type) {
    using T = decltype(type);
    const T* weight = down.const_data_ptr<T>();
    at::parallel_for(0, width / rows, grain(rows * inputs), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * rows; row < end * rows; row += rows)
        for (int64_t t = 0; t < tokens; t++)
          products<rows>(weight + row * inputs, in + t * inputs, inputs, wide.data() + t * width + row);
    });
  });
  at::Tensor logits = at::empty({tokens, 2}, x.options().dtype(at::kFloat));
  float* result = logits.mutable_data_ptr<float>();
  const at::Tensor wide_bias = bias.to(at::kFloat);
  const float *shift = wide_bias.const_data_ptr<float>(), *scale = norm.const_data_ptr<float>(),
              *last = out.const_data_ptr<float>(), *last_bias = out_bias.const_data_ptr<float>();
  for (int64_t t = 0; t < tokens; t++) {
    float* values = wide.data() + t * width;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) {
      const __m512 value = _mm512_add_ps(load(values + i), load(shift + i));
      store(values + i, value);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + static_cast<float>(eps)));
    const at::vec::Vectorized<float> one(1.0f);
    __m512 skip = _mm512_setzero_ps(), execute = skip;
    for (int64_t i = 0; i < width; i += LANES) {
      const at::vec::Vectorized<float> value(_mm512_mul_ps(_mm512_mul_ps(load(values + i), factor), load(scale + i)));
      const __m512 activated = value / (one + value.neg().exp());
      skip = _mm512_fmadd_ps(activated, load(last + i), skip);
      execute = _mm512_fmadd_ps(activated, load(last + width + i), execute);
    }
    result[2 * t] = _mm512_reduce_add_ps(skip) + last_bias[0];
    result[2 * t + 1] = _mm512_reduce_add_ps(execute) + last_bias[1];
  }
  return logits;
}

}  // namespace qtale
