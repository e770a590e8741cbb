// Products of tokens with 4-bit weights, and the weights as bfloat16 for products of many tokens.
//
//     y = x · Wᵀ,  W = (code - zero) · scale,  scale and zero of a group of a row's inputs
//
// Layout, for 16 outputs (a strip) and 8 inputs: 64 bytes, 4 of each output, the first input's code lowest. So a shift
// brings the codes of one input to the bottom of 16 lanes, a table lookup makes them floats, and one instruction
// multiplies them with a token's input and adds them up. Nothing is rounded but float32 sums and the output.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "lanes.h"

namespace qtale {

constexpr int64_t STRIP = LANES, STEP = 8, BYTES = 64;  // outputs, inputs and bytes of a piece of the layout
constexpr int64_t AHEAD = 2048;                         // bytes between what is read and what is fetched for later
constexpr int TOKENS = 8;                               // multiplied at a time: more would not fit the registers

struct Weight {
  const uint8_t* codes;        // (strips, inputs / 8, 64)
  const c10::Half* scales;     // (strips, groups, 16)
  const uint8_t* zeros;        // (strips, groups, 16)
  int64_t outputs, inputs, group;

  Weight(const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& zero)
      : codes(packed.const_data_ptr<uint8_t>()),
        scales(scale.const_data_ptr<c10::Half>()),
        zeros(zero.const_data_ptr<uint8_t>()),
        outputs(packed.size(0) * STRIP),
        inputs(packed.size(1) * STEP),
        group(inputs / scale.size(1)) {}

  const uint8_t* strip(int64_t index) const { return codes + index * (inputs / STEP) * BYTES; }
  int64_t term(int64_t index, int64_t of_group) const { return (index * (inputs / group) + of_group) * STRIP; }
  __m512 scale(int64_t at) const {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + at)));
  }
  __m512 zero(int64_t at) const {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + at))));
  }
};

// Outputs of `strips` neighbouring strips for `count` tokens x, whose sums are (token, group).
template <typename T, int strips, int count>
inline void multiply(const Weight& weight, int64_t first, const float* x, const float* sums, T* y) {
  // The codes minus 8, which keeps sums small. A lookup reads the lowest 4 bits of a lane.
  const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  constexpr int chains = count == 1 ? 2 : 1;  // of additions: one alone would wait for itself
  const int64_t groups = weight.inputs / weight.group, pieces = weight.group / STEP;
  const uint8_t* from[strips];
  for (int s = 0; s < strips; s++) from[s] = weight.strip(first + s);
  __m512 total[strips][count];
  for (int s = 0; s < strips; s++)
    for (int t = 0; t < count; t++) total[s][t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512 sum[strips][count][chains];
    for (int s = 0; s < strips; s++)
      for (int t = 0; t < count; t++)
        for (int c = 0; c < chains; c++) sum[s][t][c] = _mm512_setzero_ps();
    for (int64_t piece = 0; piece < pieces; piece++) {
      __m512i codes[strips];
      for (int s = 0; s < strips; s++) {
        codes[s] = _mm512_loadu_si512(from[s]);
        _mm_prefetch(reinterpret_cast<const char*>(from[s] + AHEAD), _MM_HINT_T0);
        from[s] += BYTES;
      }
      const float* inputs = x + g * weight.group + piece * STEP;
#pragma GCC unroll 8
      for (int i = 0; i < STEP; i++) {
        __m512 level[strips];
        for (int s = 0; s < strips; s++)
          level[s] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[s], 4 * i), levels);
        for (int t = 0; t < count; t++) {
          const __m512 input = _mm512_set1_ps(inputs[t * weight.inputs + i]);
          for (int s = 0; s < strips; s++)
            sum[s][t][i % chains] = _mm512_fmadd_ps(level[s], input, sum[s][t][i % chains]);
        }
      }
    }
    for (int s = 0; s < strips; s++) {
      const int64_t term = weight.term(first + s, g);
      const __m512 scale = weight.scale(term), offset = _mm512_sub_ps(_mm512_set1_ps(8.0f), weight.zero(term));
      for (int t = 0; t < count; t++) {
        __m512 dot = sum[s][t][0];
        if (chains == 2) dot = _mm512_add_ps(dot, sum[s][t][chains - 1]);
        dot = _mm512_fmadd_ps(offset, _mm512_set1_ps(sums[t * groups + g]), dot);
        total[s][t] = _mm512_fmadd_ps(dot, scale, total[s][t]);
      }
    }
  }
  for (int s = 0; s < strips; s++)
    for (int t = 0; t < count; t++) store(y + t * weight.outputs + (first + s) * STRIP, total[s][t]);
}

template <typename T, int strips>
inline void multiply_all(const Weight& weight, int64_t first, int64_t tokens, const float* x, const float* sums, T* y) {
  const int64_t groups = weight.inputs / weight.group;
  for (int64_t t = 0; t < tokens; t += TOKENS) {  // the strips stay in the nearest caches meanwhile
    const float *from = x + t * weight.inputs, *of = sums + t * groups;
    T* to = y + t * weight.outputs;
    switch (std::min<int64_t>(TOKENS, tokens - t)) {
      case 1: multiply<T, strips, 1>(weight, first, from, of, to); break;
      case 2: multiply<T, strips, 2>(weight, first, from, of, to); break;
      case 3: multiply<T, strips, 3>(weight, first, from, of, to); break;
      case 4: multiply<T, strips, 4>(weight, first, from, of, to); break;
      case 5: multiply<T, strips, 5>(weight, first, from, of, to); break;
      case 6: multiply<T, strips, 6>(weight, first, from, of, to); break;
      case 7: multiply<T, strips, 7>(weight, first, from, of, to); break;
      default: multiply<T, strips, 8>(weight, first, from, of, to);
    }
  }
}

inline at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                              const at::Tensor& zeros) {
  const Weight weight(packed, scales, zeros);
  const int64_t tokens = x.numel() / weight.inputs, groups = weight.inputs / weight.group;
  const int64_t strips = weight.outputs / STRIP;
  TORCH_CHECK(x.is_contiguous() && x.size(-1) == weight.inputs && weight.group % LANES == 0,
              "int4_linear takes contiguous tokens of ", weight.inputs, " inputs, in groups of a multiple of ", LANES);
  at::DimVector shape(x.sizes());
  shape.back() = weight.outputs;
  at::Tensor output = at::empty(shape, x.options());
  std::vector<float> wide(tokens * weight.inputs), sums(tokens * groups);
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const T* in = x.const_data_ptr<T>();
    T* out = output.mutable_data_ptr<T>();
    for (int64_t g = 0; g < tokens * groups; g++) {  // groups follow each other, within a token and to the next one
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = g * weight.group; i < (g + 1) * weight.group; i += LANES) {
        const __m512 value = load(in + i);
        store(wide.data() + i, value);
        sum = _mm512_add_ps(sum, value);
      }
      sums[g] = _mm512_reduce_add_ps(sum);
    }
    const int64_t work = STRIP * weight.inputs * tokens / 2;  // of two strips, whose numbers have four bits
    at::parallel_for(0, (strips + 1) / 2, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t first = 2 * begin; first < 2 * end; first += 2) {
        if (first + 1 < strips)
          multiply_all<T, 2>(weight, first, tokens, wide.data(), sums.data(), out);
        else
          multiply_all<T, 1>(weight, first, tokens, wide.data(), sums.data(), out);
      }
    });
  });
  return output;
}

// Rows of 16 numbers of 32 bits become columns.
inline void transpose(__m512i (&rows)[16]) {
  __m512i other[16];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + j + 2]);
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      other[8 * j + i] = _mm512_shuffle_i32x4(rows[8 * j + i], rows[8 * j + i + 4], 0x88);
      other[8 * j + i + 4] = _mm512_shuffle_i32x4(rows[8 * j + i], rows[8 * j + i + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

// The outputs `first` to `first + count` of W, (count, inputs), in the type of `like`.
inline at::Tensor int4_dequantize(const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& zeros,
                                  int64_t first, int64_t count, const at::Tensor& like) {
  const Weight weight(packed, scales, zeros);
  at::Tensor output = at::empty({count, weight.inputs}, like.options());
  dispatch(like, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t wide = 64 / sizeof(T), each = wide / LANES;  // inputs in a row of a cache line, and in a lane
    TORCH_CHECK(first % STRIP == 0 && count % STRIP == 0 && first + count <= weight.outputs &&
                    weight.inputs % wide == 0,
                "int4_dequantize takes whole strips of ", STRIP, " outputs, and a multiple of ", wide, " inputs");
    T* out = output.mutable_data_ptr<T>();
    at::parallel_for(0, count / STRIP, grain(STRIP * weight.inputs), [&](int64_t begin, int64_t end) {
      const __m512i mask = _mm512_set1_epi32(15);
      for (int64_t s = begin; s < end; s++) {
        const int64_t strip = first / STRIP + s;
        for (int64_t input = 0; input < weight.inputs; input += wide) {
          __m512i levels[16];
          for (int64_t piece = 0; piece < wide / STEP; piece++) {
            const int64_t at = input + piece * STEP, term = weight.term(strip, at / weight.group);
            const __m512 scale = weight.scale(term), zero = weight.zero(term);
            const __m512i codes = _mm512_loadu_si512(weight.strip(strip) + at / STEP * BYTES);
            const auto level = [&](int i) {
              const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, 4 * i), mask);
              return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zero), scale);
            };
            for (int i = 0; i < STEP; i += each)
              levels[(piece * STEP + i) / each] = [&] {
                if constexpr (each == 1) return _mm512_castps_si512(level(i));
                else return _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(level(i))),
                                       _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(level(i + 1))), 16));
              }();
          }
          transpose(levels);
          for (int64_t i = 0; i < STRIP; i++)
            _mm512_storeu_si512(out + (s * STRIP + i) * weight.inputs + input, levels[i]);
        }
      }
    });
  });
  return output;
}

}  // namespace qtale
