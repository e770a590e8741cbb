// What Python calls, as torch.ops.qtale.*; see __init__.py.

#include <torch/library.h>

#include "attention.h"
#include "int4.h"
#include "layer.h"
#include "rounding.h"
#include "router.h"

TORCH_LIBRARY(qtale, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  library.def(
      "attend_next(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, int[] rows, "
      "int[] lengths, float scaling) -> Tensor");
  library.def(
      "route(Tensor x, Tensor down, Tensor bias, Tensor norm, float eps, Tensor out, Tensor out_bias) -> Tensor");
  library.def("route_wide(Tensor wide, Tensor norm, float eps, Tensor out, Tensor out_bias) -> Tensor");
  library.def("int4_linear(Tensor x, Tensor packed, Tensor scales, Tensor zeros) -> Tensor");
  library.def(
      "int4_dequantize(Tensor packed, Tensor scales, Tensor zeros, int first, int count, Tensor like) -> Tensor");
  library.def(
      "round_groups(Tensor groups, Tensor values, Tensor scales, Tensor zeros, int top, Tensor(a!) weight) -> ()");
  library.def(
      "round_step(Tensor groups, Tensor(a!) values, Tensor scales, Tensor zeros, int top, Tensor gradient, float rate) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(qtale, CPU, library) {
  library.impl("rms_norm", qtale::rms_norm);
  library.impl("rotate", qtale::rotate);
  library.impl("swiglu", qtale::swiglu);
  library.impl("attend_next", qtale::attend_next);
  library.impl("route", qtale::route);
  library.impl("route_wide", qtale::route_wide);
  library.impl("int4_linear", qtale::int4_linear);
  library.impl("int4_dequantize", qtale::int4_dequantize);
  library.impl("round_groups", qtale::round_groups);
  library.impl("round_step", qtale::round_step);
}
