// Rounding that is learned (quantization/rounding.py): what a weight is rounded to, and a step of its values.

#pragma once

#include "lanes.h"

namespace qtale {

// Sixteen weights over their group's scale, the whole numbers they go to, these within the grid, and what is left of them
// without their codes' lowest bits, of 2^bits = `step` codes the middle.
struct Levels {
  Lanes plain, free, within, kept;

  Levels(const float* weight, const float* value, Lanes scale, Lanes zero, Lanes top, Lanes step)
      : plain(load(weight) / scale), free(whole(plain + load(value))), within(min(max(free, -zero), top - zero)) {
    const Lanes middle = (step - all(1)) * all(0.5f);
    kept = whole((within + zero - middle) / step) * step + middle - zero;
  }
};

// Writes what `count` groups of `size` are rounded to; each has a scale and a zero point.
template <typename T>
inline void round_groups(const float* groups, const float* values, const float* scales, const float* zeros, float top,
                         float step, int64_t count, int64_t size, T* weight) {
  for (int64_t group = 0; group < count; group++) {
    const Lanes scale = all(scales[group]), zero = all(zeros[group]);
    for (int64_t i = group * size; i < (group + 1) * size; i += LANES)
      store(weight + i, Levels(groups + i, values + i, scale, zero, all(top), all(step)).kept * scale);
  }
}

// Moves values by `rate` against the sign of the gradient of the rounded weight, within `reach` of 0. Gives, summed over each group, the
// gradients of weights that an end of the grid holds, and that of the scale.
template <typename T>
inline void round_step(const float* groups, float* values, const float* scales, const float* zeros, float top,
                       float step, const T* gradient, float rate, float reach, int64_t count, int64_t size, float* held, float* of_scale) {
  const Lanes nothing = all(0), most = all(reach);
  for (int64_t group = 0; group < count; group++) {
    const Lanes scale = all(scales[group]), zero = all(zeros[group]);
    Lanes sum_held = nothing, sum_scale = nothing;
    for (int64_t i = group * size; i < (group + 1) * size; i += LANES) {
      const Levels levels(groups + i, values + i, scale, zero, all(top), all(step));
      const Lanes slope = load(gradient + i);
      const auto where_free = [&](Lanes then, Lanes otherwise) {
        return where_equal(levels.free, levels.within, then, otherwise);
      };
      sum_scale = fma(slope, where_free(levels.kept - levels.plain, levels.kept), sum_scale);
      sum_held = sum_held + where_free(nothing, slope);
      const Lanes moved = load(values + i) - where_free(sign(slope), nothing) * all(rate);
      store(values + i, min(max(moved, -most), most));
    }
    held[group] = sum(sum_held);
    of_scale[group] = sum(sum_scale);
  }
}

}  // namespace qtale
