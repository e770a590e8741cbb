// Rounding that is learned (quantization/rounding.py): what a weight is rounded to, and a step of its values.

#pragma once

#include "lanes.h"

namespace qtale {

// Sixteen weights over their group's scale, the whole numbers they go to, and these within the grid.
struct Levels {
  Lanes plain, free, within;

  Levels(const float* weight, const float* value, Lanes scale, Lanes zero, Lanes top)
      : plain(load(weight) / scale), free(whole(plain + load(value))), within(min(max(free, -zero), top - zero)) {}
};

// Writes what `count` groups of `size` are rounded to; each has a scale and a zero point.
template <typename T>
inline void round_groups(const float* groups, const float* values, const float* scales, const float* zeros, float top,
                         int64_t count, int64_t size, T* weight) {
  for (int64_t group = 0; group < count; group++) {
    const Lanes scale = all(scales[group]), zero = all(zeros[group]);
    for (int64_t i = group * size; i < (group + 1) * size; i += LANES)
      store(weight + i, Levels(groups + i, values + i, scale, zero, all(top)).within * scale);
  }
}

// Moves values by `rate` against the sign of the gradient of the rounded weight. Gives, summed over each group, the
// gradients of weights that an end of the grid holds, and that of the scale.
template <typename T>
inline void round_step(const float* groups, float* values, const float* scales, const float* zeros, float top,
                       const T* gradient, float rate, int64_t count, int64_t size, float* held, float* of_scale) {
  const Lanes nothing = all(0), half = all(0.5f);
  for (int64_t group = 0; group < count; group++) {
    const Lanes scale = all(scales[group]), zero = all(zeros[group]);
    Lanes sum_held = nothing, sum_scale = nothing;
    for (int64_t i = group * size; i < (group + 1) * size; i += LANES) {
      const Levels levels(groups + i, values + i, scale, zero, all(top));
      const Lanes slope = load(gradient + i);
      const auto where_free = [&](Lanes then, Lanes otherwise) {
        return where_equal(levels.free, levels.within, then, otherwise);
      };
      sum_scale = fma(slope, where_free(levels.within - levels.plain, levels.within), sum_scale);
      sum_held = sum_held + where_free(nothing, slope);
      const Lanes moved = load(values + i) - where_free(sign(slope), nothing) * all(rate);
      store(values + i, min(max(moved, -half), half));
    }
    held[group] = sum(sum_held);
    of_scale[group] = sum(sum_scale);
  }
}

}  // namespace qtale
