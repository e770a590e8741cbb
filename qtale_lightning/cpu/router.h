// A router: Linear, RMSNorm, SiLU, Linear. On a few tokens all of it, in float32, the first weights in float32 or
// bfloat16; on many, what follows the first, wide product.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include "lanes.h"

namespace qtale {

// Logits (2) of a token's wide values, read from `width` numbers; a bias (or nullptr) is added to them first.
template <typename T>
inline void finish(const T* wide, const float* bias, const float* norm, float eps, const float* out,
                   const float* out_bias, int64_t width, float* logits) {
  const auto value = [&](int64_t i) {
    return bias == nullptr ? load(wide + i) : _mm512_add_ps(load(wide + i), load(bias + i));
  };
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += LANES) squares = _mm512_fmadd_ps(value(i), value(i), squares);
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  const at::vec::Vectorized<float> one(1.0f);
  __m512 skip = _mm512_setzero_ps(), execute = skip;
  for (int64_t i = 0; i < width; i += LANES) {
    const at::vec::Vectorized<float> normed(_mm512_mul_ps(_mm512_mul_ps(value(i), factor), load(norm + i)));
    const __m512 activated = normed / (one + normed.neg().exp());
    skip = _mm512_fmadd_ps(activated, load(out + i), skip);
    execute = _mm512_fmadd_ps(activated, load(out + width + i), execute);
  }
  logits[0] = _mm512_reduce_add_ps(skip) + out_bias[0];
  logits[1] = _mm512_reduce_add_ps(execute) + out_bias[1];
}

// Logits (N, 2) of the wide product (N, W) of tokens, its bias included.
inline at::Tensor route_wide(const at::Tensor& wide, const at::Tensor& norm, double eps, const at::Tensor& out,
                             const at::Tensor& out_bias) {
  const int64_t tokens = wide.size(0), width = wide.size(1);
  TORCH_CHECK(wide.is_contiguous() && out.is_contiguous() && out.size(1) == width && width % LANES == 0,
              "route_wide takes contiguous values and weights, of a multiple of ", LANES);
  at::Tensor logits = at::empty({tokens, 2}, wide.options().dtype(at::kFloat));
  const float *scale = norm.const_data_ptr<float>(), *last = out.const_data_ptr<float>(),
              *last_bias = out_bias.const_data_ptr<float>();
  float* result = logits.mutable_data_ptr<float>();
  dispatch(wide, [&](auto type) {
    const auto* values = wide.const_data_ptr<decltype(type)>();
    at::parallel_for(0, tokens, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        finish(values + t * width, nullptr, scale, static_cast<float>(eps), last, last_bias, width, result + 2 * t);
    });
  });
  return logits;
}

// Logits (N, 2) of a few tokens (N, D).
inline at::Tensor route(const at::Tensor& x, const at::Tensor& down, const at::Tensor& bias, const at::Tensor& norm,
                        double eps, const at::Tensor& out, const at::Tensor& out_bias) {
  constexpr int rows = 4;  // at a time
  const int64_t tokens = x.size(0), inputs = x.size(1), width = down.size(0);
  TORCH_CHECK(x.is_contiguous() && down.is_contiguous() && out.is_contiguous() && down.size(1) == inputs &&
                  out.size(1) == width && inputs % LANES == 0 && width % LANES == 0,
              "route takes contiguous tokens and weights, widths of a multiple of ", LANES);
  const at::Tensor wide_x = x.to(at::kFloat), wide_bias = bias.to(at::kFloat);
  std::vector<float> wide(tokens * width);
  const float* in = wide_x.const_data_ptr<float>();
  dispatch(down, [&](auto type) {
    const auto* weight = down.const_data_ptr<decltype(type)>();
    at::parallel_for(0, width / rows, grain(rows * inputs), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * rows; row < end * rows; row += rows)
        for (int64_t t = 0; t < tokens; t++)
          products<rows>(weight + row * inputs, in + t * inputs, inputs, wide.data() + t * width + row);
    });
  });
  at::Tensor logits = at::empty({tokens, 2}, wide_x.options());
  float* result = logits.mutable_data_ptr<float>();
  for (int64_t t = 0; t < tokens; t++)
    finish(wide.data() + t * width, wide_bias.const_data_ptr<float>(), norm.const_data_ptr<float>(),
           static_cast<float>(eps), out.const_data_ptr<float>(), out_bias.const_data_ptr<float>(), width,
           result + 2 * t);
  return logits;
}

}  // namespace qtale
