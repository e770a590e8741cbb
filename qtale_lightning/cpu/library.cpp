// What Python calls, as torch.ops.<QTALE_LIBRARY>.*: checks of tensors, and threads; see __init__.py. What is computed
// is in the headers, on plain pointers.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "layer_operations.h"
#include "linear_operations.h"
#include "rounding.h"
#include "stack.h"
#include "tensors.h"

namespace {

void check_groups(const Tensor& groups, const Tensor& values, const Tensor& scales, const Tensor& zeros,
                  const Tensor& weight) {
  const int64_t numbers = groups.numel(), size = groups.size(-1);
  TORCH_CHECK(groups.is_contiguous() && values.is_contiguous() && scales.is_contiguous() && zeros.is_contiguous() &&
                  weight.is_contiguous() && values.numel() == numbers && weight.numel() == numbers &&
                  scales.numel() * size == numbers && zeros.numel() * size == numbers && size % LANES == 0,
              "rounding takes contiguous tensors of one size, in groups of a multiple of ", LANES);
}

// Groups (out, n, g) into a weight (out, n * g); scales and zeros are (out, n, 1).
void round_groups(const Tensor& groups, const Tensor& values, const Tensor& scales, const Tensor& zeros, int64_t top,
                  int64_t step, const Tensor& weight) {
  check_groups(groups, values, scales, zeros, weight);
  const int64_t size = groups.size(-1);
  const float *from = read<float>(groups), *value = read<float>(values), *scale = read<float>(scales),
              *zero = read<float>(zeros);
  dispatch(weight, [&](auto type) {
    auto* to = write<decltype(type)>(weight);
    at::parallel_for(0, scales.numel(), grain(size), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * size;
      qtale::round_groups(from + first, value + first, scale + begin, zero + begin, static_cast<float>(top),
                          static_cast<float>(step), end - begin, size, to + first);
    });
  });
}

// Values (out, n, g) by the gradient (out, n * g); the sums are (out, n, 1).
std::tuple<Tensor, Tensor> round_step(const Tensor& groups, const Tensor& values, const Tensor& scales,
                                      const Tensor& zeros, int64_t top, int64_t step,
                                      const Tensor& gradient, double rate, double reach) {
  check_groups(groups, values, scales, zeros, gradient);
  const int64_t size = groups.size(-1);
  const float *from = read<float>(groups), *scale = read<float>(scales), *zero = read<float>(zeros);
  float* value = write<float>(values);
  Tensor held = at::empty_like(scales), of_scale = at::empty_like(scales);
  float *held_at = write<float>(held), *of_scale_at = write<float>(of_scale);
  dispatch(gradient, [&](auto type) {
    const auto* slopes = read<decltype(type)>(gradient);
    at::parallel_for(0, scales.numel(), grain(size), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * size;
      qtale::round_step(from + first, value + first, scale + begin, zero + begin, static_cast<float>(top),
                        static_cast<float>(step), slopes + first, static_cast<float>(rate), static_cast<float>(reach),
                        end - begin, size, held_at + begin, of_scale_at + begin);
    });
  });
  return {held, of_scale};
}

}  // namespace

#define QTALE_DEFINE(name, library) TORCH_LIBRARY(name, library)  // which takes a name, not what stands for it
#define QTALE_IMPLEMENT(name, library) TORCH_LIBRARY_IMPL(name, CPU, library)

QTALE_DEFINE(QTALE_LIBRARY, library) {
  library.class_<Buffers>("Buffers").def(torch::init<std::vector<Tensor>, std::vector<Tensor>>());
  library.class_<Decoder>("Decoder")
      .def(torch::init<int64_t, int64_t, int64_t, double, double, Tensor, Tensor>())
      .def("add", &Decoder::add)
      .def("end", &Decoder::end)
      .def("step", &Decoder::step);
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  library.def(
      "attend_next(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, int[] rows, "
      "int[] lengths, float scaling) -> Tensor");
  library.def(
      "route(Tensor x, Tensor down, Tensor bias, Tensor norm, float eps, Tensor out, Tensor out_bias) -> Tensor");
  library.def("route_wide(Tensor wide, Tensor norm, float eps, Tensor out, Tensor out_bias) -> Tensor");
  library.def("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("int4_linear(Tensor x, Tensor packed, Tensor scales, Tensor zeros) -> Tensor");
  library.def("int4_linear_rounded(Tensor x, Tensor packed, Tensor scales, Tensor zeros) -> Tensor");
  library.def(
      "int4_dequantize(Tensor packed, Tensor scales, Tensor zeros, int first, int count, Tensor like) -> Tensor");
  library.def("plane_linear(Tensor x, Tensor high, Tensor scales, Tensor zeros, Tensor[] bits) -> Tensor");
  library.def(
      "plane_dequantize(Tensor high, Tensor scales, Tensor zeros, Tensor[] bits, int first, int count, Tensor like) "
      "-> Tensor");
  library.def(
      "round_groups(Tensor groups, Tensor values, Tensor scales, Tensor zeros, int top, int step, Tensor(a!) weight) -> ()");
  library.def(
      "round_step(Tensor groups, Tensor(a!) values, Tensor scales, Tensor zeros, int top, int step, Tensor gradient, float rate, "
      "float reach) -> (Tensor, Tensor)");
}

QTALE_IMPLEMENT(QTALE_LIBRARY, library) {
  library.impl("rms_norm", rms_norm);
  library.impl("rotate", rotate);
  library.impl("swiglu", swiglu);
  library.impl("attend_next", attend_next);
  library.impl("route", route);
  library.impl("route_wide", route_wide);
  library.impl("dense_linear", dense_linear);
  library.impl("int4_linear", int4_linear);
  library.impl("int4_linear_rounded", int4_linear_rounded);
  library.impl("int4_dequantize", int4_dequantize);
  library.impl("plane_linear", plane_linear);
  library.impl("plane_dequantize", plane_dequantize);
  library.impl("round_groups", round_groups);
  library.impl("round_step", round_step);
}
