// A router: Linear, RMSNorm, SiLU, Linear. On a few tokens all of it, in float32, the first weights in float32 or
// bfloat16; on many, what follows the first, wide product.

#pragma once

#include "lanes.h"

namespace qtale {

constexpr int64_t ROUTER_ROWS = 4;  // of the wide product, at a time

// What follows the wide product: norm (width), out (2, width) and out_bias (2).
struct RouterEnd {
  const float *norm, *out, *out_bias;
  float eps;
  int64_t width;
};

// Rows `begin` to `end` of the wide product (tokens, width), in multiples of ROUTER_ROWS, of tokens x (tokens, inputs)
// with weights (width, inputs); without its bias.
template <typename T>
inline void route_down(const float* x, const T* weight, int64_t tokens, int64_t inputs, int64_t width, int64_t begin,
                       int64_t end, float* wide) {
  for (int64_t row = begin; row < end; row += ROUTER_ROWS)
    for (int64_t t = 0; t < tokens; t++)
      products<ROUTER_ROWS>(weight + row * inputs, x + t * inputs, inputs, wide + t * width + row);
}

// Logits (2) of a token's wide values; a bias (or nullptr) is added to them first.
template <typename T>
inline void route_end(const T* wide, const float* bias, const RouterEnd& last, float* logits) {
  const auto value = [&](int64_t i) { return bias == nullptr ? load(wide + i) : load(wide + i) + load(bias + i); };
  Lanes squares = all(0);
  for (int64_t i = 0; i < last.width; i += LANES) squares = fma(value(i), value(i), squares);
  const Lanes factor = all(1.0f / std::sqrt(sum(squares) / static_cast<float>(last.width) + last.eps));
  Lanes skip = all(0), execute = all(0);
  for (int64_t i = 0; i < last.width; i += LANES) {
    const Lanes normed = value(i) * factor * load(last.norm + i), activated = normed / (all(1) + exp(-normed));
    skip = fma(activated, load(last.out + i), skip);
    execute = fma(activated, load(last.out + last.width + i), execute);
  }
  logits[0] = sum(skip) + last.out_bias[0];
  logits[1] = sum(execute) + last.out_bias[1];
}

}  // namespace qtale
