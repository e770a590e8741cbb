// A model's decoder layers, final norm and head as `decode` takes them, from the tensors of its modules; and what a cache
// keeps of them.
//
// Where numbers lie is looked up once: at every token it would be hundreds of waits for memory, a tenth of a small model's
// time. Tensors are held under names of their own, so that what they point to stays, whatever becomes of the modules'.
#pragma once

#include <ATen/Parallel.h>
#include <torch/custom_class.h>

#include <tuple>

#include "decoder.h"
#include "tensors.h"

namespace {

using at::Tensor;
using qtale::Buffer;
using qtale::Layer;
using qtale::Step;

template <template <typename> class Of>
using OfEither = std::tuple<std::vector<Of<float>>, std::vector<Of<qtale::BFloat16>>>;  // one of which is empty

// Buffers of all layers' keys and values (B, groups, capacity, width), which the cache keeps: whoever calls a step sees
// that they are still there.
class Buffers : public torch::CustomClassHolder {
 public:
  int64_t batch = 0, groups = 0, width = 0;
  std::vector<int64_t> capacities;
  OfEither<Buffer> of_layers;

  Buffers(std::vector<Tensor> keys, std::vector<Tensor> values) {
    TORCH_CHECK(!keys.empty() && keys.size() == values.size(), "keys and values of each layer");
    batch = keys[0].size(0), groups = keys[0].size(1), width = keys[0].size(3);
    for (size_t index = 0; index < keys.size(); index++) {
      const Tensor &key = keys[index], &value = values[index];
      TORCH_CHECK(key.is_contiguous() && value.is_contiguous() && value.sizes() == key.sizes() && key.dim() == 4 &&
                      key.size(0) == batch && key.size(1) == groups && key.size(3) == width,
                  "buffers of keys and values are contiguous, of all sequences");
      capacities.push_back(key.size(2));
      dispatch(keys[0], [&](auto type) {
        using T = decltype(type);
        std::get<std::vector<Buffer<T>>>(of_layers).push_back({write<T>(key), write<T>(value), key.size(2)});
      });
    }
  }
};

constexpr double ROUTER_EPS = 1e-6;

// Linears are dense (weight), int4 (codes, scales, zero points), or that and an empty tensor, for tokens that are
// rounded to 8 bits, or planes (the highest bits, scales, zero points in float16, single bits).
class Decoder : public torch::CustomClassHolder {
 public:
  Decoder(int64_t heads, int64_t groups, int64_t width, double scaling, double eps, const Tensor& embeddings,
          const Tensor& last_norm)
      : eps_(static_cast<float>(eps)), dtype_(last_norm.scalar_type()), embeddings_(embeddings.detach()) {
    TORCH_CHECK(embeddings.is_contiguous() && embeddings.scalar_type() == dtype_ && embeddings.size(1) == last_norm.numel(),
                "embeddings of another type or size");
    sizes_ = {last_norm.numel(), 0, heads, groups, width, 0, static_cast<float>(scaling)};
    dispatch(last_norm, [&](auto type) { ends<decltype(type)>().push_back({norm<decltype(type)>(last_norm), {}}); });
  }

  // A layer: linears in the order of `qtale::Layer`; a router is (down, its bias in float32, norm, out, out's bias), or
  // nothing.
  void add(std::vector<Tensor> norms, std::vector<Tensor> head_norms, std::vector<std::vector<Tensor>> linears,
           std::vector<std::optional<Tensor>> biases, std::vector<Tensor> router) {
    TORCH_CHECK(norms.size() == 2 && linears.size() == 7 && biases.size() == 7, "a layer is incomplete");
    by_type([&](auto type) {
      using T = decltype(type);
      const auto linear_at = [&](int index, int64_t inputs) { return linear<T>(linears[index], biases[index], inputs); };
      const int64_t hidden = sizes_.hidden;
      Layer<T> made{};
      made.norm = norm<T>(norms[0]), made.mlp_norm = norm<T>(norms[1]);
      if (!head_norms.empty()) made.query_norm = norm<T>(head_norms[0]), made.key_norm = norm<T>(head_norms[1]);
      made.query = linear_at(0, hidden), made.key = linear_at(1, hidden), made.value = linear_at(2, hidden);
      made.output = linear_at(3, made.query.outputs);
      made.gate = linear_at(4, hidden), made.up = linear_at(5, hidden), made.down = linear_at(6, made.up.outputs);
      made.routed = !router.empty();
      if (made.routed) {
        for (Tensor& part : router) part = hold(part);
        const bool low = router[0].scalar_type() == at::kBFloat16;
        made.router = {low ? nullptr : read<float>(router[0]), low ? read<qtale::BFloat16>(router[0]) : nullptr,
                       read<float>(router[1]), router_end(router[2], ROUTER_EPS, router[3], router[4])};
        sizes_.router = router[0].size(0);
        routed_++;
      }
      sizes_.inner = made.up.outputs;
      layers<T>().push_back(made);
    });
  }

  // A head of so many outputs, the first of its linear's.
  void end(const std::vector<Tensor>& head, const std::optional<Tensor>& bias, int64_t outputs) {
    outputs_ = outputs;
    by_type([&](auto type) {
      using T = decltype(type);
      auto& last = ends<T>()[0];
      last.head = linear<T>(head, bias, sizes_.hidden);
      TORCH_CHECK(outputs <= last.head.outputs, "a head of too few outputs");
    });
  }

  // Tokens (B, 1), embedded, through all layers, the last norm and the head: logits (B, 1, outputs), or what the norm gives
  // (B, 1, D) where there is no head; the routers' logits (routed layers, B, 2) and decisions (layers, B). Keys and
  // values join the buffers of each layer behind the tokens that it keeps, `kept` (layers · B).
  std::tuple<Tensor, Tensor, Tensor> step(Tensor ids, Tensor cos, Tensor sin, Tensor real, Tensor free,
                                          bool keeps, std::vector<double> thresholds, std::optional<Tensor> forced,
                                          c10::intrusive_ptr<Buffers> buffers, std::vector<int64_t> kept) {
    const int64_t batch = ids.numel(), routed = thresholds.size(), longest = check_kept(*buffers, batch, kept);
    TORCH_CHECK(ids.is_contiguous() && ids.scalar_type() == at::kLong && cos.is_contiguous() && sin.is_contiguous() &&
                    real.is_contiguous() && free.is_contiguous() && real.numel() == batch && free.numel() == batch &&
                    sin.sizes() == cos.sizes() &&
                    (cos.numel() == sizes_.width || cos.numel() == batch * sizes_.width),
                "a step takes contiguous tensors, one token a sequence");
    TORCH_CHECK(routed == routed_, "a threshold for each routed layer");
    TORCH_CHECK(!forced || (forced->is_contiguous() && forced->numel() == routed * batch), "decisions for all routed layers");
    const auto options = embeddings_.options();
    const Tensor logits = at::empty({routed, batch, 2}, options.dtype(at::kFloat));
    const Tensor gates = at::empty({static_cast<int64_t>(buffers->capacities.size()), batch}, options.dtype(at::kBool));
    Tensor output;
    by_type([&](auto type) {
      using T = decltype(type);
      const auto& last = ends<T>()[0];
      output = at::empty({batch, 1, last.head.outputs == 0 ? sizes_.hidden : last.head.outputs}, options);
      const Step<T> step{batch, read<T>(cos), read<T>(sin), cos.numel() == sizes_.width ? 0 : sizes_.width,
                         read<bool>(real), read<bool>(free), keeps, forced ? read<int8_t>(*forced) : nullptr, thresholds.data(),
                         std::get<std::vector<Buffer<T>>>(buffers->of_layers).data(), kept.data(),
                         write<float>(logits), write<bool>(gates), write<T>(output)};
      qtale::Shared<T> shared(sizes_, batch);
      embed(read<int64_t>(ids), batch, shared.states.data());
      const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
      qtale::together(threads, [&](qtale::Team& team) {
        qtale::Private<T> mine(sizes_, batch, longest);
        qtale::decode(team, sizes_, layers<T>(), last, step, shared, mine, shared.states.data());
      });
      if (last.head.outputs > outputs_) output = output.narrow(2, 0, outputs_);
    });
    return {output, logits, gates};
  }

 private:
  // Tokens of the longest sequence, the new one too.
  int64_t check_kept(const Buffers& buffers, int64_t batch, const std::vector<int64_t>& kept) const {
    const int64_t count = buffers.capacities.size();
    const bool same_type = dtype_ == at::kFloat ? !std::get<0>(buffers.of_layers).empty() : !std::get<1>(buffers.of_layers).empty();
    TORCH_CHECK(same_type && buffers.batch == batch && buffers.groups == sizes_.groups && buffers.width == sizes_.width &&
                    count == static_cast<int64_t>(std::get<0>(layers_).size() + std::get<1>(layers_).size()) &&
                    static_cast<int64_t>(kept.size()) == count * batch,
                "a step takes buffers of all sequences, and how many tokens they keep of each layer");
    int64_t longest = 0;
    for (int64_t at = 0; at < count * batch; at++) {
      TORCH_CHECK(0 <= kept[at] && kept[at] < buffers.capacities[at / batch], "the cache has no room");
      longest = std::max(longest, kept[at] + 1);
    }
    return longest;
  }

  template <typename T>
  void embed(const int64_t* ids, int64_t batch, T* states) const {
    for (int64_t b = 0; b < batch; b++, states += sizes_.hidden) {
      TORCH_CHECK_INDEX(0 <= ids[b] && ids[b] < embeddings_.size(0), "token ", ids[b], " of ", embeddings_.size(0));
      std::copy_n(read<T>(embeddings_) + ids[b] * sizes_.hidden, sizes_.hidden, states);
    }
  }

  template <typename F>
  void by_type(F&& run) {
    if (dtype_ == at::kFloat) run(float{});
    else run(qtale::BFloat16{});
  }
  template <typename T>
  std::vector<Layer<T>>& layers() { return std::get<std::vector<Layer<T>>>(layers_); }
  template <typename T>
  std::vector<qtale::End<T>>& ends() { return std::get<std::vector<qtale::End<T>>>(ends_); }

  Tensor hold(const Tensor& tensor) {
    TORCH_CHECK(tensor.is_contiguous(), "weights must be contiguous");
    return held_.emplace_back(tensor.detach());
  }

  template <typename T>
  qtale::Norm<T> norm(const Tensor& weight) { return {read<T>(hold(weight)), eps_}; }

  template <typename T>
  qtale::Linear<T> linear(const std::vector<Tensor>& weight, const std::optional<Tensor>& added, int64_t inputs) {
    const T* bias = added ? read<T>(hold(*added)) : nullptr;
    std::vector<Tensor> parts;
    for (const Tensor& part : weight) parts.push_back(hold(part));
    qtale::Linear<T> made{nullptr, {}, parts.size() == 4, bias, inputs, 0};
    int64_t takes = 0;
    if (parts.size() == 1) {
      made.dense = read<T>(parts[0]), made.outputs = parts[0].size(0), takes = parts[0].size(1);
    } else if (parts[2].scalar_type() == at::kHalf) {
      made.rounded = false;
      made.planes = plane_weight(parts[0], parts[1], parts[2], at::TensorList(parts).slice(3));
      made.outputs = made.planes.strips * qtale::STRIP, takes = made.planes.inputs;
    } else {
      made.int4 = int4_weight(parts[0], parts[1], parts[2]);
      made.outputs = made.int4.strips * qtale::STRIP, takes = made.int4.inputs;
    }
    TORCH_CHECK(takes == inputs || (made.int4.codes != nullptr && takes == 2 * inputs), "a linear of other inputs");
    return made;
  }

  qtale::Sizes sizes_;
  float eps_;
  at::ScalarType dtype_;
  int64_t outputs_ = 0, routed_ = 0;  // of the head; layers
  OfEither<Layer> layers_;
  OfEither<qtale::End> ends_;
  std::vector<Tensor> held_;
  Tensor embeddings_;
};

}  // namespace
