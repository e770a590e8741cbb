// Sixteen numbers at a time, on every processor: in float32, from and to memory in float32 or bfloat16.
//
// They are one register, a pair, or a pair of pairs, and what is done to a pair is done to both of its halves. So the
// operations, written for sixteen, are the same everywhere, in the order of their sums too.
//
// Why not PyTorch's at::vec, or Highway: see benchmarks/README.md.
#pragma once

#include "registers.h"

namespace qtale {

template <typename H>
struct Pair { H low, high; };

using Lanes = std::conditional_t<WIDE == 16, Float, std::conditional_t<WIDE == 8, Pair<Float>, Pair<Pair<Float>>>>;
using Words = std::conditional_t<WIDE == 16, Bits, std::conditional_t<WIDE == 8, Pair<Bits>, Pair<Pair<Bits>>>>;

#define QTALE_BOTH(op)                                                                              \
  template <typename H>                                                                             \
  QTALE_INLINE Pair<H> operator op(Pair<H> a, Pair<H> b) { return {a.low op b.low, a.high op b.high}; }
QTALE_BOTH(+)
QTALE_BOTH(-)
QTALE_BOTH(*)
QTALE_BOTH(/)
#undef QTALE_BOTH

template <typename H>
QTALE_INLINE Pair<H> operator&(Pair<H> a, uint32_t b) { return {a.low & b, a.high & b}; }
template <typename H>
QTALE_INLINE Pair<H> operator>>(Pair<H> a, int b) { return {a.low >> b, a.high >> b}; }
template <typename H>
QTALE_INLINE Pair<H> operator-(Pair<H> a) { return {-a.low, -a.high}; }

template <typename H>
QTALE_INLINE Pair<H> fma(Pair<H> a, Pair<H> b, Pair<H> c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
template <typename H>
QTALE_INLINE Pair<H> max(Pair<H> a, Pair<H> b) { return {max(a.low, b.low), max(a.high, b.high)}; }
template <typename H>
QTALE_INLINE Pair<H> min(Pair<H> a, Pair<H> b) { return {min(a.low, b.low), min(a.high, b.high)}; }
template <typename H>
QTALE_INLINE Pair<H> where_equal(Pair<H> a, Pair<H> b, Pair<H> then, Pair<H> otherwise) {
  return {where_equal(a.low, b.low, then.low, otherwise.low), where_equal(a.high, b.high, then.high, otherwise.high)};
}
template <typename H>
QTALE_INLINE Pair<H> sign(Pair<H> x) { return {sign(x.low), sign(x.high)}; }
template <typename H>
QTALE_INLINE Pair<H> whole(Pair<H> x) { return {whole(x.low), whole(x.high)}; }
template <typename H>
QTALE_INLINE Pair<H> exp(Pair<H> x) { return {exp(x.low), exp(x.high)}; }
template <typename H>
QTALE_INLINE auto number(Pair<H> x) -> Pair<decltype(number(x.low))> { return {number(x.low), number(x.high)}; }
template <typename T, typename H>
QTALE_INLINE Pair<H> rounded(Pair<H> x) { return {rounded<T>(x.low), rounded<T>(x.high)}; }
template <typename H>
QTALE_INLINE float sum(Pair<H> x) { return sum(x.low + x.high); }
template <typename H>
QTALE_INLINE float largest(Pair<H> x) { return largest(max(x.low, x.high)); }
template <typename T, typename H>
QTALE_INLINE void store(T* x, Pair<H> value) {
  store(x, value.low);
  store(x + sizeof(H) / 4, value.high);
}

template <typename H>
QTALE_INLINE void store_bytes(int8_t* x, Pair<H> value) {
  store_bytes(x, value.low);
  store_bytes(x + sizeof(H) / 4, value.high);
}

template <typename V, typename T>
QTALE_INLINE V lanes_at(const T* x) {
  if constexpr (sizeof(V) == REGISTER) return register_at(x);
  else return {lanes_at<decltype(V::low)>(x), lanes_at<decltype(V::high)>(x + sizeof(V) / 8)};
}
template <typename T>
QTALE_INLINE Lanes load(const T* x) { return lanes_at<Lanes>(x); }
QTALE_INLINE Words load_words(const void* x) { return lanes_at<Words>(static_cast<const uint32_t*>(x)); }
QTALE_INLINE Lanes all(float x) { return broadcast<Lanes>(x); }

// The sums of sixteen times sixteen numbers: each as `sum` takes it.
QTALE_INLINE Lanes sums(const Lanes* x) {
#if defined(__AVX512F__)
  Float of_8[8], of_4[4], of_2[2];
  const auto add = [](Float a, Float b) { return a + b; };
  // In which order of x's a lane of the last register comes is known: i, i + 4, i + 8, i + 12.
  for (int i = 0; i < 8; i++) {
    const Float a = x[4 * (2 * i % 4) + 2 * i / 4], b = x[4 * ((2 * i + 1) % 4) + 2 * i / 4];
    of_8[i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; i++) {
    const Float a = of_8[2 * i], b = of_8[2 * i + 1];
    of_4[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  for (int i = 0; i < 2; i++) {
    const auto a = (__m512d)of_4[2 * i], b = (__m512d)of_4[2 * i + 1];
    of_2[i] = add((Float)_mm512_unpacklo_pd(a, b), (Float)_mm512_unpackhi_pd(a, b));
  }
  return add(_mm512_shuffle_ps(of_2[0], of_2[1], 0x88), _mm512_shuffle_ps(of_2[0], of_2[1], 0xdd));
#else
  float each[LANES];
  for (int i = 0; i < LANES; i++) each[i] = sum(x[i]);
  return load(each);
#endif
}

// Whether there is an instruction that multiplies pairs of bfloat16, exactly, and adds both products to a lane.
#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
QTALE_INLINE Lanes add_pairs(const BFloat16* a, const BFloat16* b, Lanes c) {
  return add_pair(c, bytes_at<Bits>(a), bytes_at<Bits>(b));
}
#else
constexpr bool PAIRS = false;
inline Lanes add_pairs(const BFloat16*, const BFloat16*, Lanes c) { return c; }
#endif

// Dot products of `rows` neighbouring rows of a matrix with one vector.
template <int rows, typename T>
QTALE_INLINE void products(const T* matrix, const float* x, int64_t width, float* y) {
  Lanes total[rows];
  for (int r = 0; r < rows; r++) total[r] = all(0);
  for (int64_t i = 0; i < width; i += LANES) {
    const Lanes value = load(x + i);
    for (int r = 0; r < rows; r++) total[r] = fma(load(matrix + r * width + i), value, total[r]);
  }
  for (int r = 0; r < rows; r++) y[r] = sum(total[r]);
}

}  // namespace qtale
