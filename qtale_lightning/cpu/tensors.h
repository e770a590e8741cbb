// From PyTorch's tensors to the numbers that operations take, and what is checked there.
#pragma once

#include <ATen/ATen.h>

#include "int4.h"
#include "planes.h"
#include "router.h"

namespace {

using at::Tensor;

// Items of so many numbers each that are worth a thread of their own.
int64_t grain(int64_t numbers) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, numbers)); }

// Calls a function template's instance for a tensor's type.
template <typename F>
void dispatch(const Tensor& like, F&& run) {
  if (like.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    TORCH_CHECK(like.scalar_type() == at::kBFloat16, "float32 or bfloat16 is needed, not ", like.scalar_type());
    run(qtale::BFloat16{});
  }
}

// A tensor's numbers, whose type is checked.
template <typename T>
const T* read(const Tensor& tensor) {
  using Of = std::conditional_t<std::is_same_v<T, qtale::BFloat16>, at::BFloat16,
                                std::conditional_t<std::is_same_v<T, qtale::Half>, at::Half, T>>;
  return reinterpret_cast<const T*>(tensor.const_data_ptr<Of>());
}
template <typename T>
T* write(const Tensor& tensor) {
  using Of = std::conditional_t<std::is_same_v<T, qtale::BFloat16>, at::BFloat16, T>;
  return reinterpret_cast<T*>(tensor.mutable_data_ptr<Of>());
}

qtale::RouterEnd router_end(const Tensor& norm, double eps, const Tensor& out, const Tensor& out_bias) {
  return {read<float>(norm), read<float>(out), read<float>(out_bias), static_cast<float>(eps), out.size(1)};
}

qtale::Int4Weight int4_weight(const Tensor& packed, const Tensor& scales, const Tensor& zeros) {
  return {read<uint8_t>(packed), read<qtale::Half>(scales), read<uint8_t>(zeros),
          packed.size(0), packed.size(1) * qtale::STEP, scales.size(1)};
}

// Of the highest bits (strips, inputs / 16, 64), and of planes of single ones (strips, inputs / 32, 64).
qtale::PlaneWeight plane_weight(const Tensor& high, const Tensor& scales, const Tensor& zeros, at::TensorList bits) {
  qtale::PlaneWeight weight{read<uint8_t>(high), {}, static_cast<int>(bits.size()), read<qtale::Half>(scales),
                            read<qtale::Half>(zeros), high.size(0), high.size(1) * qtale::PLANE_INPUTS / 2,
                            scales.size(1)};
  TORCH_CHECK(weight.count <= qtale::MOST_BITS && weight.group() % qtale::PLANE_INPUTS == 0,
              "planes are of 2 to 4 bits, in groups of a multiple of ", qtale::PLANE_INPUTS);
  for (int k = 0; k < weight.count; k++) weight.bits[k] = read<uint8_t>(bits[k]);
  return weight;
}

}  // namespace
