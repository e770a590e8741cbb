// The decoder layer's operations between its linears, each in one pass over memory. They round where Hugging Face's
// sequences of operations round, so that results agree but for the order of a norm's sum.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include "lanes.h"

namespace qtale {

// Hugging Face's LlamaRMSNorm of rows (…, D): weight · (x / sqrt(mean(x²) + eps)).
inline at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t width = x.size(-1), rows = x.numel() / width;
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && width % LANES == 0 && weight.numel() == width,
              "rms_norm takes contiguous rows of a multiple of ", LANES);
  at::Tensor output = at::empty_like(x);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T *in = x.const_data_ptr<T>(), *scale = weight.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T* from = in + row * width;
        T* to = out + row * width;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES) {
          const __m512 value = load(from + i);
          sum = _mm512_fmadd_ps(value, value, sum);
        }
        const float mean = _mm512_reduce_add_ps(sum) / static_cast<float>(width);
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + static_cast<float>(eps)));
        for (int64_t i = 0; i < width; i += LANES)
          store(to + i, _mm512_mul_ps(load(scale + i), rounded<T>(_mm512_mul_ps(load(from + i), factor))));
      }
    });
  });
  return output;
}

// x (B, T, H, d) rotated by the angles whose cosines and sines are (1|B, T, d): x · cos + rotate_half(x) · sin.
inline at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), width = x.size(3), half = width / 2;
  TORCH_CHECK(x.is_contiguous() && cos.stride(-1) == 1 && sin.strides() == cos.strides() &&
                  cos.size(1) == length && cos.size(2) == width && half % LANES == 0,
              "rotate takes contiguous heads of a multiple of ", 2 * LANES);
  at::Tensor output = at::empty_like(x);
  const int64_t by_batch = cos.size(0) == 1 ? 0 : cos.stride(0), by_token = cos.stride(1);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T *in = x.const_data_ptr<T>(), *cosines = cos.const_data_ptr<T>(), *sines = sin.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    const auto product = [](__m512 a, __m512 b) { return rounded<T>(_mm512_mul_ps(a, b)); };
    at::parallel_for(0, batch * length, grain(heads * width), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++) {
        const int64_t place = (token / length) * by_batch + (token % length) * by_token;
        for (int64_t i = 0; i < half; i += LANES) {
          const __m512 cos_low = load(cosines + place + i), cos_high = load(cosines + place + half + i);
          const __m512 sin_low = load(sines + place + i), sin_high = load(sines + place + half + i);
          for (int64_t head = 0; head < heads; head++) {
            const int64_t at = (token * heads + head) * width + i;
            const __m512 low = load(in + at), high = load(in + at + half);
            store(out + at, _mm512_sub_ps(product(low, cos_low), product(high, sin_low)));
            store(out + at + half, _mm512_add_ps(product(high, cos_high), product(low, sin_high)));
          }
        }
      }
    });
  });
  return output;
}

// silu(gate) · up.
inline at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK(gate.is_contiguous() && up.is_contiguous() && gate.sizes() == up.sizes() && gate.numel() % LANES == 0,
              "swiglu takes contiguous tensors of one shape, of a multiple of ", LANES);
  at::Tensor output = at::empty_like(gate);
  dispatch(gate, [&](auto type) {
    using T = decltype(type);
    const T *gates = gate.const_data_ptr<T>(), *ups = up.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    at::parallel_for(0, gate.numel() / LANES, grain(LANES), [&](int64_t begin, int64_t end) {
      const at::vec::Vectorized<float> one(1.0f);
      for (int64_t i = begin * LANES; i < end * LANES; i += LANES) {
        const at::vec::Vectorized<float> value(load(gates + i));
        // Where the result is rounded to bfloat16, the faster exp is exact enough: it errs by 20 float32 units at most.
        const auto power = std::is_same_v<T, float> ? value.neg().exp() : value.neg().exp_u20();
        const __m512 activated = rounded<T>(value / (one + power));
        store(out + i, _mm512_mul_ps(activated, load(ups + i)));
      }
    });
  });
  return output;
}

}  // namespace qtale
