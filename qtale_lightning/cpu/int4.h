// Products of tokens with 4-bit weights, and the weights as numbers for products of many tokens.
//
//     y = x · Wᵀ,  W = (code - zero) · scale,  scale and zero of a group of a row's inputs
//
// Layout, for 16 outputs (a strip) and 8 inputs: 64 bytes, 4 of each output, the first input's code lowest. A mask keeps
// the codes of one input i where they are, which makes them 2⁴ⁱ times what they should be; the token's input is 2⁻⁴ⁱ
// times what it should be. So three instructions, mask, conversion and multiplication, take an input of 16 outputs.
// Nothing is rounded but float32 sums and the output.

#pragma once

#include "lanes.h"

namespace qtale {

constexpr int64_t STRIP = LANES, STEP = 8, BYTES = 64;  // outputs, inputs and bytes of a piece of the layout
constexpr int64_t AHEAD = 2048;                         // bytes between what is read and what is fetched for later
constexpr int SUMS = LANES_HELD / 2;                    // sixteens of sums that leave the other factors room
constexpr int TOKENS = std::min(8, SUMS);               // multiplied at a time

struct Int4Weight {
  const uint8_t* codes;   // (strips, inputs / 8, 64)
  const Half* scales;     // (strips, groups, 16)
  const uint8_t* zeros;   // (strips, groups, 16)
  int64_t strips, inputs, groups;

  int64_t group() const { return inputs / groups; }
  const uint8_t* strip(int64_t index) const { return codes + index * (inputs / STEP) * BYTES; }
  int64_t term(int64_t strip, int64_t group) const { return (strip * groups + group) * STRIP; }
};

// The codes of input i (of 8) times 2⁴ⁱ; those of the last one as they are, since they would be negative.
QTALE_INLINE Float code_in_place(Bits piece, int i) {
  return number(i == STEP - 1 ? piece >> (4 * i) : piece & (15u << (4 * i)));
}

// Inputs as `multiply` takes them, (tokens, inputs), and their sums over groups, (tokens, groups).
template <typename T>
inline void int4_inputs(const T* x, int64_t tokens, const Int4Weight& weight, float* scaled, float* sums) {
  constexpr float powers[LANES] = {0x1p0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1,
                                   0x1p0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};
  const Lanes factor = load(powers);
  for (int64_t g = 0; g < tokens * weight.groups; g++) {  // groups follow each other, within a token and to the next one
    Lanes total = all(0);
    for (int64_t i = g * weight.group(); i < (g + 1) * weight.group(); i += LANES) {
      const Lanes value = load(x + i);
      store(scaled + i, value * factor);
      total = total + value;
    }
    sums[g] = sum(total);
  }
}

// Outputs of `strips` neighbouring strips for `count` tokens; by registers, of which a strip has several. Inlined, GCC
// would keep half of the sums in memory, and take twice the time.
template <typename T, int strips, int count>
__attribute__((noinline)) void multiply(const Int4Weight& weight, int64_t first, const float* x, const float* sums,
                                        T* y) {
  constexpr int chains = count == 1 ? 2 : 1;  // of additions: one alone would wait for itself
  constexpr int parts = STRIP / WIDE, all_parts = strips * parts;
  const int64_t pieces = weight.group() / STEP;
  const uint8_t* from[strips];
  for (int s = 0; s < strips; s++) from[s] = weight.strip(first + s);
  Float total[all_parts][count];
  for (int p = 0; p < all_parts; p++)
    for (int t = 0; t < count; t++) total[p][t] = Float{};
  for (int64_t g = 0; g < weight.groups; g++) {
    Float dot[all_parts][count][chains];
    for (int p = 0; p < all_parts; p++)
      for (int t = 0; t < count; t++)
        for (int c = 0; c < chains; c++) dot[p][t][c] = Float{};
    for (int64_t piece = 0; piece < pieces; piece++) {
      Bits codes[all_parts];
      for (int s = 0; s < strips; s++) {
        for (int p = 0; p < parts; p++) codes[s * parts + p] = bytes_at<Bits>(from[s] + p * REGISTER);
        __builtin_prefetch(from[s] + AHEAD);
        from[s] += BYTES;
      }
      const float* inputs = x + g * weight.group() + piece * STEP;
#pragma GCC unroll 8
      for (int i = 0; i < STEP; i++) {
        Float level[all_parts];
        for (int p = 0; p < all_parts; p++) level[p] = code_in_place(codes[p], i);
        for (int t = 0; t < count; t++) {
          const Float input = broadcast<Float>(inputs[t * weight.inputs + i]);
          for (int p = 0; p < all_parts; p++) dot[p][t][i % chains] = fma(level[p], input, dot[p][t][i % chains]);
        }
      }
    }
    for (int p = 0; p < all_parts; p++) {
      const int64_t term = weight.term(first + p / parts, g) + p % parts * WIDE;
      const Float scale = register_at(weight.scales + term), zero = register_at(weight.zeros + term);
      for (int t = 0; t < count; t++) {
        Float of_group = dot[p][t][0];
        if (chains == 2) of_group = of_group + dot[p][t][chains - 1];
        of_group = fma(-zero, broadcast<Float>(sums[t * weight.groups + g]), of_group);
        total[p][t] = fma(of_group, scale, total[p][t]);
      }
    }
  }
  for (int p = 0; p < all_parts; p++)
    for (int t = 0; t < count; t++) store(y + (t * weight.strips + first) * STRIP + p * WIDE, total[p][t]);
}

// Strips `begin` to `end` of y (tokens, outputs), from what `int4_inputs` gave.
template <typename T>
inline void int4_linear(const Int4Weight& weight, const float* x, const float* sums, int64_t tokens, int64_t begin,
                        int64_t end, T* y) {
  const auto block = [&]<int count>(std::integral_constant<int, count>, int64_t strip, int64_t t) {
    constexpr int strips = 2 * count <= SUMS ? 2 : 1;
    const float *from = x + t * weight.inputs, *of_groups = sums + t * weight.groups;
    T* to = y + t * weight.strips * STRIP;
    const int64_t last = std::min<int64_t>(strip + 2, end);
    for (; strip + strips <= last; strip += strips) multiply<T, strips, count>(weight, strip, from, of_groups, to);
    if (strip < last) multiply<T, 1, count>(weight, strip, from, of_groups, to);
  };
  for (int64_t strip = begin; strip < end; strip += 2)
    for (int64_t t = 0; t < tokens; t += TOKENS)  // the strips stay in the nearest caches meanwhile
      [&]<int... n>(std::integer_sequence<int, n...>) {
        const int64_t count = std::min<int64_t>(TOKENS, tokens - t);
        ((count == n + 1 ? block(std::integral_constant<int, n + 1>(), strip, t) : void()), ...);
      }(std::make_integer_sequence<int, TOKENS>());
}

// Outputs of strips `begin` to `end` of W, transposed: of a matrix (inputs, stride) the columns from `y` on.
template <typename T>
inline void int4_dequantize(const Int4Weight& weight, int64_t begin, int64_t end, int64_t stride, T* y) {
  for (int64_t g = 0; g < weight.groups; g++)
    for (int64_t at = g * weight.group(); at < (g + 1) * weight.group(); at += STEP)
      for (int64_t s = begin; s < end; s++) {
        const int64_t term = weight.term(s, g);
        const Lanes scale = load(weight.scales + term), zero = load(weight.zeros + term);
        const Words codes = load_words(weight.strip(s) + at / STEP * BYTES);
        T* to = y + at * stride + (s - begin) * STRIP;
        for (int i = 0; i < STEP; i++) store(to + i * stride, (number(codes >> (4 * i) & 15) - zero) * scale);
      }
}

}  // namespace qtale
