// A linear of a decoded token's layers, in whichever form its weights are, and what its product works in.
#pragma once

#include <vector>

#include "attention.h"
#include "dense.h"
#include "int4.h"
#include "int4_8.h"
#include "planes.h"

namespace qtale {

// A linear: dense weights (outputs, inputs) in the tokens' type, or else int4, for tokens as they are or rounded to 8 bits,
// or planes (whose highest bits aren't nullptr); with a bias (outputs), or nullptr. Weights of more bits are int4 ones side
// by side, which see the same token: those then have the linear's inputs several times.
template <typename T>
struct Linear {
  const T* dense;
  Int4Weight int4;
  bool rounded;
  const T* bias;
  int64_t inputs, outputs;
  PlaneWeight planes{};
};

// Sizes that all layers have in common.
struct Sizes {
  int64_t hidden, inner, heads, groups, width, router;  // of the residual stream, the MLP, heads (and a head), routers
  float scaling;
};

// What a thread works in by itself.
template <typename T>
struct Private {
  std::vector<T> tokens, gate, key;
  std::vector<float> inputs, sums, room;
  std::vector<int8_t> codes;
  std::vector<int64_t> rows, skipping;  // sequences that execute a layer, and those that leave keys and values alone

  Private(const Sizes& s, int64_t batch, int64_t longest)
      : tokens(batch * s.hidden), gate(batch * s.inner), key(s.width),
        inputs(2 * batch * std::max({s.hidden, s.inner, s.heads * s.width})),  // twice for planes
        sums(inputs.size() / LANES), room(attention_room(s.heads / s.groups, s.width, longest)), codes(inputs.size()) {
    rows.reserve(batch), skipping.reserve(batch);
  }
};

// Outputs `begin` to `end` of a linear, in multiples of LANES, for tokens whose form `ready` says it has in `inputs`
// already: that of dense weights (1), of planes in so many groups (2 + groups), or of int4 weights in so many parts, which
// take them rounded (-parts), or in so many groups (-2 groups - parts).
template <typename T>
inline void multiply(const Linear<T>& linear, const T* x, int64_t tokens, int64_t begin, int64_t end, Private<T>& mine,
                     int64_t& ready, T* y) {
  if (begin == end) return;
  if (linear.dense != nullptr) {
    const DenseInput<T>* inputs;
    if constexpr (std::is_same_v<DenseInput<T>, T>) {
      inputs = x;
    } else {
      if (ready != 1)
        for (int64_t i = 0; i < tokens * linear.inputs; i += LANES) store(mine.inputs.data() + i, load(x + i));
      ready = 1;
      inputs = mine.inputs.data();
    }
    dense_linear(linear.dense, linear.bias, inputs, tokens, linear.inputs, linear.outputs, begin, end, y);
    return;
  }
  const Int4Weight& weight = linear.int4;
  const int64_t parts = weight.inputs / linear.inputs;
  const auto repeat = [&](auto&& run) {  // run(token, part) for all parts of all tokens
    for (int64_t part = 0; part < tokens * parts; part++) run(x + part / parts * linear.inputs, part);
  };
  if (linear.planes.high != nullptr) {
    using Inputs = PlaneInputs<T>;
    const Inputs inputs{reinterpret_cast<typename Inputs::Input*>(mine.inputs.data()), mine.sums.data()};
    if (ready != 2 + linear.planes.groups) plane_inputs(x, tokens, linear.planes, inputs);
    ready = 2 + linear.planes.groups;
    plane_linear(linear.planes, inputs, tokens, begin / STRIP, end / STRIP, y);
  } else if (linear.rounded) {
    const int64_t blocks = weight.inputs / ROUNDED_BLOCK, of_part = linear.inputs / ROUNDED_BLOCK;
    const RoundedInputs inputs{mine.codes.data(), mine.inputs.data(), mine.inputs.data() + tokens * blocks};
    if (ready != -parts)
      repeat([&](const T* token, int64_t part) {
        round_inputs(token, 1, linear.inputs, {inputs.codes + part * linear.inputs, inputs.scales + part * of_part,
                                               inputs.sums + part * of_part});
      });
    ready = -parts;
    int4_linear_rounded(weight, inputs, tokens, begin / STRIP, end / STRIP, y);
  } else {
    using Inputs = Int4Inputs<T>;
    const Inputs inputs{reinterpret_cast<typename Inputs::Of::Input*>(mine.inputs.data()), mine.sums.data()};
    const int64_t form = -2 * weight.groups - parts;
    if (ready != form) {
      Int4Weight of_part = weight;
      of_part.inputs = linear.inputs, of_part.groups = weight.groups * linear.inputs / weight.inputs;
      repeat([&](const T* token, int64_t part) {
        const Inputs to{inputs.values + part * Inputs::width(of_part), inputs.sums + part * of_part.groups};
        int4_inputs(token, 1, of_part, to);
      });
    }
    ready = form;
    int4_linear(weight, inputs, tokens, begin / STRIP, end / STRIP, y);
  }
  if (linear.bias != nullptr)
    for (int64_t at = 0; at < tokens * linear.outputs; at += linear.outputs)
      for (int64_t i = begin; i < end; i += LANES) store(y + at + i, load(y + at + i) + load(linear.bias + i));
}

}  // namespace qtale
