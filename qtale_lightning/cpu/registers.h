// A register of numbers, as wide as the processor's: 16 with AVX-512, 8 with AVX2, 4 with NEON. The compiler's own vectors
// do the arithmetic; what it has no word for (a fused multiplication, conversions of halves) is in this file and in
// lanes.h alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define QTALE_INLINE inline __attribute__((always_inline))

namespace qtale {

constexpr int64_t LANES = 16;

#if defined(__AVX512F__)
constexpr int REGISTER = 64, REGISTERS = 32;  // bytes of one, and how many there are
#elif defined(__AVX2__)
constexpr int REGISTER = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int REGISTER = 16, REGISTERS = 32;
#else
#error "these operations are for AVX2, AVX-512 and NEON"
#endif
constexpr int WIDE = REGISTER / 4;                             // numbers in a register
constexpr int LANES_HELD = REGISTERS * WIDE / int{LANES};      // sixteens that the registers hold

using Float = float __attribute__((vector_size(REGISTER)));
using Bits = uint32_t __attribute__((vector_size(REGISTER)));
using Int = int32_t __attribute__((vector_size(REGISTER)));
using Shorts = uint16_t __attribute__((vector_size(REGISTER / 2)));
using Bytes = uint8_t __attribute__((vector_size(REGISTER / 4)));

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <typename V>
QTALE_INLINE V bytes_at(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// a · b + c, rounded once.
QTALE_INLINE Float fma(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return vfmaq_f32(c, a, b);
#endif
}

QTALE_INLINE Float max(Float a, Float b) { return a > b ? a : b; }
QTALE_INLINE Float min(Float a, Float b) { return a < b ? a : b; }
QTALE_INLINE Float where_equal(Float a, Float b, Float then, Float otherwise) { return a == b ? then : otherwise; }
QTALE_INLINE Float sign(Float x) { return x > 0 ? Float{} + 1 : x < 0 ? Float{} - 1 : Float{}; }

// The nearest whole number, of two the even one, below 2²².
QTALE_INLINE Float whole(Float x) { return x + 0x1.8p23f - 0x1.8p23f; }

QTALE_INLINE Float widen(Shorts x) {
#if defined(__AVX512F__)  // what GCC 12 makes of __builtin_convertvector takes three times as many instructions
  const Bits wide = (Bits)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  const Bits wide = (Bits)_mm256_cvtepu16_epi32((__m128i)x);
#else
  const Bits wide = __builtin_convertvector(x, Bits);
#endif
  return (Float)(wide << 16);
}

// To the nearest bfloat16, of two the even one, as the instructions do; these take denormal numbers for 0. Behind it are
// 16 bits that mean nothing.
QTALE_INLINE Bits nearest(Float x) {
  const Bits bits = (Bits)x;
  return x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;  // a NaN stays one
}

QTALE_INLINE Shorts narrow(Float x) {
#if defined(__AVX512BF16__)
  return (Shorts)_mm512_cvtneps_pbh(x);
#elif defined(__AVX512F__)
  return (Shorts)_mm512_cvtepi32_epi16((__m512i)(nearest(x) >> 16));
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)(nearest(x) >> 16), packed = _mm256_packus_epi32(wide, wide);  // of each half
  return (Shorts)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
  return vmovn_u32(nearest(x) >> 16);
#endif
}

QTALE_INLINE Float register_at(const float* x) { return bytes_at<Float>(x); }
QTALE_INLINE Float register_at(const BFloat16* x) { return widen(bytes_at<Shorts>(x)); }
QTALE_INLINE Float register_at(const Half* x) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits)));
#endif
}
QTALE_INLINE Float register_at(const uint8_t* x) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
  return __builtin_convertvector(__builtin_convertvector(bytes_at<Bytes>(x), Int), Float);
#endif
}
QTALE_INLINE Bits register_at(const uint32_t* x) { return bytes_at<Bits>(x); }

QTALE_INLINE void store(float* x, Float value) { std::memcpy(x, &value, sizeof value); }
QTALE_INLINE void store(BFloat16* x, Float value) {
  const Shorts low = narrow(value);
  std::memcpy(x, &low, sizeof low);
}

// Whole numbers from -128 to 127.
QTALE_INLINE void store_bytes(int8_t* x, Float value) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtps_epi32(value);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm_packs_epi16(shorts, shorts));
#else
  const Bytes bytes = __builtin_convertvector(__builtin_convertvector(value, Int), Bytes);
  std::memcpy(x, &bytes, sizeof bytes);
#endif
}

// Rounds as storing to memory of this type between two operations would.
template <typename T>
QTALE_INLINE Float rounded(Float value) {
  if constexpr (!std::is_same_v<T, BFloat16>) return value;
#if defined(__AVX512BF16__)
  return widen(narrow(value));
#else
  return (Float)(nearest(value) & 0xffff0000);
#endif
}

#if defined(__AVX512BF16__)
// sum + a · b of the two bfloat16 numbers in each lane.
QTALE_INLINE Float add_pair(Float sum, Bits a, Bits b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

QTALE_INLINE Float number(Bits x) { return __builtin_convertvector((Int)x, Float); }  // below 2³¹

// Sums of four neighbouring products, of bytes from 0 to 15 with bytes from -127 to 127, in every lane; of 8 such calls at
// most, since where there is no instruction for it they are summed in 16 bits.
#if defined(__AVX512VNNI__) || defined(__aarch64__)
using ByteSums = Int;
#else
using ByteSums = int16_t __attribute__((vector_size(REGISTER)));
#endif
QTALE_INLINE ByteSums add_products(ByteSums sums, Bits unsigned_bytes, Bits signed_bytes) {
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif defined(__AVX512F__)
  return sums + (ByteSums)_mm512_maddubs_epi16((__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif defined(__AVX2__)
  return sums + (ByteSums)_mm256_maddubs_epi16((__m256i)unsigned_bytes, (__m256i)signed_bytes);
#else
  const int8x16_t a = (int8x16_t)unsigned_bytes, b = (int8x16_t)signed_bytes;
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sums, a, b);
#else
  return vpadalq_s16(sums, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
#endif
#endif
}
QTALE_INLINE Float number(ByteSums sums) {
#if defined(__AVX512VNNI__) || defined(__aarch64__)
  return __builtin_convertvector(sums, Float);
#elif defined(__AVX512F__)
  return __builtin_convertvector((Int)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)), Float);
#else
  return __builtin_convertvector((Int)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)), Float);
#endif
}

template <typename V>
QTALE_INLINE V broadcast(float x) {
  if constexpr (sizeof(V) == REGISTER) return x - V{};
  else return {broadcast<decltype(V::low)>(x), broadcast<decltype(V::high)>(x)};
}

// exp(x) = 2ⁿ · exp(r), |r| ≤ ln(2) / 2, by a polynomial (that of Cephes' expf): off by 1 unit in the last place at most;
// 0 where it would be denormal, and infinity from 88.37 on, where n is larger than float32's largest power of 2.
QTALE_INLINE Float exp(Float x) {
  const auto all = broadcast<Float>;
  const Float magic = all(0x1.8p23f);  // so large that nothing is left behind the point
  const Float shifted = fma(x, all(0x1.715476p0f), magic), n = shifted - magic;
  const Float r = fma(n, all(0x1.05c61p-29f), fma(n, all(-0x1.62e43p-1f), x));
  Float p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const Float y = p * (Float)(((Int)shifted - ((Int)magic - 127)) << 23);
  const Float infinite = x > all(88.37f) ? all(std::numeric_limits<float>::infinity()) : y;  // NaN stays
  return x < all(-87.33f) ? all(0) : infinite;
}

// Of all lanes, in halves: lane i with lane i + n / 2.
using Float4 = float __attribute__((vector_size(16)));
QTALE_INLINE float sum(Float4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
QTALE_INLINE float largest(Float4 x) { return std::max(std::max(x[0], x[2]), std::max(x[1], x[3])); }
#if defined(__AVX2__)
using Float8 = float __attribute__((vector_size(32)));
QTALE_INLINE Float4 low(Float8 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
QTALE_INLINE Float4 high(Float8 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
QTALE_INLINE float sum(Float8 x) { return sum(low(x) + high(x)); }
QTALE_INLINE float largest(Float8 x) { return std::max(largest(low(x)), largest(high(x))); }
#endif
#if defined(__AVX512F__)
QTALE_INLINE Float8 low(Float x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
QTALE_INLINE Float8 high(Float x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
QTALE_INLINE float sum(Float x) { return sum(low(x) + high(x)); }
QTALE_INLINE float largest(Float x) { return std::max(largest(low(x)), largest(high(x))); }
#endif

}  // namespace qtale
