#include "gemm/ref.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/cpu_features.h"
#include "base/thread_pool.h"

namespace nibble::ref {

Weights unpack(const QuantMatrix& matrix) {
  Weights w{matrix.k, matrix.n, matrix.group_size, matrix.groups(), {}, {}, {}};
  w.codes.resize(static_cast<size_t>(w.n * w.k));
  w.zeros.resize(static_cast<size_t>(w.n * w.groups));
  w.scales.resize(static_cast<size_t>(w.n * w.groups));
  constexpr int64_t kColumns = 8;  // n is a multiple of 8
  std::vector<uint8_t> codes(static_cast<size_t>(w.k * kColumns));
  std::vector<uint8_t> zeros(static_cast<size_t>(w.groups * kColumns));
  std::vector<uint16_t> scales(static_cast<size_t>(w.groups * kColumns));
  for (int64_t n0 = 0; n0 < w.n; n0 += kColumns) {
    unpack_codes(matrix, n0, kColumns, codes.data());
    unpack_zeros(matrix, n0, kColumns, zeros.data());
    unpack_scales(matrix, n0, kColumns, scales.data());
    for (int64_t c = 0; c < kColumns; ++c) {
      for (int64_t k = 0; k < w.k; ++k) w.codes[(n0 + c) * w.k + k] = codes[k * kColumns + c];
      for (int64_t g = 0; g < w.groups; ++g) {
        w.zeros[(n0 + c) * w.groups + g] = zeros[g * kColumns + c];
        w.scales[(n0 + c) * w.groups + g] =
            load_as_float(scales.data(), g * kColumns + c, matrix.scale_dtype);
      }
    }
  }
  return w;
}

namespace {

constexpr float kSmallestRange = 0x1p-100f;

struct Quantizer {
  float scale = 0, inverse = 0;
  float low = 0, high = 0;

  float scaled(float x) const { return std::clamp(x * inverse, low, high); }
  int8_t operator()(float x) const { return static_cast<int8_t>(std::nearbyint(scaled(x))); }
};

float limit_of(Mode mode) {
  return mode == Mode::w4a8_fp8 ? 448.0f : mode == Mode::w4a4 ? 7.0f : 127.0f;
}

Quantizer from_values(const Problem& p, float clip, const std::vector<float>& values) {
  float amax = 0, low = 0, high = 0;
  for (const float value : values) {
    amax = std::max(amax, std::fabs(value));
    low = std::min(low, value);
    high = std::max(high, value);
  }
  amax *= clip;
  low *= clip;
  high *= clip;
  if (p.symmetric) {
    const float limit = limit_of(p.mode);
    if (amax < kSmallestRange) return {};
    return {amax / limit, limit / amax, -limit, limit};
  }
  const float scale = high / 15.0f - low / 15.0f;
  if (scale < kSmallestRange) return {};
  const float inverse = 1.0f / scale;
  const float zero = std::clamp(std::nearbyint(-low * inverse), 0.0f, 15.0f);
  return {scale, inverse, -zero, 15.0f - zero};
}

Quantizer from_scale(const Problem& p, float scale) {
  return {scale, 1.0f / scale, -limit_of(p.mode), limit_of(p.mode)};
}

std::vector<float> read(const Problem& p, const GemmInput& input, int64_t row, int64_t k0,
                        int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    values[i] = load_as_float(input.x, row * input.x_stride + k0 + i, p.x_dtype);
  }
  return values;
}

}  // namespace

float round_to_e4m3(float x) {
  int exponent = 0;
  std::frexp(x, &exponent);  // |x| in [2^(exponent - 1), 2^exponent)
  const float step = std::ldexp(1.0f, std::max(exponent - 1, -6) - 3);
  return std::nearbyint(x / step) * step;
}

Activations quantize(const Problem& p, const GemmInput& input) {
  const int64_t groups = p.k / p.group_size;
  Activations a;
  a.codes.resize(static_cast<size_t>(p.m * p.k));
  a.sums.resize(static_cast<size_t>(p.m * groups));
  Quantizer of_tensor;
  if (p.granularity == Granularity::tensor) {
    std::vector<float> everything;
    for (int64_t row = 0; row < p.m; ++row) {
      const std::vector<float> values = read(p, input, row, 0, p.k);
      everything.insert(everything.end(), values.begin(), values.end());
    }
    of_tensor = from_values(p, input.clip, everything);
  }
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const std::vector<float> values = read(p, input, row, g * p.group_size, p.group_size);
      Quantizer quantizer;
      switch (p.granularity) {
        case Granularity::tensor: quantizer = of_tensor; break;
        case Granularity::token:
          quantizer = from_values(p, input.clip, read(p, input, row, 0, p.k));
          break;
        case Granularity::group: quantizer = from_values(p, input.clip, values); break;
        case Granularity::static_tensor: quantizer = from_scale(p, input.static_scales[0]); break;
        case Granularity::static_group: quantizer = from_scale(p, input.static_scales[g]); break;
      }
      for (int64_t i = 0; i < p.group_size; ++i) {
        if (p.mode == Mode::w4a8_fp8) {
          a.values.push_back(round_to_e4m3(quantizer.scaled(values[i])));
          continue;
        }
        const int8_t code = quantizer(values[i]);
        a.codes[row * p.k + g * p.group_size + i] = code;
        a.sums[row * groups + g] += code;
      }
      if (scales_per_group(p.granularity) || g == 0) a.scales.push_back(quantizer.scale);
    }
  }
  return a;
}

std::vector<int32_t> partial_sums(const Weights& w, const int8_t* codes, int64_t m) {
  std::vector<int32_t> partials(static_cast<size_t>(m * w.groups * w.n));
  parallel_for(available_cpus(), w.n, [&](int64_t n) {
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* q = &w.codes[n * w.k + g * w.group_size];
        const int8_t* a = codes + row * w.k + g * w.group_size;
        const int zero = w.zeros[n * w.groups + g];
        int64_t sum = 0;
        for (int64_t i = 0; i < w.group_size; ++i) sum += (q[i] - zero) * a[i];
        NIBBLE_CHECK(sum == static_cast<int32_t>(sum));
        partials[(row * w.groups + g) * w.n + n] = static_cast<int32_t>(sum);
      }
    }
  });
  return partials;
}

std::vector<float> epilogue(const Problem& p, const Weights& w,
                            const std::vector<int32_t>& partials, const float* scales,
                            const float* bias) {
  const bool by_group = scales_per_group(p.granularity);
  std::vector<float> y(static_cast<size_t>(p.m * w.n));
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t n = 0; n < w.n; ++n) {
      float acc = 0;
      for (int64_t g = 0; g < w.groups; ++g) {
        float value = static_cast<float>(partials[(row * w.groups + g) * w.n + n]);
        if (by_group) value = value * scales[row * w.groups + g];
        acc = std::fma(value, w.scales[n * w.groups + g], acc);
      }
      if (by_group) {
        if (bias != nullptr) acc = acc + bias[n];
      } else {
        acc = bias != nullptr ? std::fma(acc, scales[row], bias[n]) : acc * scales[row];
      }
      y[row * w.n + n] = acc;
    }
  }
  return y;
}

std::vector<float> multiply_w4a16(const Weights& w, const float* x, int64_t m, const float* bias) {
  std::vector<float> y(static_cast<size_t>(m * w.n));
  parallel_for(available_cpus(), w.n, [&](int64_t n) {
    for (int64_t row = 0; row < m; ++row) {
      float acc = 0;
      for (int64_t g = 0; g < w.groups; ++g) {
        float p = 0;
        for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size; ++k) {
          const int difference = w.codes[n * w.k + k] - w.zeros[n * w.groups + g];
          p = std::fma(x[row * w.k + k], static_cast<float>(difference), p);
        }
        acc = std::fma(p, w.scales[n * w.groups + g], acc);
      }
      y[row * w.n + n] = bias != nullptr ? acc + bias[n] : acc;
    }
  });
  return y;
}

std::vector<double> multiply_fp64(const Weights& w, const float* x, int64_t m, const float* bias) {
  std::vector<double> y(static_cast<size_t>(m * w.n));
  parallel_for(available_cpus(), w.n, [&](int64_t n) {
    for (int64_t row = 0; row < m; ++row) {
      double acc = bias != nullptr ? static_cast<double>(bias[n]) : 0.0;
      for (int64_t g = 0; g < w.groups; ++g) {
        const double scale = w.scales[n * w.groups + g];
        for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size; ++k) {
          const int difference = w.codes[n * w.k + k] - w.zeros[n * w.groups + g];
          acc += static_cast<double>(x[row * w.k + k]) * (difference * scale);
        }
      }
      y[row * w.n + n] = acc;
    }
  });
  return y;
}

}  // namespace nibble::ref
