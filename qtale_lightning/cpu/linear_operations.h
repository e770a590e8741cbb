// What Python calls of linears' products with few tokens, and of weights of few bits as numbers: checks of tensors, and
// threads.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "dense.h"
#include "int4_8.h"
#include "planes.h"
#include "tensors.h"

namespace {

using qtale::LANES;

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

}  // namespace
