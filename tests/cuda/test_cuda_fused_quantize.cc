// The quantizers with a norm or a gate in front, against the same arithmetic on the host: the norm
// in the order that fused_quantize.h promises, so bit for bit; the gate in double, because no two
// exponential functions round alike.
#include <fmt/format.h>

#include <cmath>

#include "cuda_testing.h"
#include "gemm/cuda/fused_quantize.h"
#include "gemm/ref.h"

namespace nibble::cuda::testing {
namespace {

struct Shape {
  int64_t m, k;
  Granularity granularity = Granularity::token;
  int64_t group_size = 128;
};

constexpr Shape kShapes[] = {{1, 4096},
                             {3, 264},
                             {5, 1000},
                             {300, 2048},
                             {2, 28672},
                             {7, 4096, Granularity::group},
                             {270, 5120, Granularity::group},
                             {4, 1088, Granularity::group, 64},
                             {6, 96, Granularity::group, 32}};

/// 16-bit rows: row 1 is all zeros, the last of several has a NaN.
std::vector<uint16_t> rows_of(int64_t m, int64_t k, Element type, std::mt19937& random) {
  std::vector<uint16_t> bits(static_cast<size_t>(m * k));
  for (int64_t i = 0; i < m * k; ++i) {
    float value = std::normal_distribution<float>()(random) * (random() % 301 == 0 ? 30.0f : 1.0f);
    if (i / k == 1) value = 0;
    if (m > 2 && i == m * k - 2) value = NAN;
    store_from_float(bits.data(), i, static_cast<Dtype>(type), value);
  }
  return bits;
}

/// Device memory for the codes, scales and sums of one shape.
struct Quantized {
  QuantizeArgs args;
  Buffer codes, scales, sums;

  Quantized(const Shape& s, Element type)
      : codes(static_cast<size_t>(s.m * padded(s))),
        scales(static_cast<size_t>(s.m * scales_of_row(s) * 4)),
        sums(static_cast<size_t>(s.m * padded(s) / promoted_depth(s.group_size) * 4)) {
    args.x_stride = args.k = s.k;
    args.type = type;
    args.m = s.m;
    args.padded_k = padded(s);
    args.group_size = s.group_size;
    args.promoted = static_cast<int>(promoted_depth(s.group_size));
    args.scaling = s.granularity == Granularity::group ? Scaling::group : Scaling::token;
    args.codes = codes.as<int8_t>();
    args.scales = scales.as<float>();
    args.sums = sums.as<int32_t>();
  }
  static int64_t padded(const Shape& s) { return (s.k + kSlabDepth - 1) / kSlabDepth * kSlabDepth; }
  static int64_t scales_of_row(const Shape& s) {
    return s.granularity == Granularity::group ? s.k / s.group_size : 1;
  }
};

float pairwise(std::vector<float> lanes) {
  for (size_t d = 16; d > 0; d /= 2) {
    const std::vector<float> before = lanes;
    for (size_t i = 0; i < 32; ++i) lanes[i] = before[i] + before[i ^ d];
  }
  return lanes[0];
}

float sum_of_squares(const std::vector<float>& h) {
  std::vector<float> last(32);
  for (size_t block = 0; block * 256 < h.size(); ++block) {
    std::vector<float> chunks(32);
    for (size_t i = 0; i < 256 && block * 256 + i < h.size(); ++i) {
      const float v = h[block * 256 + i];
      chunks[i / 8] = std::fma(v, v, chunks[i / 8]);
    }
    last[block % 32] += pairwise(chunks);
  }
  return pairwise(last);
}

void expect_row(const Quantized& q, const Shape& s, int64_t row, const std::vector<float>& values) {
  const std::vector<int8_t> codes = q.codes.download<int8_t>();
  const std::vector<float> scales = q.scales.download<float>();
  const int8_t* found = codes.data() + row * q.args.padded_k;
  const int64_t width = Quantized::scales_of_row(s);
  if (std::isnan(values[s.k - 2])) {
    EXPECT_TRUE(std::isnan(scales[row * width + (s.k - 2) / (s.k / width)]));
    return;
  }
  const Problem problem{.m = 1,
                        .n = 8,
                        .k = s.k,
                        .group_size = width == 1 ? s.k : s.group_size,
                        .granularity = s.granularity};
  const ref::Activations expected = ref::quantize(problem, {.x = values.data(), .x_stride = s.k});
  for (int64_t i = 0; i < width; ++i) ASSERT_EQ(scales[row * width + i], expected.scales[i]);
  std::vector<int32_t> expected_sums(static_cast<size_t>(q.args.padded_k / q.args.promoted));
  for (int64_t i = 0; i < q.args.padded_k; ++i) {
    const int8_t code = i < s.k ? expected.codes[i] : int8_t{0};
    ASSERT_EQ(found[i], code) << "row " << row << ", k " << i;
    expected_sums[i / q.args.promoted] += code;
  }
  const std::vector<int32_t> sums = q.sums.download<int32_t>();
  for (size_t i = 0; i < expected_sums.size(); ++i) {
    ASSERT_EQ(sums[row * expected_sums.size() + i], expected_sums[i]);
  }
}

std::vector<int64_t> sampled_rows(int64_t m) {
  std::vector<int64_t> rows = {0};
  for (const int64_t row : {int64_t{1}, m / 2, m - 1}) {
    if (row > rows.back() && row < m) rows.push_back(row);
  }
  return rows;
}

TEST(CudaFusedQuantize, NormEqualsItsDocumentedOrder) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(3);
  for (const Shape& s : kShapes) {
    for (const Element type : {Element::f16, Element::bf16}) {
      for (const bool residual : {false, true}) {
        SCOPED_TRACE(fmt::format("m {} k {} residual {}", s.m, s.k, residual));
        const auto dtype = static_cast<Dtype>(type);
        const std::vector<uint16_t> x = rows_of(s.m, s.k, type, random);
        const std::vector<uint16_t> before = rows_of(s.m, s.k, type, random);
        const std::vector<uint16_t> weight = rows_of(1, s.k, type, random);
        const Buffer device_x(x), device_residual(before), device_weight(weight);
        Quantized q(s, type);
        NormQuantizeArgs args;
        args.to = q.args;
        args.to.x = device_x.as<>();
        args.weight = device_weight.as<>();
        args.one_plus = residual;
        args.eps = 1e-5f;
        if (residual) {
          args.residual = args.sum = device_residual.as<>();
          args.residual_stride = s.k;
        }
        NIBBLE_CHECK_CUDA(launch_norm_quantize(args, nullptr));
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        const std::vector<uint16_t> after = device_residual.download<uint16_t>();
        for (const int64_t row : sampled_rows(s.m)) {
          std::vector<float> h(static_cast<size_t>(s.k));
          for (int64_t i = 0; i < s.k; ++i) {
            h[i] = load_as_float(x.data(), row * s.k + i, dtype);
            if (!residual) continue;
            uint16_t sum;
            store_from_float(&sum, 0, dtype,
                             h[i] + load_as_float(before.data(), row * s.k + i, dtype));
            h[i] = load_as_float(&sum, 0, dtype);
            if (!std::isnan(h[i])) {
              ASSERT_EQ(after[row * s.k + i], sum);
            }
          }
          const float mean = sum_of_squares(h) / static_cast<float>(s.k);
          const float factor = 1.0f / std::sqrt(mean + args.eps);
          for (int64_t i = 0; i < s.k; ++i) {
            const float w = load_as_float(weight.data(), i, dtype);
            h[i] = h[i] * factor * (residual ? 1.0f + w : w);
          }
          expect_row(q, s, row, h);
          if (HasFatalFailure()) return;
        }
        for (const Buffer* buffer :
             std::initializer_list<const Buffer*>{&q.codes, &q.scales, &q.sums, &device_residual}) {
          ASSERT_TRUE(buffer->guard_is_intact());
        }
      }
    }
  }
}

TEST(CudaFusedQuantize, NormOfARowDoesNotDependOnTheOthers) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(5);
  const Shape many{1000, 8192}, one{1, 8192};
  const std::vector<uint16_t> x = rows_of(many.m, many.k, Element::bf16, random);
  const Buffer device_x(x), weight(rows_of(1, many.k, Element::bf16, random));
  Quantized all(many, Element::bf16), alone(one, Element::bf16);
  for (Quantized* q : {&all, &alone}) {
    NormQuantizeArgs args;
    args.to = q->args;
    args.to.x = device_x.as<uint16_t>() + (q == &alone ? 777 * many.k : 0);
    args.weight = weight.as<>();
    NIBBLE_CHECK_CUDA(launch_norm_quantize(args, nullptr));
  }
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<int8_t> codes = all.codes.download<int8_t>();
  const std::vector<int8_t> row(codes.begin() + 777 * many.k, codes.begin() + 778 * many.k);
  EXPECT_EQ(alone.codes.download<int8_t>(), row);
  EXPECT_EQ(alone.scales.download<float>()[0], all.scales.download<float>()[777]);
}

double gate_function(GateFunction function, double g) {
  const double t =
      function == GateFunction::silu ? g : 2 * 0.7978845608028654 * (g + 0.044715 * g * g * g);
  return g / (1 + std::exp(-t));
}

/// x (m, 2 k): gate, then up.
void expect_gate(const Shape& s, Element type, GateFunction function, std::mt19937& random) {
  const auto dtype = static_cast<Dtype>(type);
  const std::vector<uint16_t> x = rows_of(s.m, 2 * s.k, type, random);
  const Buffer device_x(x);
  Quantized q(s, type);
  GateQuantizeArgs args;
  args.to = q.args;
  args.to.x = device_x.as<>();
  args.to.x_stride = args.up_stride = 2 * s.k;
  args.up = device_x.as<uint16_t>() + s.k;
  args.function = function;
  NIBBLE_CHECK_CUDA(launch_gate_quantize(args, nullptr));
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<int8_t> codes = q.codes.download<int8_t>();
  const std::vector<float> scales = q.scales.download<float>();
  const int64_t width = Quantized::scales_of_row(s), share = s.k / width;
  for (const int64_t row : sampled_rows(s.m)) {
    std::vector<double> amax(static_cast<size_t>(width)), values(static_cast<size_t>(s.k));
    for (int64_t i = 0; i < s.k; ++i) {
      values[i] = gate_function(function, load_as_float(x.data(), row * 2 * s.k + i, dtype)) *
                  load_as_float(x.data(), row * 2 * s.k + s.k + i, dtype);
      double& largest = amax[i / share];
      if (!std::isnan(largest) && !(std::abs(values[i]) <= largest)) largest = std::abs(values[i]);
    }
    for (int64_t i = 0; i < s.k; ++i) {
      const float scale = scales[row * width + i / share];
      const int code = codes[row * q.args.padded_k + i];
      if (std::isnan(amax[i / share])) {
        ASSERT_TRUE(std::isnan(scale));
        ASSERT_EQ(code, 0);
      } else if (amax[i / share] == 0) {
        ASSERT_EQ(scale, 0);
      } else {
        ASSERT_NEAR(scale, amax[i / share] / 127, 2e-6 * scale);
        ASSERT_NEAR(code, values[i] / scale, 0.501) << "row " << row << ", k " << i;
      }
    }
  }
  ASSERT_TRUE(q.codes.guard_is_intact() && q.scales.guard_is_intact());
}

TEST(CudaFusedQuantize, GateIsRoundedFromTheRightValue) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(4);
  for (Shape s : kShapes) {
    for (const Element type : {Element::f16, Element::bf16}) {
      for (const GateFunction function : {GateFunction::silu, GateFunction::gelu_tanh}) {
        SCOPED_TRACE(fmt::format("m {} k {}", s.m, s.k));
        expect_gate(s, type, function, random);
        if (HasFatalFailure()) return;
      }
    }
  }
  expect_gate({2, 40960}, Element::bf16, GateFunction::silu,
              random);  // more than stays in registers
}

TEST(CudaFusedQuantize, RefusesWhatItCannotDo) {
  NormQuantizeArgs args;
  args.to.scaling = Scaling::tensor;
  args.to.m = 1;
  args.to.k = args.to.padded_k = 512;
  EXPECT_EQ(launch_norm_quantize(args, nullptr), cudaErrorInvalidValue);
  args.to.scaling = Scaling::token;
  args.to.type = Element::f32;
  EXPECT_EQ(launch_norm_quantize(args, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace nibble::cuda::testing
