// Sixteen numbers at a time, in float32, from and to memory in float32 or bfloat16.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace qtale {

constexpr int64_t LANES = 16;

// Items of so many numbers each that are worth a thread of their own.
inline int64_t grain(int64_t numbers) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, numbers)); }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load(const c10::BFloat16* x) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }

inline void store(float* x, __m512 value) { _mm512_storeu_ps(x, value); }
inline void store(c10::BFloat16* x, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), narrow(value));
}

// Rounds as storing to a tensor of this type between two operations would.
template <typename T>
inline __m512 rounded(__m512 value);
template <>
inline __m512 rounded<float>(__m512 value) { return value; }
template <>
inline __m512 rounded<c10::BFloat16>(__m512 value) { return widen(narrow(value)); }

// Dot products of `rows` neighbouring rows of a matrix with one vector.
template <int rows, typename T>
inline void products(const T* matrix, const float* x, int64_t width, float* y) {
  __m512 sum[rows];
  for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += LANES) {
    const __m512 value = load(x + i);
    for (int r = 0; r < rows; r++) sum[r] = _mm512_fmadd_ps(load(matrix + r * width + i), value, sum[r]);
  }
  for (int r = 0; r < rows; r++) y[r] = _mm512_reduce_add_ps(sum[r]);
}

// Calls a function template's instance for a tensor's type; the callers take no other types.
template <typename F>
void dispatch(const at::Tensor& like, F&& run) {
  if (like.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    TORCH_CHECK(like.scalar_type() == at::kBFloat16, "float32 or bfloat16 is needed, not ", like.scalar_type());
    run(c10::BFloat16{});
  }
}

}  // namespace qtale
