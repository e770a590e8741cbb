// Products of few tokens with weights of 2, 3 and 4 bits that lie in planes: the highest 2 bits of all codes, and a plane
// for each further bit. A narrower weight is what is read of a wider one's planes, so that no more than its bits are.
//
//     code = 2ⁿ · high + Σ 2ⁿ⁻¹⁻ᵏ · bitₖ,  y = x · Wᵀ,  W = (code - zero) · scale
//
// A piece of a plane has 64 bytes, 4 of each of 16 outputs (a strip): 16 inputs of the highest bits, 32 of a single one.
// Every plane is multiplied by itself, with the same instructions (see the forms), and the sums of a group are put
// together; nothing is rounded but float32 sums and the output.
#pragma once

#include "int4.h"

namespace qtale {

constexpr int64_t PLANE_INPUTS = 32;  // a group has a multiple of them
constexpr int PLANE_TOKENS = 4;       // multiplied at a time
constexpr int MOST_BITS = 2;          // planes of single bits
constexpr int64_t AHEAD = 2048;       // bytes between what is read of a plane and what is fetched for later

struct PlaneWeight {
  const uint8_t* high;             // (strips, inputs / 16, 64)
  const uint8_t* bits[MOST_BITS];  // (strips, inputs / 32, 64), the higher one first
  int count;                       // of these
  const Half *scales, *zeros;      // (strips, groups, 16); zero points may be fractions
  int64_t strips, inputs, groups;

  int64_t group() const { return inputs / groups; }
  int64_t term(int64_t strip, int64_t group) const { return (strip * groups + group) * STRIP; }
};

// ------------------------------------------------------------------------------- how fields of so many bits are multiplied

// In float32: a mask keeps the field of input i where it is, and the token's input is as much smaller: see int4.h.
template <int bits>
struct SingleFields {
  using Input = float;
  static constexpr int STEPS = 32 / bits;  // of a piece: one an input
  static constexpr float OFFSET = 0;       // that factors have

  static QTALE_INLINE Float factor(Bits piece, int i) {
    constexpr uint32_t field = (1u << bits) - 1;
    return number(i == STEPS - 1 ? piece >> (bits * i) : piece & (field << (bits * i)));
  }
  static QTALE_INLINE Float add(Float sum, Float factor, Input input) {
    return fma(factor, broadcast<Float>(input), sum);
  }
  static constexpr float power(int64_t i) {
    float value = 1;
    for (int64_t n = i % STEPS == STEPS - 1 ? 0 : i % STEPS * bits; n > 0; n--) value /= 2;
    return value;
  }
  template <typename T>
  static QTALE_INLINE float prepare(const T* x, Input* inputs) {  // of 32; gives OFFSET times the sum of these
    constexpr auto powers = []<int... i>(std::integer_sequence<int, i...>) {
      struct { float of[PLANE_INPUTS]; } made{{power(i)...}};
      return made;
    }(std::make_integer_sequence<int, PLANE_INPUTS>());
    for (int64_t i = 0; i < PLANE_INPUTS; i += LANES) store(inputs + i, load(x + i) * load(powers.of + i));
    return 0;
  }
};

#if defined(__AVX512BF16__)
// In pairs of bfloat16, of the inputs whose fields are at the same place in the lower and the upper half of a lane. Some
// are the last bits of bfloat16's 128 where they are, times a power of 2 by which the token's inputs are smaller.
template <int bits>
struct PairFields {
  using Input = uint32_t;
  static constexpr int STEPS = 16 / bits, IN_PLACE = 7 / bits;
  static constexpr float OFFSET = 128;

  static QTALE_INLINE Bits factor(Bits piece, int i) {
    constexpr uint32_t field = (1u << bits) - 1;
    const int place = i % IN_PLACE;
    return (piece >> (bits * (i - place)) & (field << (bits * place)) * 0x00010001u) | 0x43004300u;
  }
  static QTALE_INLINE Float add(Float sum, Bits factor, Input input) { return add_pair(sum, factor, Bits{} + input); }
  static constexpr float power(int i) { return 1.0f / (1 << i % STEPS % IN_PLACE * bits); }
  static QTALE_INLINE float prepare(const BFloat16* x, Input* inputs) {
    constexpr float powers[LANES] = {power(0), power(1), power(2),  power(3),  power(4),  power(5),  power(6),  power(7),
                                     power(8), power(9), power(10), power(11), power(12), power(13), power(14), power(15)};
    const Lanes first = load(x), second = load(x + LANES), by = load(powers);
    Lanes low = first, high = second;
    if constexpr (bits == 2) {
      low = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      high = __builtin_shufflevector(first, second, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    low = low * by, high = high * by;  // exactly
    const Bits pairs = (Bits)low >> 16 | ((Bits)high & 0xffff0000u);
    std::memcpy(inputs, &pairs, sizeof pairs);
    return OFFSET * sum(low + high);
  }
};
template <int bits, typename T>
using Fields = std::conditional_t<std::is_same_v<T, BFloat16>, PairFields<bits>, SingleFields<bits>>;
#else
template <int bits, typename T>
using Fields = SingleFields<bits>;
#endif

// Tokens as `plane_linear` takes them: for the highest bits, and for single ones; and over groups the sums of the inputs,
// and of the offsets of both, (tokens, groups, 3).
template <typename T>
struct PlaneInputs {
  using Input = typename Fields<1, T>::Input;
  static constexpr int64_t SUMS_OF = 3;
  Input* values;  // (tokens, 2, inputs / 32 · STEPS of single bits)
  float* sums;

  static int64_t half(const PlaneWeight& weight) { return weight.inputs / PLANE_INPUTS * Fields<1, T>::STEPS; }
  static int64_t width(const PlaneWeight& weight) { return 2 * half(weight); }
};

template <typename T>
inline void plane_inputs(const T* x, int64_t tokens, const PlaneWeight& weight, const PlaneInputs<T>& to) {
  constexpr int64_t steps = Fields<1, T>::STEPS;
  const int64_t half = to.half(weight);
  float* sums = to.sums;
  for (int64_t t = 0; t < tokens; t++) {
    auto* values = to.values + t * to.width(weight);
    for (int64_t g = 0; g < weight.groups; g++, sums += to.SUMS_OF) {
      Lanes total = all(0);
      sums[1] = sums[2] = 0;
      for (int64_t i = 0; i < weight.group(); i += PLANE_INPUTS, x += PLANE_INPUTS, values += steps) {
        sums[1] += Fields<2, T>::prepare(x, values);
        sums[2] += Fields<1, T>::prepare(x, values + half);
        total = total + load(x) + load(x + LANES);
      }
      sums[0] = sum(total);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- the products

// Adds what `pieces` pieces of a plane give for `count` tokens; by registers, of which a strip has several.
template <int bits, typename T, int strips, int count, int chains>
QTALE_INLINE void add_plane(const uint8_t** from, int64_t pieces, const typename PlaneInputs<T>::Input* inputs, int64_t width,
                            Float (&dot)[strips * int{STRIP} / WIDE][count][chains]) {
  using Of = Fields<bits, T>;
  constexpr int parts = STRIP / WIDE, all_parts = strips * parts;
  for (int64_t piece = 0; piece < pieces; piece++, inputs += Of::STEPS) {
    Bits fields[all_parts];
    for (int s = 0; s < strips; s++) {
      for (int p = 0; p < parts; p++) fields[s * parts + p] = bytes_at<Bits>(from[s] + p * REGISTER);
      __builtin_prefetch(from[s] + AHEAD);
      from[s] += BYTES;
    }
#pragma GCC unroll 32
    for (int i = 0; i < Of::STEPS; i++) {
      decltype(Of::factor(fields[0], 0)) factor[all_parts];
      for (int p = 0; p < all_parts; p++) factor[p] = Of::factor(fields[p], i);
      for (int t = 0; t < count; t++)
        for (int p = 0; p < all_parts; p++)
          dot[p][t][i % chains] = Of::add(dot[p][t][i % chains], factor[p], inputs[t * width + i]);
    }
  }
}

// Outputs of `strips` neighbouring strips for `count` tokens.
template <typename T, int strips, int count>
__attribute__((noinline)) void multiply_planes(const PlaneWeight& weight, int64_t first, const PlaneInputs<T>& x, T* y) {
  constexpr int chains = count == 1 ? 2 : 1, parts = STRIP / WIDE, all_parts = strips * parts;
  const int64_t steps = weight.group() / PLANE_INPUTS, half = x.half(weight), width = x.width(weight);
  const int64_t bytes = steps * weight.groups * BYTES;  // of a strip's plane of single bits
  const uint8_t *high[strips], *low[MOST_BITS][strips];
  for (int s = 0; s < strips; s++) {
    high[s] = weight.high + (first + s) * 2 * bytes;
    for (int k = 0; k < weight.count; k++) low[k][s] = weight.bits[k] + (first + s) * bytes;
  }
  Float total[all_parts][count];
  for (int p = 0; p < all_parts; p++)
    for (int t = 0; t < count; t++) total[p][t] = Float{};
  for (int64_t g = 0; g < weight.groups; g++) {
    const auto* inputs = x.values + g * steps * Fields<1, T>::STEPS;
    Float group[all_parts][count];
    const auto add = [&]<int bits>(std::integral_constant<int, bits>, const uint8_t** from, bool first_one) {
      Float dot[all_parts][count][chains];
      for (int p = 0; p < all_parts; p++)
        for (int t = 0; t < count; t++)
          for (int c = 0; c < chains; c++) dot[p][t][c] = Float{};
      add_plane<bits, T, strips, count, chains>(from, steps * bits, inputs + (bits == 1 ? half : 0), width, dot);
      for (int t = 0; t < count; t++) {
        const Float offset = broadcast<Float>(x.sums[(t * weight.groups + g) * x.SUMS_OF + (bits == 1 ? 2 : 1)]);
        for (int p = 0; p < all_parts; p++) {
          const Float sum = (chains == 2 ? dot[p][t][0] + dot[p][t][chains - 1] : dot[p][t][0]) - offset;
          group[p][t] = first_one ? sum : fma(group[p][t], Float{} + 2, sum);
        }
      }
    };
    add(std::integral_constant<int, 2>(), high, true);
    for (int k = 0; k < weight.count; k++) add(std::integral_constant<int, 1>(), low[k], false);
    for (int p = 0; p < all_parts; p++) {
      const int64_t term = weight.term(first + p / parts, g) + p % parts * WIDE;
      const Float scale = register_at(weight.scales + term), zero = register_at(weight.zeros + term);
      for (int t = 0; t < count; t++) {
        const Float sum = broadcast<Float>(x.sums[(t * weight.groups + g) * x.SUMS_OF]);
        total[p][t] = fma(fma(-zero, sum, group[p][t]), scale, total[p][t]);
      }
    }
  }
  for (int p = 0; p < all_parts; p++)
    for (int t = 0; t < count; t++) store(y + (t * weight.strips + first) * STRIP + p * WIDE, total[p][t]);
}

// Strips `begin` to `end` of y (tokens, outputs), from what `plane_inputs` gave.
template <typename T>
inline void plane_linear(const PlaneWeight& weight, const PlaneInputs<T>& x, int64_t tokens, int64_t begin, int64_t end,
                         T* y) {
  const auto some = [&]<int count>(std::integral_constant<int, count>, int64_t t) {
    constexpr int strips = LANES_HELD >= 32 && count < PLANE_TOKENS ? 2 : 1;
    const PlaneInputs<T> from{x.values + t * x.width(weight), x.sums + t * weight.groups * x.SUMS_OF};
    T* to = y + t * weight.strips * STRIP;
    int64_t strip = begin;
    for (; strip + strips <= end; strip += strips) multiply_planes<T, strips, count>(weight, strip, from, to);
    if (strip < end) multiply_planes<T, 1, count>(weight, strip, from, to);
  };
  int64_t t = 0;
  for (; t + PLANE_TOKENS <= tokens; t += PLANE_TOKENS) some(std::integral_constant<int, PLANE_TOKENS>(), t);
  for (; t + 2 <= tokens; t += 2) some(std::integral_constant<int, 2>(), t);
  if (t < tokens) some(std::integral_constant<int, 1>(), t);
}

// Outputs of strips `begin` to `end` of W, transposed: of a matrix (inputs, stride) the columns from `y` on.
template <typename T>
inline void plane_dequantize(const PlaneWeight& weight, int64_t begin, int64_t end, int64_t stride, T* y) {
  const int64_t pieces = weight.inputs / PLANE_INPUTS;
  for (int64_t s = begin; s < end; s++)
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t at = piece * PLANE_INPUTS, term = weight.term(s, at / weight.group());
      const Lanes scale = load(weight.scales + term), zero = load(weight.zeros + term);
      for (int64_t i = 0; i < PLANE_INPUTS; i++) {
        const Words high = load_words(weight.high + (2 * (s * pieces + piece) + i / 16) * BYTES);
        Lanes code = number(high >> static_cast<int>(i % 16 * 2) & 3);
        for (int k = 0; k < weight.count; k++)
          code = code + code + number(load_words(weight.bits[k] + (s * pieces + piece) * BYTES) >> static_cast<int>(i) & 1);
        store(y + (at + i) * stride + (s - begin) * STRIP, (code - zero) * scale);
      }
    }
}

}  // namespace qtale
