// The decoder layer's operations between its linears, each in one pass over memory. They round where Hugging Face's
// sequences of operations round, so that results agree but for the order of a norm's sum.

#pragma once

#include "lanes.h"

namespace qtale {

// Hugging Face's LlamaRMSNorm of rows (rows, width): weight · (x / sqrt(mean(x²) + eps)).
template <typename T>
inline void rms_norm(const T* x, const T* weight, float eps, int64_t rows, int64_t width, T* y) {
  for (; rows > 0; rows--, x += width, y += width) {
    Lanes squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) {
      const Lanes value = load(x + i);
      squares = fma(value, value, squares);
    }
    const Lanes factor = all(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
    for (int64_t i = 0; i < width; i += LANES) store(y + i, load(weight + i) * rounded<T>(load(x + i) * factor));
  }
}

// A token's heads (heads, width) rotated by angles whose cosines and sines are (width): x · cos + rotate_half(x) · sin.
template <typename T>
inline void rotate(const T* x, const T* cos, const T* sin, int64_t heads, int64_t width, T* y) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const Lanes cos_low = load(cos + i), cos_high = load(cos + half + i);
    const Lanes sin_low = load(sin + i), sin_high = load(sin + half + i);
    for (int64_t at = i; at < heads * width; at += width) {
      const Lanes low = load(x + at), high = load(x + at + half);
      store(y + at, rounded<T>(low * cos_low) - rounded<T>(high * sin_low));
      store(y + at + half, rounded<T>(high * cos_high) + rounded<T>(low * sin_high));
    }
  }
}

// silu(gate) · up, of `count` numbers.
template <typename T>
inline void swiglu(const T* gate, const T* up, int64_t count, T* y) {
  for (int64_t i = 0; i < count; i += LANES) {
    const Lanes value = load(gate + i);
    store(y + i, rounded<T>(value / (all(1) + exp(-value))) * load(up + i));
  }
}

}  // namespace qtale
