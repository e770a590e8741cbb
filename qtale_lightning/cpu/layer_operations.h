// What Python calls of a layer between its linears, and of routers: checks of tensors, and threads.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "attention.h"
#include "layer.h"
#include "router.h"
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

}  // namespace
