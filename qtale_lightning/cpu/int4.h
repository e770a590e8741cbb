// Products of tokens with 4-bit weights, and the weights as numbers.
//
//     y = x · Wᵀ,  W = (code - zero) · scale,  scale and zero of a group of a row's inputs
//
// Layout, for 16 outputs (a strip) and 8 inputs: 64 bytes, 4 of each output, the first input's code lowest. Codes become
// factors where they lie, in few instructions (see the forms below). Nothing is rounded but float32 sums and the output.

#pragma once

#include "lanes.h"

namespace qtale {

constexpr int64_t STRIP = LANES, STEP = 8, BYTES = 64;  // outputs, inputs and bytes of a piece of the layout
constexpr int64_t NEAR = 1 << 18;                       // bytes of inputs that stay in a near cache
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

// What is multiplied after some strips, fetched meanwhile: in its order in memory, which is what memory gives fastest,
// while several strips are read at a time.
template <int strips>
struct Following {
  const uint8_t *codes, *zeros;
  const Half* scales;

  Following(const Int4Weight& weight, int64_t first)
      : codes(weight.strip(first)), zeros(weight.zeros + weight.term(first, 0)),
        scales(weight.scales + weight.term(first, 0)) {}

  QTALE_INLINE void piece() {
    for (int s = 0; s < strips; s++) __builtin_prefetch(codes + s * BYTES, 0, 2);
    codes += strips * BYTES;
  }
  QTALE_INLINE void terms() {  // of a group
    __builtin_prefetch(scales, 0, 2);
    __builtin_prefetch(zeros, 0, 2);
    scales += strips * STRIP, zeros += strips * STRIP;
  }
};

// ------------------------------------------------------------------------------------------- how codes are multiplied

// In float32: a mask keeps the codes of one input i of 8 where they are, which makes them 2⁴ⁱ times what they should be;
// the token's input is 2⁻⁴ⁱ times what it should be. So mask, conversion and multiplication are all there is.
struct Singles {
  using Input = float;
  static constexpr int INPUTS = STEP;  // of a piece
  static constexpr float OFFSET = 0;   // that factors have

  static QTALE_INLINE Float factor(Bits piece, int i) {  // the last one would be negative where it is
    return number(i == STEP - 1 ? piece >> (4 * i) : piece & (15u << (4 * i)));
  }
  static QTALE_INLINE Float add(Float sum, Float factor, Input input) {
    return fma(factor, broadcast<Float>(input), sum);
  }
  template <typename T>
  static QTALE_INLINE void prepare(const T* x, Input* inputs) {  // of 16
    constexpr float powers[LANES] = {0x1p0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1,
                                     0x1p0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};
    store(inputs, load(x) * load(powers));
  }
};

#if defined(__AVX512BF16__)
// In pairs of bfloat16, inputs i and i + 4, whose codes are in the lower and the upper half of a lane: as the last bits of
// bfloat16's 128 they are 128 + code, exactly.
struct Pairs {
  using Input = uint32_t;
  static constexpr int INPUTS = STEP / 2;
  static constexpr float OFFSET = 128;

  static QTALE_INLINE Bits factor(Bits piece, int i) { return (piece >> (4 * i) & 0x000f000f) | 0x43004300; }
  static QTALE_INLINE Float add(Float sum, Bits factor, Input input) { return add_pair(sum, factor, Bits{} + input); }
  static QTALE_INLINE void prepare(const BFloat16* x, Input* inputs) {
    using Sixteen = uint16_t __attribute__((vector_size(2 * LANES)));
    const auto bits = bytes_at<Sixteen>(x);
    const auto pairs = __builtin_shufflevector(bits, bits, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    std::memcpy(inputs, &pairs, sizeof pairs);
  }
};
template <typename T>
using Form = std::conditional_t<std::is_same_v<T, BFloat16>, Pairs, Singles>;
#else
template <typename T>
using Form = Singles;
#endif

// Tokens as `int4_linear` takes them.
template <typename T>
struct Int4Inputs {
  using Of = Form<T>;
  typename Of::Input* values;  // (tokens, inputs / 8 · Of::INPUTS)
  float* sums;                 // over groups, (tokens, groups)

  static int64_t width(const Int4Weight& weight) { return weight.inputs / STEP * Of::INPUTS; }
};

template <typename T>
inline void int4_inputs(const T* x, int64_t tokens, const Int4Weight& weight, const Int4Inputs<T>& to) {
  for (int64_t g = 0; g < tokens * weight.groups; g++) {  // groups follow each other, within a token and to the next one
    Lanes total = all(0);
    for (int64_t i = g * weight.group(); i < (g + 1) * weight.group(); i += LANES) {
      Form<T>::prepare(x + i, to.values + i / STEP * Form<T>::INPUTS);
      total = total + load(x + i);
    }
    to.sums[g] = sum(total);
  }
}

// ------------------------------------------------------------------------------------------------------- the products

// Outputs of `strips` neighbouring strips for `count` tokens; by registers, of which a strip has several. Inlined, GCC
// would keep half of the sums in memory, and take twice the time.
template <typename T, int strips, int count>
__attribute__((noinline)) void multiply(const Int4Weight& weight, int64_t first, const Int4Inputs<T>& x, T* y) {
  using Of = Form<T>;
  constexpr int chains = count == 1 ? 2 : 1;  // of additions: one alone would wait for itself
  constexpr int parts = STRIP / WIDE, all_parts = strips * parts;
  const int64_t pieces = weight.group() / STEP, width = x.width(weight);
  const uint8_t* from[strips];
  for (int s = 0; s < strips; s++) from[s] = weight.strip(first + s);
  Following<strips> following(weight, first + strips);
  Float total[all_parts][count];
  for (int p = 0; p < all_parts; p++)
    for (int t = 0; t < count; t++) total[p][t] = Float{};
  for (int64_t g = 0; g < weight.groups; g++) {
    following.terms();
    Float dot[all_parts][count][chains];
    for (int p = 0; p < all_parts; p++)
      for (int t = 0; t < count; t++)
        for (int c = 0; c < chains; c++) dot[p][t][c] = Float{};
    for (int64_t piece = 0; piece < pieces; piece++) {
      Bits codes[all_parts];
      for (int s = 0; s < strips; s++) {
        for (int p = 0; p < parts; p++) codes[s * parts + p] = bytes_at<Bits>(from[s] + p * REGISTER);
        from[s] += BYTES;
      }
      following.piece();
      const auto* inputs = x.values + (g * pieces + piece) * Of::INPUTS;
#pragma GCC unroll 8
      for (int i = 0; i < Of::INPUTS; i++) {
        decltype(Of::factor(codes[0], 0)) factor[all_parts];
        for (int p = 0; p < all_parts; p++) factor[p] = Of::factor(codes[p], i);
        for (int t = 0; t < count; t++) {
          const auto input = inputs[t * width + i];
          for (int p = 0; p < all_parts; p++) dot[p][t][i % chains] = Of::add(dot[p][t][i % chains], factor[p], input);
        }
      }
    }
    for (int p = 0; p < all_parts; p++) {
      const int64_t term = weight.term(first + p / parts, g) + p % parts * WIDE;
      const Float scale = register_at(weight.scales + term), zero = register_at(weight.zeros + term) + Of::OFFSET;
      for (int t = 0; t < count; t++) {
        Float of_group = dot[p][t][0];
        if (chains == 2) of_group = of_group + dot[p][t][chains - 1];
        of_group = fma(-zero, broadcast<Float>(x.sums[t * weight.groups + g]), of_group);
        total[p][t] = fma(of_group, scale, total[p][t]);
      }
    }
  }
  for (int p = 0; p < all_parts; p++)
    for (int t = 0; t < count; t++) store(y + (t * weight.strips + first) * STRIP + p * WIDE, total[p][t]);
}

template <int of_strips, int of_tokens>
struct Tile {};

// Calls run(Tile<strips, count>(), strip, token) for all tokens, of `bytes` each, and strips from `begin` to `end`: in
// tiles whose sums fit the registers, and for tokens that stay in a near cache while the weights pass.
template <typename F>
inline void in_tiles(int64_t tokens, int64_t bytes, int64_t begin, int64_t end, F&& run) {
  const auto row = [&]<int count>(Tile<0, count>, int64_t strip, int64_t t) {
    constexpr int strips = 2 * count <= SUMS ? 2 : 1;
    const int64_t last = std::min<int64_t>(strip + 2, end);
    for (; strip + strips <= last; strip += strips) run(Tile<strips, count>(), strip, t);
    if (strip < last) run(Tile<1, count>(), strip, t);
  };
  const int64_t together = std::max<int64_t>(1, NEAR / bytes / TOKENS) * TOKENS;
  for (int64_t from = 0; from < tokens; from += together)
    for (int64_t strip = begin; strip < end; strip += 2)
      for (int64_t t = from; t < std::min(from + together, tokens); t += TOKENS)
        [&]<int... n>(std::integer_sequence<int, n...>) {
          const int64_t count = std::min<int64_t>(TOKENS, tokens - t);
          ((count == n + 1 ? row(Tile<0, n + 1>(), strip, t) : void()), ...);
        }(std::make_integer_sequence<int, TOKENS>());
}

// Strips `begin` to `end` of y (tokens, outputs), from what `int4_inputs` gave.
template <typename T>
inline void int4_linear(const Int4Weight& weight, const Int4Inputs<T>& x, int64_t tokens, int64_t begin, int64_t end,
                        T* y) {
  const int64_t width = x.width(weight);
  in_tiles(tokens, width * 4, begin, end, [&]<int strips, int count>(Tile<strips, count>, int64_t strip, int64_t t) {
    const Int4Inputs<T> from{x.values + t * width, x.sums + t * weight.groups};
    multiply<T, strips, count>(weight, strip, from, y + t * weight.strips * STRIP);
  });
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
