// The operations against plain loops over single numbers, in double precision: for processors that only an emulator has
// here. Prints what is wrong, and exits with the number of that. Tolerances: float32 sums in another order, 2⁻²⁰ of the
// terms' size; a value in bfloat16 that is rounded twice, 2⁻⁷ of it.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "decoder.h"
#include "dense.h"
#include "int4_8.h"
#include "layer.h"
#include "planes.h"
#include "rounding.h"
#include "router.h"

using namespace qtale;

// A whole step is compiled; what it is composed of is checked here, and the whole in tests/models/test_decoding.py.
template void qtale::decode(Team&, const Sizes&, const std::vector<Layer<float>>&, const End<float>&, const Step<float>&,
                            Shared<float>&, Private<float>&, float*);
template void qtale::decode(Team&, const Sizes&, const std::vector<Layer<BFloat16>>&, const End<BFloat16>&,
                            const Step<BFloat16>&, Shared<BFloat16>&, Private<BFloat16>&, BFloat16*);

namespace {

int failures = 0;

float wide(float x) { return x; }
float wide(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
void set(float& to, double x) { to = static_cast<float>(x); }
void set(BFloat16& to, double x) {  // to the nearest, of two the even one
  const float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to.bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <typename T>
double stored(double x) {
  T value;
  set(value, x);
  return wide(value);
}

void check(const char* what, double actual, double expected, double tolerance) {
  if (std::fabs(actual - expected) <= tolerance) return;  // NaN fails
  if (failures++ < 20) std::printf("%s: %.9g instead of %.9g\n", what, actual, expected);
}

template <typename T>
std::vector<T> numbers(int64_t count, double size = 1) {
  std::vector<T> all(count);
  for (T& one : all) set(one, size * (2.0 * std::rand() / RAND_MAX - 1));
  return all;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

template <typename T>
constexpr double LOOSE = std::is_same_v<T, float> ? 0x1p-20 : 0x1p-7;

template <typename T>
void layer() {
  constexpr int64_t rows = 3, width = 48, heads = 3, head = 64;
  const auto x = numbers<T>(rows * width, 4), scale = numbers<T>(width);
  std::vector<T> y(rows * width);
  rms_norm(x.data(), scale.data(), 1e-5f, rows, width, y.data());
  for (int64_t row = 0; row < rows; row++) {
    double squares = 0;
    for (int64_t i = 0; i < width; i++) squares += std::pow(wide(x[row * width + i]), 2);
    for (int64_t i = 0; i < width; i++) {
      const double expected = wide(scale[i]) * stored<T>(wide(x[row * width + i]) / std::sqrt(squares / width + 1e-5));
      check("rms_norm", wide(y[row * width + i]), expected, LOOSE<T> * (1e-3 + std::fabs(expected)));
    }
  }
  swiglu(x.data(), x.data(), rows * width, y.data());
  for (int64_t i = 0; i < rows * width; i++) {
    const double expected = stored<T>(silu(wide(x[i]))) * wide(x[i]);
    check("swiglu", wide(y[i]), expected, LOOSE<T> * (1e-3 + std::fabs(expected)));
  }
  const auto token = numbers<T>(heads * head), cos = numbers<T>(head), sin = numbers<T>(head);
  std::vector<T> turned(heads * head);
  rotate(token.data(), cos.data(), sin.data(), heads, head, turned.data());
  for (int64_t at = 0; at < heads * head; at++) {
    const int64_t i = at % head, other = i < head / 2 ? at + head / 2 : at - head / 2;
    const double first = stored<T>(double{wide(token[at])} * wide(cos[i]));
    const double second = stored<T>(double{wide(token[other])} * wide(sin[i]));
    check("rotate", wide(turned[at]), stored<T>(i < head / 2 ? first - second : first + second), LOOSE<T> * 1e-3);
  }
}

template <typename T>
void attention() {
  constexpr int64_t shared = 3, width = 80, capacity = 300, kept = 290;
  const auto query = numbers<T>(shared * width), key = numbers<T>(width), value = numbers<T>(width);
  auto keys = numbers<T>(capacity * width), values = numbers<T>(capacity * width);
  std::vector<float> room(attention_room(shared, width, kept + 1));
  std::vector<T> y(shared * width);
  attend_next(query.data(), key.data(), value.data(), keys.data(), values.data(), kept, shared, width, 0.3f, room.data(),
              y.data());
  append(key.data(), width, kept, keys.data());
  append(value.data(), width, kept, values.data());
  for (int64_t i = 0; i < width; i++) {
    check("the new key", wide(keys[kept * width + i]), wide(key[i]), 0);
    check("the new value", wide(values[kept * width + i]), wide(value[i]), 0);
  }
  for (int64_t h = 0; h < shared; h++) {
    std::vector<double> sums(width);
    double total = 0;
    for (int64_t j = 0; j <= kept; j++) {
      double dot = 0;
      for (int64_t i = 0; i < width; i++) dot += double{wide(query[h * width + i])} * wide(keys[j * width + i]);
      total += std::exp(0.3 * dot);
      for (int64_t i = 0; i < width; i++) sums[i] += std::exp(0.3 * dot) * wide(values[j * width + i]);
    }
    for (int64_t i = 0; i < width; i++)
      check("attend_next", wide(y[h * width + i]), sums[i] / total, LOOSE<T> * (0.1 + std::fabs(sums[i] / total)));
  }
}

template <typename T>
void router() {
  constexpr int64_t tokens = 2, inputs = 96, width = 32;
  const auto x = numbers<float>(tokens * inputs);
  const auto down = numbers<T>(width * inputs);
  const auto bias = numbers<float>(width), norm = numbers<float>(width), out = numbers<float>(2 * width),
             out_bias = numbers<float>(2);
  std::vector<float> values(tokens * width);
  route_down(x.data(), down.data(), tokens, inputs, width, 0, width, values.data());
  for (int64_t t = 0; t < tokens; t++) {
    float logits[2];
    route_end(values.data() + t * width, bias.data(), {norm.data(), out.data(), out_bias.data(), 1e-6f, width}, logits);
    std::vector<double> hidden(width);
    double squares = 0, expected[2] = {out_bias[0], out_bias[1]};
    for (int64_t row = 0; row < width; row++) {
      hidden[row] = bias[row];
      for (int64_t i = 0; i < inputs; i++) hidden[row] += double{x[t * inputs + i]} * wide(down[row * inputs + i]);
      squares += hidden[row] * hidden[row];
    }
    for (int64_t row = 0; row < width; row++)
      for (int64_t logit = 0; logit < 2; logit++)
        expected[logit] += silu(hidden[row] / std::sqrt(squares / width + 1e-6) * norm[row]) * out[logit * width + row];
    for (int64_t logit = 0; logit < 2; logit++) check("route", logits[logit], expected[logit], 1e-5);
  }
}

template <typename T>
void int4() {
  constexpr int64_t strips = 5, inputs = 128, groups = 2, outputs = strips * STRIP, many = 2 * TOKENS + 3;
  std::vector<uint8_t> codes(strips * inputs / STEP * BYTES), zeros(strips * groups * STRIP);
  std::vector<Half> scales(zeros.size());
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(std::rand() >> 8);
  for (uint8_t& zero : zeros) zero = static_cast<uint8_t>((std::rand() >> 8) % 16);
  for (Half& scale : scales) scale.bits = static_cast<uint16_t>(0x2000 + (std::rand() >> 8) % 1024);  // 2⁻⁷ (1 + n / 1024)
  const Int4Weight weight{codes.data(), scales.data(), zeros.data(), strips, inputs, groups};
  const auto level = [&](int64_t output, int64_t input) {
    const int64_t strip = output / STRIP, lane = output % STRIP, group = input / (inputs / groups);
    const int64_t term = (strip * groups + group) * STRIP + lane;
    const uint8_t byte = codes[((strip * inputs / STEP + input / STEP) * STRIP + lane) * 4 + input % STEP / 2];
    const double scale = std::ldexp(1 + (scales[term].bits - 0x2000) / 1024.0, -7);
    return ((input % 2 ? byte >> 4 : byte & 15) - zeros[term]) * scale;
  };
  for (int64_t tokens = 1; tokens <= many; tokens++) {
    const auto x = numbers<T>(tokens * inputs);
    std::vector<typename Form<T>::Input> values(tokens * inputs);
    std::vector<float> sums(tokens * groups);
    std::vector<T> y(tokens * outputs);
    const Int4Inputs<T> prepared{values.data(), sums.data()};
    int4_inputs(x.data(), tokens, weight, prepared);
    int4_linear(weight, prepared, tokens, 0, 3, y.data());  // in two parts, as threads do
    int4_linear(weight, prepared, tokens, 3, strips, y.data());
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t o = 0; o < outputs; o++) {
        double expected = 0;
        for (int64_t i = 0; i < inputs; i++) expected += wide(x[t * inputs + i]) * level(o, i);
        check("int4_linear", wide(y[t * outputs + o]), expected, LOOSE<T> * (1 + std::fabs(expected)));
      }
    std::vector<int8_t> rounded(tokens * inputs);
    std::vector<float> x_scales(tokens * inputs / ROUNDED_BLOCK), x_sums(x_scales.size());
    const RoundedInputs in_8{rounded.data(), x_scales.data(), x_sums.data()};
    round_inputs(x.data(), tokens, inputs, in_8);
    int4_linear_rounded(weight, in_8, tokens, 0, strips, y.data());
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t o = 0; o < outputs; o++) {
        double expected = 0;
        for (int64_t i = 0; i < inputs; i++) {
          const int64_t block = t * inputs / ROUNDED_BLOCK + i / ROUNDED_BLOCK;
          const int64_t place = i / STEP * STEP + (i % 2) * (STEP / 2) + i % STEP / 2;
          const double value = double{x_scales[block]} * rounded[t * inputs + place];
          if (o == 0) check("round_inputs", value, wide(x[t * inputs + i]), 0.5001 * x_scales[block]);
          expected += value * level(o, i);
        }
        check("int4_linear_rounded", wide(y[t * outputs + o]), expected, LOOSE<T> * (1 + std::fabs(expected)));
      }
  }
  std::vector<T> matrix(inputs * outputs);
  int4_dequantize(weight, 0, strips, outputs, matrix.data());
  for (int64_t o = 0; o < outputs; o++)
    for (int64_t i = 0; i < inputs; i++)
      check("int4_dequantize", wide(matrix[i * outputs + o]), stored<T>(level(o, i)), 0);
}

template <typename T>
void planes() {
  constexpr int64_t strips = 3, inputs = 128, groups = 2, outputs = strips * STRIP, many = PLANE_TOKENS + 3;
  std::vector<uint8_t> high(strips * inputs / 16 * BYTES), bits[MOST_BITS];
  std::vector<Half> scales(strips * groups * STRIP), zeros(scales.size());
  for (auto& plane : bits) plane.resize(high.size() / 2);
  for (auto* plane : {&high, &bits[0], &bits[1]})
    for (uint8_t& byte : *plane) byte = static_cast<uint8_t>(std::rand() >> 8);
  for (Half& scale : scales) scale.bits = static_cast<uint16_t>(0x2000 + (std::rand() >> 8) % 1024);  // 2⁻⁷ (1 + n / 1024)
  for (Half& zero : zeros) zero.bits = static_cast<uint16_t>(0x3c00 + (std::rand() >> 8) % 8 * 128);  // 1 + n / 8
  for (int count = 0; count <= MOST_BITS; count++) {
    const PlaneWeight weight{high.data(), {bits[0].data(), bits[1].data()}, count, scales.data(), zeros.data(),
                             strips, inputs, groups};
    const auto field = [&](const std::vector<uint8_t>& plane, int width, int64_t output, int64_t input) {
      const int64_t of_word = 32 / width, strip = output / STRIP, at = input % of_word * width;
      const int64_t word = (strip * inputs / of_word + input / of_word) * STRIP + output % STRIP;
      return plane[4 * word + at / 8] >> at % 8 & ((1 << width) - 1);
    };
    const auto level = [&](int64_t output, int64_t input) {
      int code = field(high, 2, output, input);
      for (int k = 0; k < count; k++) code = 2 * code + field(bits[k], 1, output, input);
      const int64_t term = (output / STRIP * groups + input / (inputs / groups)) * STRIP + output % STRIP;
      return (code - 1 - (zeros[term].bits - 0x3c00) / 1024.0) * std::ldexp(1 + (scales[term].bits - 0x2000) / 1024.0, -7);
    };
    for (int64_t tokens = 1; tokens <= many; tokens++) {
      const auto x = numbers<T>(tokens * inputs);
      std::vector<typename PlaneInputs<T>::Input> values(2 * tokens * inputs);
      std::vector<float> sums(tokens * groups * PlaneInputs<T>::SUMS_OF);
      std::vector<T> y(tokens * outputs);
      const PlaneInputs<T> prepared{values.data(), sums.data()};
      plane_inputs(x.data(), tokens, weight, prepared);
      plane_linear(weight, prepared, tokens, 0, 2, y.data());  // in two parts, as threads do
      plane_linear(weight, prepared, tokens, 2, strips, y.data());
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t o = 0; o < outputs; o++) {
          double expected = 0;
          for (int64_t i = 0; i < inputs; i++) expected += wide(x[t * inputs + i]) * level(o, i);
          check("plane_linear", wide(y[t * outputs + o]), expected, LOOSE<T> * (1 + std::fabs(expected)));
        }
    }
    std::vector<T> matrix(inputs * outputs);
    plane_dequantize(weight, 0, strips, outputs, matrix.data());
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t i = 0; i < inputs; i++)
        check("plane_dequantize", wide(matrix[i * outputs + o]), stored<T>(level(o, i)), 0);
  }
}

template <typename T>
void dense() {
  constexpr int64_t inputs = 144, outputs = 48;
  const auto weight = numbers<T>(outputs * inputs), bias = numbers<T>(outputs);
  for (int64_t tokens = 1; tokens <= DENSE_TOKENS + 2; tokens++) {
    const auto x = numbers<T>(tokens * inputs);
    std::vector<DenseInput<T>> values(x.size());
    for (size_t i = 0; i < x.size(); i++) {
      if constexpr (TAKES_PAIRS<T>) values[i] = x[i];
      else values[i] = wide(x[i]);
    }
    std::vector<T> y(tokens * outputs);
    dense_linear(weight.data(), bias.data(), values.data(), tokens, inputs, outputs, 0, 16, y.data());  // in two parts
    dense_linear(weight.data(), bias.data(), values.data(), tokens, inputs, outputs, 16, outputs, y.data());
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t o = 0; o < outputs; o++) {
        double expected = wide(bias[o]);
        for (int64_t i = 0; i < inputs; i++) expected += double{wide(x[t * inputs + i])} * wide(weight[o * inputs + i]);
        check("dense_linear", wide(y[t * outputs + o]), expected, LOOSE<T> * (4 + std::fabs(expected)));
      }
  }
}

template <typename T>
void rounding(int step) {
  constexpr int64_t count = 3, size = 32;
  constexpr float top = 7, rate = 0.01f, reach = 0.75f;
  const float scales[count] = {0.3f, 0.5f, 0.07f}, zeros[count] = {3, 4, 2};
  const auto groups = numbers<float>(count * size);
  auto values = numbers<float>(count * size, 0.5);
  const auto before = values;
  auto slopes = numbers<T>(count * size);
  set(slopes[5], 0);
  std::vector<T> weight(count * size);
  float held[count], of_scale[count];
  round_groups(groups.data(), values.data(), scales, zeros, top, step, count, size, weight.data());
  round_step(groups.data(), values.data(), scales, zeros, top, step, slopes.data(), rate, reach, count, size, held,
             of_scale);
  for (int64_t g = 0; g < count; g++) {
    double sum_held = 0, sum_scale = 0;
    for (int64_t i = g * size; i < (g + 1) * size; i++) {
      const float plain = groups[i] / scales[g], free = std::nearbyint(plain + before[i]);
      const float within = std::min(std::max(free, -zeros[g]), top - zeros[g]), slope = wide(slopes[i]);
      const int code = static_cast<int>(within + zeros[g]);
      const float kept = code / step * step + 0.5f * (step - 1) - zeros[g];
      check("round_groups", wide(weight[i]), stored<T>(kept * scales[g]), 0);
      sum_scale += double{slope} * (free == within ? kept - plain : kept);
      if (free != within) sum_held += slope;
      const float way = free == within ? (slope > 0) - (slope < 0) : 0;
      check("a step of rounding", values[i], std::min(std::max(before[i] - way * rate, -reach), reach), 0);
    }
    check("gradients of held weights", held[g], sum_held, 1e-5);
    check("gradient of the scale", of_scale[g], sum_scale, 1e-5 * (1 + std::fabs(sum_scale)));
  }
}

void registers() {
  float x[LANES], y[LANES];
  for (double from = -87.3; from < 88.3; from += 0.01) {
    for (int64_t i = 0; i < LANES; i++) x[i] = static_cast<float>(from + 0.01 * static_cast<double>(i) / LANES);
    store(y, exp(load(x)));
    for (int64_t i = 0; i < LANES; i++) {
      const double expected = std::exp(double{x[i]});
      check("exp", y[i], expected, 0x1p-23 * expected);
    }
  }
  const float ends[4] = {-std::numeric_limits<float>::infinity(), 200, std::numeric_limits<float>::quiet_NaN(), 0};
  for (int64_t i = 0; i < LANES; i++) x[i] = ends[i % 4];
  store(y, exp(load(x)));
  check("exp of -infinity", y[0], 0, 0);
  if (!(std::isinf(y[1]) && std::isnan(y[2]))) check("exp of 200 and NaN", 1, 0, 0);
  check("exp of 0", y[3], 1, 0);
  BFloat16 low[LANES], expected[LANES];
  for (uint64_t first = 0; first < uint64_t{1} << 32; first += 16 * 4093) {  // bits of numbers, a 4093rd of all
    for (int64_t i = 0; i < LANES; i++) {
      const uint32_t bits = static_cast<uint32_t>(first + 4093 * i);
      std::memcpy(x + i, &bits, 4);
      set(expected[i], x[i]);
    }
    store(low, load(x));
    for (int64_t i = 0; i < LANES; i++)
      if (std::isnan(x[i]) ? !std::isnan(wide(low[i])) : std::fabs(x[i]) >= 0x1p-126f && low[i].bits != expected[i].bits)
        check("rounding to bfloat16", wide(low[i]), wide(expected[i]), 0);
  }
}

}  // namespace

int main() {
  layer<float>(), layer<BFloat16>();
  attention<float>(), attention<BFloat16>();
  router<float>(), router<BFloat16>();
  int4<float>(), int4<BFloat16>();
  dense<float>(), dense<BFloat16>();
  planes<float>(), planes<BFloat16>();
  for (int step : {1, 2, 4}) rounding<float>(step), rounding<BFloat16>(step);
  registers();
  std::printf("%d failures\n", failures);
  return std::min(failures, 100);
}
