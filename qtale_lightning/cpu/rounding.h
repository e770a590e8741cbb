// Rounding that is learned (quantization/rounding.py): what a weight is rounded to, and a step of its values.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <tuple>

#include "lanes.h"

namespace qtale {

// Sixteen weights over their group's scale, the whole numbers they go to, and these within the grid.
struct Levels {
  __m512 plain, free, within;

  Levels(const float* weight, const float* value, __m512 scale, __m512 zero, __m512 top) {
    plain = _mm512_div_ps(load(weight), scale);
    free = _mm512_roundscale_ps(_mm512_add_ps(plain, load(value)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    within = _mm512_min_ps(_mm512_max_ps(free, _mm512_sub_ps(_mm512_setzero_ps(), zero)), _mm512_sub_ps(top, zero));
  }
};

inline void check_groups(const at::Tensor& groups, const at::Tensor& values, const at::Tensor& scales,
                         const at::Tensor& zeros, const at::Tensor& weight) {
  const int64_t numbers = groups.numel(), size = groups.size(-1);
  TORCH_CHECK(groups.is_contiguous() && values.is_contiguous() && scales.is_contiguous() && zeros.is_contiguous() &&
                  weight.is_contiguous() && values.numel() == numbers && weight.numel() == numbers &&
                  scales.numel() * size == numbers && zeros.numel() * size == numbers && size % LANES == 0,
              "rounding takes contiguous tensors of one size, in groups of a multiple of ", LANES);
}

// Writes what the groups (out, n, g) are rounded to into a weight (out, n * g); scales and zeros are (out, n, 1).
inline void round_groups(const at::Tensor& groups, const at::Tensor& values, const at::Tensor& scales,
                         const at::Tensor& zeros, int64_t top, at::Tensor& weight) {
  check_groups(groups, values, scales, zeros, weight);
  const int64_t size = groups.size(-1);
  const float *from = groups.const_data_ptr<float>(), *value = values.const_data_ptr<float>(),
              *scale = scales.const_data_ptr<float>(), *zero = zeros.const_data_ptr<float>();
  const __m512 highest = _mm512_set1_ps(static_cast<float>(top));
  dispatch(weight, [&](auto type) {
    auto* to = weight.mutable_data_ptr<decltype(type)>();
    at::parallel_for(0, scales.numel(), grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; group++) {
        const __m512 s = _mm512_set1_ps(scale[group]), z = _mm512_set1_ps(zero[group]);
        for (int64_t i = group * size; i < (group + 1) * size; i += LANES)
          store(to + i, _mm512_mul_ps(Levels(from + i, value + i, s, z, highest).within, s));
      }
    });
  });
}

// Moves values (out, n, g) by `rate` against the sign of the gradient (out, n * g) of the rounded weight. Gives the
// gradients of weights that an end of the grid holds, summed over each group, and those of the scales, (out, n, 1).
inline std::tuple<at::Tensor, at::Tensor> round_step(const at::Tensor& groups, at::Tensor& values,
                                                     const at::Tensor& scales, const at::Tensor& zeros, int64_t top,
                                                     const at::Tensor& gradient, double rate) {
  check_groups(groups, values, scales, zeros, gradient);
  const int64_t size = groups.size(-1);
  const float *from = groups.const_data_ptr<float>(), *scale = scales.const_data_ptr<float>(),
              *zero = zeros.const_data_ptr<float>();
  float* value = values.mutable_data_ptr<float>();
  at::Tensor held = at::empty_like(scales), of_scale = at::empty_like(scales);
  float *held_at = held.mutable_data_ptr<float>(), *of_scale_at = of_scale.mutable_data_ptr<float>();
  const __m512 nothing = _mm512_setzero_ps(), highest = _mm512_set1_ps(static_cast<float>(top));
  const __m512 move = _mm512_set1_ps(static_cast<float>(rate)), half = _mm512_set1_ps(0.5f);
  dispatch(gradient, [&](auto type) {
    const auto* slopes = gradient.const_data_ptr<decltype(type)>();
    at::parallel_for(0, scales.numel(), grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; group++) {
        const __m512 s = _mm512_set1_ps(scale[group]), z = _mm512_set1_ps(zero[group]);
        __m512 sum_held = nothing, sum_scale = nothing;
        for (int64_t i = group * size; i < (group + 1) * size; i += LANES) {
          const Levels levels(from + i, value + i, s, z, highest);
          const __m512 slope = load(slopes + i);
          const __mmask16 free = _mm512_cmp_ps_mask(levels.free, levels.within, _CMP_EQ_OQ);
          const __m512 error = _mm512_mask_sub_ps(levels.within, free, levels.within, levels.plain);
          sum_scale = _mm512_fmadd_ps(slope, error, sum_scale);
          sum_held = _mm512_mask_add_ps(sum_held, _knot_mask16(free), sum_held, slope);
          __m512 moved = load(value + i);
          moved = _mm512_mask_sub_ps(moved, _mm512_mask_cmp_ps_mask(free, slope, nothing, _CMP_GT_OQ), moved, move);
          moved = _mm512_mask_add_ps(moved, _mm512_mask_cmp_ps_mask(free, slope, nothing, _CMP_LT_OQ), moved, move);
          store(value + i, _mm512_min_ps(_mm512_max_ps(moved, _mm512_sub_ps(nothing, half)), half));
        }
        held_at[group] = _mm512_reduce_add_ps(sum_held);
        of_scale_at[group] = _mm512_reduce_add_ps(sum_scale);
      }
    });
  });
  return {held, of_scale};
}

}  // namespace qtale
