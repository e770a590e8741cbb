// The next token of each sequence, through all decoder layers, the last norm and the head: of every layer the router, and,
// for those sequences that execute it, norm, projections, rotation, attention, and the gated MLP. It is models/routed_layer.py's layer with
// models/fused.py's modules, composed of the same kernels and rounded at the same places.
//
// A team of threads runs the whole step. What is small (norms, decisions) each thread computes for itself, which takes
// less time than waiting for another; products are shared by their outputs, attention by its heads of queries.
#pragma once

#include <vector>

#include "attention.h"
#include "layer.h"
#include "linear.h"
#include "router.h"
#include "team.h"

namespace qtale {

template <typename T>
struct Norm {
  const T* weight;  // nullptr: there is none
  float eps;
};

// A layer's router; the first weights are in float32 or, where `low` isn't nullptr, in bfloat16.
struct LayerRouter {
  const float* down;
  const BFloat16* low;
  const float* bias;
  RouterEnd end;
};

template <typename T>
struct Layer {
  bool routed;
  LayerRouter router;
  Norm<T> norm, query_norm, key_norm, mlp_norm;
  Linear<T> query, key, value, output, gate, up, down;
};

// What follows the layers: a norm, and a head, which without outputs is none.
template <typename T>
struct End {
  Norm<T> norm;
  Linear<T> head;
};

// A layer's part of the cache: buffers keys and values (B, groups, capacity, width).
template <typename T>
struct Buffer {
  T *keys, *values;
  int64_t capacity;
};

// What a step is given, of B sequences: the rotation's cosines and sines (B, width), with a stride of 0 where all have the
// same; which tokens are real, and which of them routers decide about; whether they leave keys and values in layers that they
// skip, too; decisions (routed layers, B) that replace the
// routers' (1, 0, or -1: the router's), or nullptr; θ (routed layers); buffers (layers), and how many tokens of each
// sequence they keep (layers, B). And what it gives: the routers' logits (routed layers, B, 2), decisions (layers, B), and
// normed states (B, hidden) or, where there is a head, its logits (B, outputs).
template <typename T>
struct Step {
  int64_t batch;
  const T *cos, *sin;
  int64_t stride;
  const bool *real, *free;
  bool keeps;
  const int8_t* forced;
  const double* thresholds;
  const Buffer<T>* buffers;
  const int64_t* kept;
  float* logits;
  bool* gates;
  T* output;
};

// What the team works in, for up to B tokens.
template <typename T>
struct Shared {
  std::vector<T> states, query, key, value, attended, inner, output;
  std::vector<float> wide[2];  // of routers: of a layer and of the next, which the fastest thread may have begun

  Shared(const Sizes& s, int64_t batch)
      : states(batch * s.hidden), query(batch * s.heads * s.width), key(batch * s.groups * s.width), value(key.size()),
        attended(query.size()), inner(batch * s.inner), output(batch * s.hidden),
        wide{std::vector<float>(batch * s.router), std::vector<float>(batch * s.router)} {}
};

// This thread's part of y += x · Wᵀ + b, for those rows of y (B, outputs) that the tokens x (N, inputs) belong to.
template <typename T>
inline void add_product(Team& team, const Linear<T>& linear, const T* x, Private<T>& mine, T* output, T* y) {
  const auto [first, last] = team.share(linear.outputs / LANES);
  const int64_t tokens = mine.rows.size(), begin = first * LANES, end = last * LANES;
  int64_t ready = 0;
  multiply(linear, x, tokens, begin, end, mine, ready, output);
  for (int64_t n = 0; n < tokens; n++) {
    T* to = y + mine.rows[n] * linear.outputs;
    for (int64_t i = begin; i < end; i += LANES) store(to + i, load(to + i) + load(output + n * linear.outputs + i));
  }
}

// Some sequences' tokens, normalised: (N, hidden), in `mine.tokens`.
template <typename T>
inline void normalise(const Norm<T>& norm, const T* x, int64_t hidden, const std::vector<int64_t>& rows, Private<T>& mine) {
  T* to = mine.tokens.data();
  for (const int64_t row : rows) {
    rms_norm(x + row * hidden, norm.weight, norm.eps, 1, hidden, to);
    to += hidden;
  }
}

// Logits (B, 2) of a router, in every thread.
template <typename T>
inline void route(Team& team, const LayerRouter& router, const T* x, int64_t batch, int64_t hidden,
                  Private<T>& mine, float* wide, float* logits) {
  const int64_t width = router.end.width;
  const auto [first, last] = team.share(width / LANES);
  const auto product = [&](const auto* weight, const auto* tokens) {
    using W = std::remove_cvref_t<decltype(*weight)>;
    dense_linear<W>(weight, nullptr, tokens, batch, hidden, width, first * LANES, last * LANES, wide);
  };
  if constexpr (TAKES_PAIRS<T>)
    if (router.low != nullptr) product(router.low, x);
  if (!TAKES_PAIRS<T> || router.low == nullptr) {
    for (int64_t i = 0; i < batch * hidden; i += LANES) store(mine.inputs.data() + i, load(x + i));
    if (router.low == nullptr) product(router.down, mine.inputs.data());
    else if constexpr (!PAIRS) product(router.low, mine.inputs.data());
  }
  team.wait();
  for (int64_t b = 0; b < batch; b++) route_end(wide + b * router.end.width, router.bias, router.end, logits + 2 * b);
}

// softmax(logits)[1] ≥ θ.
inline bool executes(const float* logits, double threshold) {
  const float most = std::max(logits[0], logits[1]);
  const float skip = std::exp(logits[0] - most), execute = std::exp(logits[1] - most);
  return execute / (skip + execute) >= static_cast<float>(threshold);
}

// This thread's part of some linears' outputs, which are shared as if they were one's; a pair each: where they go.
template <typename T, size_t N>
inline void project(Team& team, const std::pair<const Linear<T>*, T*> (&linears)[N], int64_t tokens, Private<T>& mine) {
  int64_t outputs = 0, ready = 0;
  for (const auto& [linear, to] : linears) outputs += linear->outputs / LANES;
  auto [first, last] = team.share(outputs);
  for (const auto& [linear, to] : linears) {
    const int64_t all = linear->outputs / LANES;
    multiply(*linear, mine.tokens.data(), tokens, std::clamp<int64_t>(first, 0, all) * LANES,
             std::clamp<int64_t>(last, 0, all) * LANES, mine, ready, to);
    first -= all, last -= all;
  }
}

// Where a sequence's keys, or values, of a group begin in a layer's buffer.
template <typename T>
inline int64_t place(const Buffer<T>& buffer, const Sizes& sizes, int64_t row, int64_t group) {
  return (row * sizes.groups + group) * buffer.capacity * sizes.width;
}

// A token's projected key of a group, normalised where the layer does, and rotated, into `mine.key`.
template <typename T>
inline void turn_key(const Sizes& sizes, const Layer<T>& layer, const Step<T>& step, int64_t row, const T* projected,
                     Private<T>& mine) {
  T* to = mine.key.data();
  if (layer.key_norm.weight != nullptr) {
    rms_norm(projected, layer.key_norm.weight, layer.key_norm.eps, 1, sizes.width, to);
    projected = to;
  }
  rotate(projected, step.cos + row * step.stride, step.sin + row * step.stride, 1, sizes.width, to);
}

// Keys and values of the sequences in `mine.skipping`, which don't execute the layer, join its buffer.
template <typename T>
inline void remember(Team& team, const Sizes& sizes, const Layer<T>& layer, const Step<T>& step, const Buffer<T>& buffer,
                     const int64_t* kept, Shared<T>& shared, Private<T>& mine, const T* x) {
  const int64_t tokens = mine.skipping.size(), width = sizes.width;
  T *key = shared.key.data(), *value = shared.value.data();
  normalise(layer.norm, x, sizes.hidden, mine.skipping, mine);
  project<T, 2>(team, {{&layer.key, key}, {&layer.value, value}}, tokens, mine);
  team.wait();
  const auto [first, last] = team.share(tokens * sizes.groups);
  for (int64_t item = first; item < last; item++) {
    const int64_t row = mine.skipping[item / sizes.groups], at = place(buffer, sizes, row, item % sizes.groups);
    turn_key(sizes, layer, step, row, key + item * width, mine);
    append(mine.key.data(), width, kept[row], buffer.keys + at);
    append(value + item * width, width, kept[row], buffer.values + at);
  }
  team.wait();
}

// One layer for the sequences in `mine.rows`: x (B, hidden) becomes what it gives.
template <typename T>
inline void execute(Team& team, const Sizes& sizes, const Layer<T>& layer, const Step<T>& step, const Buffer<T>& buffer,
                    const int64_t* kept, Shared<T>& shared, Private<T>& mine, T* x) {
  const int64_t tokens = mine.rows.size(), width = sizes.width, of_group = sizes.heads / sizes.groups;
  T *query = shared.query.data(), *key = shared.key.data(), *value = shared.value.data();

  normalise(layer.norm, x, sizes.hidden, mine.rows, mine);
  project<T, 3>(team, {{&layer.query, query}, {&layer.key, key}, {&layer.value, value}}, tokens, mine);
  team.wait();

  // By heads of queries: where two threads share a head of keys, either rotates the new key for itself.
  const auto [begin, end] = team.share(tokens * sizes.heads);
  for (int64_t head = begin, next; head < end; head = next) {
    const int64_t item = head / of_group, row = mine.rows[item / sizes.groups], group = item % sizes.groups;
    next = std::min((item + 1) * of_group, end);
    T *queries = query + head * width, *new_key = mine.key.data(), *new_value = value + item * width;
    if (layer.query_norm.weight != nullptr)
      rms_norm(queries, layer.query_norm.weight, layer.query_norm.eps, next - head, width, queries);
    rotate(queries, step.cos + row * step.stride, step.sin + row * step.stride, next - head, width, queries);
    turn_key(sizes, layer, step, row, key + item * width, mine);
    const int64_t at = place(buffer, sizes, row, group);
    attend_next(queries, new_key, new_value, buffer.keys + at, buffer.values + at, kept[row], next - head, width,
                sizes.scaling, mine.room.data(), shared.attended.data() + head * width);
    if (head == item * of_group) {
      append(new_key, width, kept[row], buffer.keys + at);
      append(new_value, width, kept[row], buffer.values + at);
    }
  }
  team.wait();

  add_product(team, layer.output, shared.attended.data(), mine, shared.output.data(), x);
  team.wait();

  normalise(layer.mlp_norm, x, sizes.hidden, mine.rows, mine);
  const auto [from, to] = team.share(sizes.inner / LANES);
  int64_t ready = 0;
  multiply(layer.gate, mine.tokens.data(), tokens, from * LANES, to * LANES, mine, ready, mine.gate.data());
  multiply(layer.up, mine.tokens.data(), tokens, from * LANES, to * LANES, mine, ready, shared.inner.data());
  for (int64_t n = 0; n < tokens; n++) {
    const int64_t at = n * sizes.inner + from * LANES;
    swiglu(mine.gate.data() + at, shared.inner.data() + at, (to - from) * LANES, shared.inner.data() + at);
  }
  team.wait();

  add_product(team, layer.down, shared.inner.data(), mine, shared.output.data(), x);
  team.wait();
}

// x (B, hidden) through all layers, in place, and what follows them.
template <typename T>
inline void decode(Team& team, const Sizes& sizes, const std::vector<Layer<T>>& layers, const End<T>& last,
                   const Step<T>& step, Shared<T>& shared, Private<T>& mine, T* x) {
  const int64_t batch = step.batch, count = layers.size();
  std::vector<float> logits(2 * batch);
  int64_t routed = 0;  // layers
  for (int64_t index = 0; index < count; index++) {
    const Layer<T>& layer = layers[index];
    if (layer.routed) {
      route(team, layer.router, x, batch, sizes.hidden, mine, shared.wide[index % 2].data(), logits.data());
      if (team.rank == 0) std::copy(logits.begin(), logits.end(), step.logits + routed * 2 * batch);
    }
    mine.rows.clear(), mine.skipping.clear();
    for (int64_t b = 0; b < batch; b++) {
      bool gate = step.real[b];
      if (layer.routed && step.free[b]) {
        const int8_t forced = step.forced == nullptr ? -1 : step.forced[routed * batch + b];
        gate = forced >= 0 ? forced != 0 : executes(logits.data() + 2 * b, step.thresholds[routed]);
      }
      if (gate) mine.rows.push_back(b);
      else if (step.keeps && step.real[b]) mine.skipping.push_back(b);
      if (team.rank == 0) step.gates[index * batch + b] = gate;
    }
    routed += layer.routed;
    const Buffer<T>& buffer = step.buffers[index];
    const int64_t* kept = step.kept + index * batch;
    if (!mine.skipping.empty()) remember(team, sizes, layer, step, buffer, kept, shared, mine, x);
    if (!mine.rows.empty()) execute(team, sizes, layer, step, buffer, kept, shared, mine, x);
  }
  if (last.head.outputs == 0) {
    if (team.rank == 0) rms_norm(x, last.norm.weight, last.norm.eps, batch, sizes.hidden, step.output);
    return;
  }
  rms_norm(x, last.norm.weight, last.norm.eps, batch, sizes.hidden, mine.tokens.data());
  const auto [first, end] = team.share(last.head.outputs / LANES);
  int64_t ready = 0;
  multiply(last.head, mine.tokens.data(), batch, first * LANES, end * LANES, mine, ready, step.output);
}

}  // namespace qtale
