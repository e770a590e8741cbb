// What Python calls, as torch.ops.<QTALE_LIBRARY>.*: checks of tensors, and threads; see __init__.py. What is computed
// is in the headers, on plain pointers.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "attention.h"
#include "dense.h"
#include "int4_8.h"
#include "layer.h"
#include "planes.h"
#include "rounding.h"
#include "stack.h"
#include "tensors.h"

namespace {

using qtale::LANES;

// Rows (…, D).
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t width = x.size(-1), rows = x.numel() / width;
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && width % LANES == 0 && weight.numel() == width,
              "rms_norm takes contiguous rows of a multiple of ", LANES);
  Tensor output = at::empty_like(x);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T *in = read<T>(x), *scale = read<T>(weight);
    T* out = write<T>(output);
    at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      qtale::rms_norm(in + begin * width, scale, static_cast<float>(eps), end - begin, width, out + begin * width);
    });
  });
  return output;
}

// x (B, T, H, d) by angles whose cosines and sines are (1|B, T, d).
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), width = x.size(3);
  TORCH_CHECK(x.is_contiguous() && cos.stride(-1) == 1 && sin.strides() == cos.strides() &&
                  cos.size(1) == length && cos.size(2) == width && width % (2 * LANES) == 0,
              "rotate takes contiguous heads of a multiple of ", 2 * LANES);
  Tensor output = at::empty_like(x);
  const int64_t by_batch = cos.size(0) == 1 ? 0 : cos.stride(0), by_token = cos.stride(1);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T *in = read<T>(x), *cosines = read<T>(cos), *sines = read<T>(sin);
    T* out = write<T>(output);
    at::parallel_for(0, batch * length, grain(heads * width), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++) {
        const int64_t place = (token / length) * by_batch + (token % length) * by_token, at = token * heads * width;
        qtale::rotate(in + at, cosines + place, sines + place, heads, width, out + at);
      }
    });
  });
  return output;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  TORCH_CHECK(gate.is_contiguous() && up.is_contiguous() && gate.sizes() == up.sizes() && gate.numel() % LANES == 0,
              "swiglu takes contiguous tensors of one shape, of a multiple of ", LANES);
  Tensor output = at::empty_like(gate);
  dispatch(gate, [&](auto type) {
    using T = decltype(type);
    const T *gates = read<T>(gate), *ups = read<T>(up);
    T* out = write<T>(output);
    at::parallel_for(0, gate.numel() / LANES, grain(LANES), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * LANES;
      qtale::swiglu(gates + first, ups + first, (end - begin) * LANES, out + first);
    });
  });
  return output;
}

// query (…, H, d), key and value (…, G, d): tokens of the sequences `rows`, one each, which keep `lengths` tokens in the
// buffers keys and values (B, G, capacity, d); the new ones are written behind these. Tokens behind those of sequences
// repeat the last of them. Returns (…, H, d).
Tensor attend_next(const Tensor& query, const Tensor& key, const Tensor& value, Tensor& keys, Tensor& values,
                   at::IntArrayRef rows, at::IntArrayRef lengths, double scaling) {
  const int64_t heads = query.size(-2), width = query.size(-1), groups = key.size(-2), count = rows.size();
  const int64_t shared = heads / groups;  // query heads of a key head
  const int64_t tokens = query.numel() / (heads * width), capacity = keys.size(2);
  TORCH_CHECK(query.is_contiguous() && key.is_contiguous() && value.is_contiguous() && keys.is_contiguous() &&
                  values.is_contiguous() && width % LANES == 0 && width <= qtale::WIDEST,
              "attend_next takes contiguous heads of a multiple of ", LANES, ", at most ", qtale::WIDEST);
  TORCH_CHECK(0 < count && count <= tokens && key.numel() == tokens * groups * width && value.sizes() == key.sizes() &&
                  lengths.size() == rows.size() && scaling > 0,
              "attend_next takes a query, a key and a value for each of the sequences");
  int64_t longest = 0;
  for (int64_t n = 0; n < count; n++) {
    TORCH_CHECK(0 <= lengths[n] && lengths[n] < capacity && 0 <= rows[n] && rows[n] < keys.size(0),
                "attend_next: the cache has no room");
    longest = std::max(longest, lengths[n] + 1);
  }
  Tensor output = at::empty_like(query);
  dispatch(query, [&](auto type) {
    using T = decltype(type);
    const T *queries = read<T>(query), *new_keys = read<T>(key), *new_values = read<T>(value);
    T *all_keys = write<T>(keys), *all_values = write<T>(values), *out = write<T>(output);
    at::parallel_for(0, count * groups, grain(longest * width), [&](int64_t begin, int64_t end) {
      std::vector<float> room(qtale::attention_room(shared, width, longest));
      for (int64_t item = begin; item < end; item++) {
        const int64_t n = item / groups, group = item % groups;
        const int64_t first = (n * heads + group * shared) * width;  // of the heads that share these keys
        const int64_t kept = (rows[n] * groups + group) * capacity * width;
        const T *new_key = new_keys + item * width, *new_value = new_values + item * width;
        qtale::attend_next(queries + first, new_key, new_value, all_keys + kept, all_values + kept, lengths[n], shared,
                           width, static_cast<float>(scaling), room.data(), out + first);
        qtale::append(new_key, width, lengths[n], all_keys + kept);
        qtale::append(new_value, width, lengths[n], all_values + kept);
      }
    });
    for (int64_t token = count; token < tokens; token++)
      std::copy_n(out + (count - 1) * heads * width, heads * width, out + token * heads * width);
  });
  return output;
}

// Logits (N, 2) of the wide product (N, W) of tokens, its bias included.
Tensor route_wide(const Tensor& wide, const Tensor& norm, double eps, const Tensor& out, const Tensor& out_bias) {
  const int64_t tokens = wide.size(0), width = wide.size(1);
  TORCH_CHECK(wide.is_contiguous() && out.is_contiguous() && out.size(1) == width && width % LANES == 0,
              "route_wide takes contiguous values and weights, of a multiple of ", LANES);
  Tensor logits = at::empty({tokens, 2}, wide.options().dtype(at::kFloat));
  const qtale::RouterEnd last = router_end(norm, eps, out, out_bias);
  float* result = write<float>(logits);
  dispatch(wide, [&](auto type) {
    const auto* values = read<decltype(type)>(wide);
    at::parallel_for(0, tokens, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) qtale::route_end(values + t * width, nullptr, last, result + 2 * t);
    });
  });
  return logits;
}

// Logits (N, 2) of a few tokens (N, D).
Tensor route(const Tensor& x, const Tensor& down, const Tensor& bias, const Tensor& norm, double eps,
             const Tensor& out, const Tensor& out_bias) {
  constexpr int64_t rows = qtale::ROUTER_ROWS;
  const int64_t tokens = x.size(0), inputs = x.size(1), width = down.size(0);
  TORCH_CHECK(x.is_contiguous() && down.is_contiguous() && out.is_contiguous() && down.size(1) == inputs &&
                  out.size(1) == width && inputs % LANES == 0 && width % LANES == 0,
              "route takes contiguous tokens and weights, widths of a multiple of ", LANES);
  const Tensor wide_x = x.to(at::kFloat), wide_bias = bias.to(at::kFloat);
  std::vector<float> wide(tokens * width);
  const float* in = read<float>(wide_x);
  dispatch(down, [&](auto type) {
    const auto* weight = read<decltype(type)>(down);
    at::parallel_for(0, width / rows, grain(rows * inputs), [&](int64_t begin, int64_t end) {
      qtale::route_down(in, weight, tokens, inputs, width, begin * rows, end * rows, wide.data());
    });
  });
  Tensor logits = at::empty({tokens, 2}, wide_x.options());
  const qtale::RouterEnd last = router_end(norm, eps, out, out_bias);
  for (int64_t t = 0; t < tokens; t++)
    qtale::route_end(wide.data() + t * width, read<float>(wide_bias), last, write<float>(logits) + 2 * t);
  return logits;
}

Tensor of_outputs(const Tensor& x, const qtale::Int4Weight& weight) {
  at::DimVector shape(x.sizes());
  shape.back() = weight.strips * qtale::STRIP;
  return at::empty(shape, x.options());
}

// Calls run(begin, end) for parts of a weight's strips, whose products with so many tokens are shared by threads.
template <typename F>
void by_strips(const qtale::Int4Weight& weight, int64_t tokens, F&& run) {
  const int64_t work = qtale::STRIP * weight.inputs * tokens / 2;  // of two strips, whose numbers have four bits
  at::parallel_for(0, (weight.strips + 1) / 2, grain(work), [&](int64_t begin, int64_t end) {
    run(2 * begin, std::min(2 * end, weight.strips));
  });
}

// Tokens x (…, inputs) give (…, outputs).
Tensor int4_linear(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& zeros) {
  const qtale::Int4Weight weight = int4_weight(packed, scales, zeros);
  const int64_t tokens = x.numel() / weight.inputs;
  TORCH_CHECK(x.is_contiguous() && x.size(-1) == weight.inputs && weight.group() % LANES == 0,
              "int4_linear takes contiguous tokens of ", weight.inputs, " inputs, in groups of a multiple of ", LANES);
  Tensor output = of_outputs(x, weight);
  std::vector<float> sums(tokens * weight.groups);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using Inputs = qtale::Int4Inputs<T>;
    const int64_t width = Inputs::width(weight);
    std::vector<typename Inputs::Of::Input> values(tokens * width);
    const T* in = read<T>(x);
    T* out = write<T>(output);
    at::parallel_for(0, tokens, grain(weight.inputs), [&](int64_t begin, int64_t end) {
      const Inputs part{values.data() + begin * width, sums.data() + begin * weight.groups};
      qtale::int4_inputs(in + begin * weight.inputs, end - begin, weight, part);
    });
    by_strips(weight, tokens, [&](int64_t begin, int64_t end) {
      qtale::int4_linear(weight, Inputs{values.data(), sums.data()}, tokens, begin, end, out);
    });
  });
  return output;
}

// The same for tokens that are rounded to 8 bits in blocks of 32 inputs.
Tensor int4_linear_rounded(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& zeros) {
  const qtale::Int4Weight weight = int4_weight(packed, scales, zeros);
  const int64_t tokens = x.numel() / weight.inputs, blocks = weight.inputs / qtale::ROUNDED_BLOCK;
  TORCH_CHECK(x.is_contiguous() && x.size(-1) == weight.inputs && weight.group() % qtale::ROUNDED_BLOCK == 0,
              "int4_linear_rounded takes contiguous tokens of ", weight.inputs, " inputs, in groups of a multiple of ",
              qtale::ROUNDED_BLOCK);
  Tensor output = of_outputs(x, weight);
  std::vector<int8_t> codes(tokens * weight.inputs);
  std::vector<float> scale(tokens * blocks), sums(tokens * blocks);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T* in = read<T>(x);
    T* out = write<T>(output);
    at::parallel_for(0, tokens, grain(weight.inputs), [&](int64_t begin, int64_t end) {
      qtale::round_inputs(in + begin * weight.inputs, end - begin, weight.inputs,
                          {codes.data() + begin * weight.inputs, scale.data() + begin * blocks,
                           sums.data() + begin * blocks});
    });
    by_strips(weight, tokens, [&](int64_t begin, int64_t end) {
      qtale::int4_linear_rounded(weight, {codes.data(), scale.data(), sums.data()}, tokens, begin, end, out);
    });
  });
  return output;
}

// The same from planes.
Tensor plane_linear(const Tensor& x, const Tensor& high, const Tensor& scales, const Tensor& zeros,
                    at::TensorList bits) {
  const qtale::PlaneWeight weight = plane_weight(high, scales, zeros, bits);
  const int64_t tokens = x.numel() / weight.inputs;
  TORCH_CHECK(x.is_contiguous() && x.size(-1) == weight.inputs, "plane_linear takes contiguous tokens of ", weight.inputs,
              " inputs");
  at::DimVector shape(x.sizes());
  shape.back() = weight.strips * qtale::STRIP;
  Tensor output = at::empty(shape, x.options());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using Inputs = qtale::PlaneInputs<T>;
    const int64_t width = Inputs::width(weight), of_sums = weight.groups * Inputs::SUMS_OF;
    std::vector<typename Inputs::Input> values(tokens * width);
    std::vector<float> sums(tokens * of_sums);
    const T* in = read<T>(x);
    T* out = write<T>(output);
    at::parallel_for(0, tokens, grain(weight.inputs), [&](int64_t begin, int64_t end) {
      const Inputs part{values.data() + begin * width, sums.data() + begin * of_sums};
      qtale::plane_inputs(in + begin * weight.inputs, end - begin, weight, part);
    });
    const int64_t work = qtale::STRIP * weight.inputs * tokens / 2;  // as of int4 weights
    at::parallel_for(0, (weight.strips + 1) / 2, grain(work), [&](int64_t begin, int64_t end) {
      qtale::plane_linear(weight, Inputs{values.data(), sums.data()}, tokens, 2 * begin, std::min(2 * end, weight.strips),
                          out);
    });
  });
  return output;
}

// Tokens x (…, inputs) give (…, outputs), from dense weights (outputs, inputs).
Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t inputs = weight.size(1), outputs = weight.size(0), tokens = x.numel() / inputs;
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && x.size(-1) == inputs && inputs % LANES == 0 &&
                  outputs % LANES == 0 && (!bias || bias->numel() == outputs),
              "dense_linear takes contiguous tokens and weights, of multiples of ", LANES);
  at::DimVector shape(x.sizes());
  shape.back() = outputs;
  Tensor output = at::empty(shape, x.options());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using Input = qtale::DenseInput<T>;
    const Tensor in = x.to(std::is_same_v<Input, float> ? at::kFloat : at::kBFloat16);
    const T *matrix = read<T>(weight), *added = bias ? read<T>(*bias) : nullptr;
    T* out = write<T>(output);
    at::parallel_for(0, outputs / LANES, grain(LANES * inputs * tokens), [&](int64_t begin, int64_t end) {
      qtale::dense_linear(matrix, added, read<Input>(in), tokens, inputs, outputs, begin * LANES, end * LANES, out);
    });
  });
  return output;
}

// The outputs `first` to `first + count` of W, (count, inputs), in the type of `like`; in memory it is transposed.
Tensor int4_dequantize(const Tensor& packed, const Tensor& scales, const Tensor& zeros, int64_t first, int64_t count,
                       const Tensor& like) {
  constexpr int64_t strip = qtale::STRIP, some = 8;  // strips at a time, which share cache lines
  const qtale::Int4Weight weight = int4_weight(packed, scales, zeros);
  TORCH_CHECK(first % strip == 0 && count % strip == 0 && first + count <= weight.strips * strip,
              "int4_dequantize takes whole strips of ", strip, " outputs");
  const int64_t stride = count + 32;  // rows a power of two apart would meet in the same places of a cache
  Tensor output = at::empty({weight.inputs, stride}, like.options());
  dispatch(like, [&](auto type) {
    using T = decltype(type);
    T* out = write<T>(output);
    const int64_t strips = count / strip;
    at::parallel_for(0, (strips + some - 1) / some, grain(some * strip * weight.inputs), [&](int64_t begin, int64_t end) {
      for (int64_t s = some * begin; s < std::min(some * end, strips); s += some)
        qtale::int4_dequantize(weight, first / strip + s, first / strip + std::min(s + some, strips), stride,
                               out + s * strip);
    });
  });
  return output.narrow(1, 0, count).t();
}

// The same from planes.
Tensor plane_dequantize(const Tensor& high, const Tensor& scales, const Tensor& zeros, at::TensorList bits, int64_t first,
                        int64_t count, const Tensor& like) {
  constexpr int64_t strip = qtale::STRIP;
  const qtale::PlaneWeight weight = plane_weight(high, scales, zeros, bits);
  TORCH_CHECK(first % strip == 0 && count % strip == 0 && first + count <= weight.strips * strip,
              "plane_dequantize takes whole strips of ", strip, " outputs");
  const int64_t stride = count + 32;  // see int4_dequantize
  Tensor output = at::empty({weight.inputs, stride}, like.options());
  dispatch(like, [&](auto type) {
    using T = decltype(type);
    T* out = write<T>(output);
    at::parallel_for(0, count / strip, grain(strip * weight.inputs), [&](int64_t begin, int64_t end) {
      qtale::plane_dequantize(weight, first / strip + begin, first / strip + end, stride, out + begin * strip);
    });
  });
  return output.narrow(1, 0, count).t();
}

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
