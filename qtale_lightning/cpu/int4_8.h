// Products of tokens in 8 bits with 4-bit weights, by integer instructions. A token's inputs are rounded in blocks of 32,
//
//     x ≈ scale · q,  scale = largest |x| of the block / 127,  q a whole number,
//
// and all sums within a block are exact: integers. So it differs from `int4_linear` by the rounding of x alone. A piece's
// even inputs lie in the low halves of its bytes and its odd ones in the high halves, so q has the even ones first.

#pragma once

#include "int4.h"

namespace qtale {

constexpr int64_t ROUNDED_BLOCK = 32;

struct RoundedInputs {
  int8_t* codes;  // (tokens, inputs), of each 8 inputs 0, 2, 4, 6, 1, 3, 5, 7
  float* scales;  // (tokens, inputs / 32)
  float* sums;    // of codes, (tokens, inputs / 32)
};

template <typename T>
inline void round_inputs(const T* x, int64_t tokens, int64_t inputs, const RoundedInputs& rounded) {
  for (int64_t block = 0; block < tokens * inputs / ROUNDED_BLOCK; block++) {
    const Lanes first = load(x + block * ROUNDED_BLOCK), second = load(x + block * ROUNDED_BLOCK + LANES);
    const float most = largest(max(max(first, -first), max(second, -second)));
    const Lanes inverse = all(most > 0 ? 127 / most : 0), magic = all(0x1.8p23f);  // nothing is left behind the point
    const Lanes values[] = {first * inverse + magic - magic, second * inverse + magic - magic};
    for (int half = 0; half < 2; half++) {
      int8_t* codes = rounded.codes + block * ROUNDED_BLOCK + half * LANES;
      store_bytes(codes, values[half]);
      using Sixteen = int8_t __attribute__((vector_size(LANES)));
      const auto in_order = bytes_at<Sixteen>(codes);
      const auto even_first =
          __builtin_shufflevector(in_order, in_order, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
      std::memcpy(codes, &even_first, sizeof even_first);
    }
    rounded.scales[block] = most / 127;
    rounded.sums[block] = sum(values[0] + values[1]);
  }
}

// Outputs of `strips` neighbouring strips for `count` tokens.
template <typename T, int strips, int count>
__attribute__((noinline)) void multiply_rounded(const Int4Weight& weight, int64_t first, const RoundedInputs& x, T* y) {
  constexpr int parts = STRIP / WIDE, all_parts = strips * parts;
  const int64_t of_group = weight.group() / ROUNDED_BLOCK, blocks = weight.inputs / ROUNDED_BLOCK;
  const uint8_t* from[strips];
  for (int s = 0; s < strips; s++) from[s] = weight.strip(first + s);
  Following<strips> following(weight, first + strips);
  Float total[all_parts][count];
  for (int p = 0; p < all_parts; p++)
    for (int t = 0; t < count; t++) total[p][t] = Float{};
  for (int64_t g = 0; g < weight.groups; g++) {
    following.terms();
    Float zero[all_parts], group[all_parts][count];
    for (int p = 0; p < all_parts; p++) {
      zero[p] = register_at(weight.zeros + weight.term(first + p / parts, g) + p % parts * WIDE);
      for (int t = 0; t < count; t++) group[p][t] = Float{};
    }
    for (int64_t block = g * of_group; block < (g + 1) * of_group; block++) {
      ByteSums dot[all_parts][count];
      for (int p = 0; p < all_parts; p++)
        for (int t = 0; t < count; t++) dot[p][t] = ByteSums{};
#pragma GCC unroll 4
      for (int piece = 0; piece < ROUNDED_BLOCK / STEP; piece++) {
        Bits even[all_parts], odd[all_parts];
        for (int p = 0; p < all_parts; p++) {
          const Bits codes = bytes_at<Bits>(from[p / parts] + p % parts * REGISTER);
          even[p] = codes & 0x0f0f0f0f;
          odd[p] = codes >> 4 & 0x0f0f0f0f;
        }
        for (int s = 0; s < strips; s++) from[s] += BYTES;
        following.piece();
        for (int t = 0; t < count; t++) {
          const int8_t* codes = x.codes + t * weight.inputs + block * ROUNDED_BLOCK + piece * STEP;
          const Bits of_even = bytes_at<uint32_t>(codes) - Bits{}, of_odd = bytes_at<uint32_t>(codes + 4) - Bits{};
          for (int p = 0; p < all_parts; p++)
            dot[p][t] = add_products(add_products(dot[p][t], even[p], of_even), odd[p], of_odd);
        }
      }
      for (int t = 0; t < count; t++) {
        const Float scale = broadcast<Float>(x.scales[t * blocks + block]);
        const Float sums = broadcast<Float>(x.sums[t * blocks + block]);
        for (int p = 0; p < all_parts; p++)
          group[p][t] = fma(fma(-zero[p], sums, number(dot[p][t])), scale, group[p][t]);
      }
    }
    for (int p = 0; p < all_parts; p++) {
      const Float scale = register_at(weight.scales + weight.term(first + p / parts, g) + p % parts * WIDE);
      for (int t = 0; t < count; t++) total[p][t] = fma(group[p][t], scale, total[p][t]);
    }
  }
  for (int p = 0; p < all_parts; p++)
    for (int t = 0; t < count; t++) store(y + (t * weight.strips + first) * STRIP + p * WIDE, total[p][t]);
}

// Strips `begin` to `end` of y (tokens, outputs), from what `round_inputs` gave.
template <typename T>
inline void int4_linear_rounded(const Int4Weight& weight, const RoundedInputs& x, int64_t tokens, int64_t begin,
                                int64_t end, T* y) {
  const int64_t blocks = weight.inputs / ROUNDED_BLOCK;
  in_tiles(tokens, weight.inputs, begin, end, [&]<int strips, int count>(Tile<strips, count>, int64_t strip, int64_t t) {
    const RoundedInputs from{x.codes + t * weight.inputs, x.scales + t * blocks, x.sums + t * blocks};
    multiply_rounded<T, strips, count>(weight, strip, from, y + t * weight.strips * STRIP);
  });
}

}  // namespace qtale
