// Products of a few tokens with dense weights: each weight is read once for all tokens, and widened once.
//
//     y = x · Wᵀ + b
#pragma once

#include "lanes.h"

namespace qtale {

constexpr int DENSE_TOKENS = LANES_HELD >= 32 ? 6 : 3;  // at most at a time: more would not fit the registers

// Inputs as `dense_linear` takes them: in float32, but where pairs of bfloat16 are multiplied as they are.
template <typename T>
constexpr bool TAKES_PAIRS = PAIRS && std::is_same_v<T, BFloat16>;
template <typename T>
using DenseInput = std::conditional_t<TAKES_PAIRS<T>, T, float>;

// Sums of sixteen lanes, `partial` (count, LANES), whose sums are the dot products of `rows` neighbouring rows of W with
// `count` tokens.
template <int rows, int count, typename T>
QTALE_INLINE void dense_rows(const T* weight, const DenseInput<T>* x, int64_t inputs, Lanes* partial) {
  Lanes total[rows][count];
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < count; t++) total[r][t] = all(0);
  // The rows behind these are fetched meanwhile, in their order in memory: processors foresee that of one row at a time.
  const T* next = weight + rows * inputs;
  int64_t i = 0;
  if constexpr (TAKES_PAIRS<T>)
    for (; i + 2 * LANES <= inputs; i += 2 * LANES)
      for (int r = 0; r < rows; r++) {
        __builtin_prefetch(next + i * rows + r * 2 * LANES);
        for (int t = 0; t < count; t++) total[r][t] = add_pairs(weight + r * inputs + i, x + t * inputs + i, total[r][t]);
      }
  for (; i < inputs; i += LANES) {
    Lanes of_row[rows];
    for (int r = 0; r < rows; r++) {
      of_row[r] = load(weight + r * inputs + i);
      __builtin_prefetch(next + i * rows + r * LANES);
    }
    for (int t = 0; t < count; t++) {
      const Lanes value = load(x + t * inputs + i);
      for (int r = 0; r < rows; r++) total[r][t] = fma(of_row[r], value, total[r][t]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < count; t++) partial[t * LANES + r] = total[r][t];
}

// Outputs `begin` to `end`, in multiples of LANES, of y (tokens, outputs): W is (outputs, inputs), x (tokens, inputs) and
// b (outputs), or nullptr.
template <typename T, typename Y>
inline void dense_linear(const T* weight, const T* bias, const DenseInput<T>* x, int64_t tokens, int64_t inputs,
                         int64_t outputs, int64_t begin, int64_t end, Y* y) {
  const auto block = [&]<int count>(std::integral_constant<int, count>, int64_t row, int64_t t) {
    constexpr int rows = count == 1 || count * 4 + 5 <= LANES_HELD ? 4 : 2;
    Lanes partial[count * LANES];
    for (int64_t r = 0; r < LANES; r += rows)
      dense_rows<rows, count>(weight + (row + r) * inputs, x + t * inputs, inputs, partial + r);
    const Lanes added = bias == nullptr ? all(0) : load(bias + row);
    for (int n = 0; n < count; n++) store(y + (t + n) * outputs + row, sums(partial + n * LANES) + added);
  };
  const int64_t some = (tokens + (tokens - 1) / DENSE_TOKENS) / ((tokens - 1) / DENSE_TOKENS + 1);  // 8 are 4 and 4
  for (int64_t row = begin; row < end; row += LANES)
    for (int64_t t = 0; t < tokens; t += some)  // the rows stay in the nearest caches meanwhile
      [&]<int... n>(std::integer_sequence<int, n...>) {
        const int64_t count = std::min(some, tokens - t);
        ((count == n + 1 ? block(std::integral_constant<int, n + 1>(), row, t) : void()), ...);
      }(std::make_integer_sequence<int, DENSE_TOKENS>());
}

}  // namespace qtale
