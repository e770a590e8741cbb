// A model's decoder layers as `decode` takes them, from the tensors of its modules.
#pragma once

#include <ATen/Parallel.h>
#include <torch/custom_class.h>

#include "decoder.h"
#include "tensors.h"

namespace {

using qtale::Layer;
using qtale::Step;
using at::Tensor;

// Tensors of one layer: linears are dense (weight), int4 (codes, scales, zero points), or
// that and an empty tensor, for tokens that are rounded to 8 bits, or planes (the highest bits, scales, zero points in
// float16, single bits); in the order of `qtale::Layer`; a router is (down, its bias in float32, norm, out, out's bias), or nothing.
struct LayerTensors {
  std::vector<Tensor> norms, head_norms, router;
  std::vector<std::vector<Tensor>> linears;
  std::vector<std::optional<Tensor>> biases;
  std::vector<qtale::Linear<float>> quantized;  // where their numbers are; of dense ones nothing
};

// Of quantized weights, what doesn't depend on the tokens' type. It is found once: to look it up takes a dozen waits for
// memory, which would be a tenth of a small model's token. Dense weights can be given another storage.
qtale::Linear<float> quantized_of(const std::vector<Tensor>& weight) {
  if (weight.size() == 1) return {};
  if (weight[2].scalar_type() == at::kHalf) {
    const auto planes = plane_weight(weight[0], weight[1], weight[2], at::TensorList(weight).slice(3));
    return {nullptr, {}, false, nullptr, planes.inputs, planes.strips * qtale::STRIP, planes};
  }
  const qtale::Int4Weight int4 = int4_weight(weight[0], weight[1], weight[2]);
  return {nullptr, int4, weight.size() == 4, nullptr, int4.inputs, int4.strips * qtale::STRIP};
}

constexpr double ROUTER_EPS = 1e-6;

class Decoder : public torch::CustomClassHolder {
 public:
  Decoder(int64_t heads, int64_t groups, int64_t width, double scaling, double eps, Tensor last_norm)
      : eps_(static_cast<float>(eps)), last_norm_(std::move(last_norm)) {
    sizes_ = {last_norm_.numel(), 0, heads, groups, width, 0, static_cast<float>(scaling)};
  }

  void add(std::vector<Tensor> norms, std::vector<Tensor> head_norms, std::vector<std::vector<Tensor>> linears,
           std::vector<std::optional<Tensor>> biases, std::vector<Tensor> router) {
    for (const auto& weight : linears)
      for (const Tensor& tensor : weight) TORCH_CHECK(tensor.is_contiguous(), "weights must be contiguous");
    layers_.push_back({std::move(norms), std::move(head_norms), std::move(router), std::move(linears), std::move(biases), {}});
    LayerTensors& layer = layers_.back();
    for (const auto& weight : layer.linears) layer.quantized.push_back(quantized_of(weight));
    TORCH_CHECK(layer.norms.size() == 2 && layer.linears.size() == 7 && layer.biases.size() == 7, "a layer is incomplete");
    const std::vector<Tensor>& up = layer.linears[5];
    sizes_.inner = up.size() == 1 ? up[0].size(0) : up[0].size(0) * qtale::STRIP;
    if (!layer.router.empty()) sizes_.router = layer.router[0].size(0);
  }

  // Tokens x (B, …, D), one a sequence, through all layers and the last norm: what they become, logits
  // (routed layers, B, 2) and decisions (layers, B). Keys and values join the buffers of each layer behind the tokens that
  // it keeps, `kept` (layers · B).
  std::tuple<Tensor, Tensor, Tensor> step(Tensor x, Tensor cos, Tensor sin, Tensor real, Tensor free,
                                          std::vector<double> thresholds, std::optional<Tensor> forced,
                                          std::vector<Tensor> keys, std::vector<Tensor> values,
                                          std::vector<int64_t> kept) {
    const int64_t batch = x.numel() / sizes_.hidden, count = layers_.size(), routed = thresholds.size();
    TORCH_CHECK(x.is_contiguous() && cos.is_contiguous() && sin.is_contiguous() && real.is_contiguous() &&
                    free.is_contiguous() && real.numel() == batch && free.numel() == batch &&
                    sin.sizes() == cos.sizes() &&
                    (cos.numel() == sizes_.width || cos.numel() == batch * sizes_.width),
                "a step takes contiguous tensors, one token a sequence");
    TORCH_CHECK(static_cast<int64_t>(keys.size()) == count && static_cast<int64_t>(values.size()) == count &&
                    static_cast<int64_t>(kept.size()) == count * batch,
                "a step takes keys, values and how many are kept of each layer");
    TORCH_CHECK(!forced || (forced->is_contiguous() && forced->numel() == routed * batch), "decisions for all routed layers");
    int64_t longest = 0;
    for (int64_t index = 0; index < count; index++) {
      const Tensor& buffer = keys[index];
      TORCH_CHECK(buffer.is_contiguous() && values[index].is_contiguous() && values[index].sizes() == buffer.sizes() &&
                      buffer.dim() == 4 && buffer.size(0) == batch && buffer.size(1) == sizes_.groups &&
                      buffer.size(3) == sizes_.width,
                  "a step takes contiguous buffers of keys and values, of all sequences");
      for (int64_t b = 0; b < batch; b++) {
        const int64_t length = kept[index * batch + b];
        TORCH_CHECK(0 <= length && length < buffer.size(2), "the cache has no room");
        longest = std::max(longest, length + 1);
      }
    }
    const Tensor output = x.clone(), normed = at::empty_like(x);
    const Tensor logits = at::empty({routed, batch, 2}, x.options().dtype(at::kFloat));
    const Tensor gates = at::empty({count, batch}, x.options().dtype(at::kBool));
    dispatch(x, [&](auto type) {
      using T = decltype(type);
      std::vector<Layer<T>> layers;
      layers.reserve(count);
      auto threshold = thresholds.begin();
      for (int64_t index = 0; index < count; index++) {
        Layer<T>& layer = layers.emplace_back(layer_of<T>(layers_[index]));
        if (layer.routed) {
          TORCH_CHECK(threshold != thresholds.end(), "a threshold for each routed layer");
          layer.router.threshold = static_cast<float>(*threshold++);
        }
        layer.keys = write<T>(keys[index]), layer.values = write<T>(values[index]);
        layer.kept = kept.data() + index * batch, layer.capacity = keys[index].size(2);
      }
      const Step<T> step{batch, read<T>(cos), read<T>(sin), cos.numel() == sizes_.width ? 0 : sizes_.width,
                         read<bool>(real), read<bool>(free), forced ? read<int8_t>(*forced) : nullptr,
                         write<float>(logits), write<bool>(gates)};
      qtale::Shared<T> shared(sizes_, batch);
      const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
      qtale::together(threads, [&](qtale::Team& team) {
        qtale::Private<T> mine(sizes_, batch, longest);
        qtale::decode(team, sizes_, layers, step, shared, mine, write<T>(output));
      });
      qtale::rms_norm(read<T>(output), read<T>(last_norm_), eps_, batch, sizes_.hidden,
                      write<T>(normed));
    });
    return {normed, logits, gates};
  }

 private:
  template <typename T>
  Layer<T> layer_of(const LayerTensors& layer) const {
    const auto linear = [&](int index) {
      const T* bias = layer.biases[index] ? read<T>(*layer.biases[index]) : nullptr;
      const auto& known = layer.quantized[index];
      if (known.inputs != 0)
        return qtale::Linear<T>{nullptr, known.int4, known.rounded, bias, known.inputs, known.outputs, known.planes};
      const Tensor& dense = layer.linears[index][0];
      return qtale::Linear<T>{read<T>(dense), {}, false, bias, dense.size(1), dense.size(0)};
    };
    const auto norm = [&](const std::vector<Tensor>& norms, size_t index) {
      return qtale::Norm<T>{index < norms.size() ? read<T>(norms[index]) : nullptr, eps_};
    };
    Layer<T> made{};
    made.norm = norm(layer.norms, 0), made.mlp_norm = norm(layer.norms, 1);
    made.query_norm = norm(layer.head_norms, 0), made.key_norm = norm(layer.head_norms, 1);
    made.query = linear(0), made.key = linear(1), made.value = linear(2), made.output = linear(3);
    made.gate = linear(4), made.up = linear(5), made.down = linear(6);
    made.routed = !layer.router.empty();
    if (made.routed) {
      const std::vector<Tensor>& router = layer.router;
      const bool low = router[0].scalar_type() == at::kBFloat16;
      made.router = {low ? nullptr : read<float>(router[0]), low ? read<qtale::BFloat16>(router[0]) : nullptr,
                     read<float>(router[1]), router_end(router[2], ROUTER_EPS, router[3], router[4]), 0};
    }
    return made;
  }

  qtale::Sizes sizes_;
  float eps_;
  Tensor last_norm_;
  std::vector<LayerTensors> layers_;
};

}  // namespace
