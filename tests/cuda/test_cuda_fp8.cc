// w4a8-fp8 on a GPU: the quantizer's e4m3 numbers against the oracle's, one by one; products within
// what the kernel of each plan may lose (docs/cuda.md).
#include <cmath>

#include "../../tools/cuda_oracle.h"
#include "cuda_testing.h"

namespace nibble::cuda::testing {
namespace {

class CudaFp8 : public ::testing::Test {
 protected:
  void SetUp() override { NIBBLE_NEEDS_GPU(); }

  /// Normal values; each row of another size, and one element that is far larger.
  std::vector<uint16_t> random_x(int64_t m, int64_t k, Dtype dtype) {
    std::vector<uint16_t> x(static_cast<size_t>(m * k));
    for (int64_t i = 0; i < m * k; ++i) {
      float value =
          std::ldexp(std::normal_distribution<float>()(random_), static_cast<int>(i / k % 5) - 2);
      if (i % k == 7) value *= 20.0f;
      store_from_float(x.data(), i, dtype, value);
    }
    return x;
  }
  std::mt19937 random_{20260401};
};

Problem problem_of(const GpuWeight& weight, int64_t m, Dtype x, Dtype y) {
  const ref::Weights& w = weight.host.reference;
  return {.m = m,
          .n = w.n,
          .k = w.k,
          .group_size = w.group_size,
          .mode = Mode::w4a8_fp8,
          .x_dtype = x,
          .y_dtype = y};
}

float from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

TEST_F(CudaFp8, NumbersAreThoseOfTheOracle) {
  for (const int64_t k : {200, 1152, 4096}) {
    const int64_t group_size = k == 200 ? 200 : 128;
    const GpuWeight weight = make_gpu_weight({.k = k, .n = 64, .group_size = group_size}, random_);
    const int64_t m = 6;
    const std::vector<uint16_t> x = random_x(m, k, Dtype::bf16);
    const Buffer device_x(x);
    for (const Granularity granularity : {Granularity::token, Granularity::tensor}) {
      Problem problem = problem_of(weight, m, Dtype::bf16, Dtype::bf16);
      problem.granularity = granularity;
      const ref::Activations expected = ref::quantize(problem, {.x = x.data(), .x_stride = k});
      for (const Variant& v : kernels(problem)) {
        const bool halves = multiplies_halves(v.plan);
        const int64_t padded = v.plan.padded_k;
        const Buffer codes(static_cast<size_t>(m * padded * (halves ? 2 : 1)));
        const Buffer scales(static_cast<size_t>(m * 4)), range(16);
        const Operand operand{codes.as<int8_t>(), scales.as<float>(), nullptr,
                              range.as<uint32_t>()};
        ASSERT_TRUE(quantize_activations(v.plan, {device_x.as<>(), k}, operand, nullptr).ok());
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        const auto bytes = codes.download<uint8_t>();
        const auto found_scales = scales.download<float>();
        for (int64_t row = 0; row < m; ++row) {
          const bool tensor = granularity == Granularity::tensor;
          ASSERT_EQ(found_scales[row], expected.scales[tensor ? 0 : row]) << v.name;
          for (int64_t i = 0; i < padded; ++i) {
            int64_t at = i;  // where k = i lies
            if (v.plan.order == OperandOrder::wgmma) {
              const int64_t word = i / 4 % 8;
              at = i / 32 * 32 + (word % 2 * 4 + word / 2) * 4 + i % 4;
            }
            const float found = halves ? load_as_float(bytes.data(), row * padded + at, Dtype::f16)
                                       : from_e4m3(bytes[row * padded + at]);
            ASSERT_EQ(found, i < k ? expected.values[row * k + i] : 0.0f)
                << v.name << " row " << row << " k " << i;
          }
        }
      }
    }
  }
}

TEST_F(CudaFp8, ProductsWithinTheirBounds) {
  struct Case {
    int64_t n, k, group_size;
    bool bias;
  };
  for (const Case& c :
       {Case{136, 1152, 128, true}, Case{72, 576, 64, false}, Case{136, 1152, 32, true},
        Case{392, 4096, 128, false}, Case{40, 200, 200, true}, Case{136, 14336, 128, false}}) {
    const GpuWeight weight =
        make_gpu_weight({.k = c.k, .n = c.n, .group_size = c.group_size, .bias = c.bias}, random_);
    for (const int64_t m : {1, 3, 9, 16, 17, 70, 200}) {
      const std::vector<uint16_t> x = random_x(m, c.k, Dtype::f16);
      const Buffer device_x(x);
      const Problem problem = problem_of(weight, m, Dtype::f16, Dtype::f32);
      for (const Variant& v : variants(problem)) {
        const Buffer y(static_cast<size_t>(m * c.n * 4)), workspace(v.plan.workspace_bytes, 0);
        const Status status = run_gemm(v.plan, {device_x.as<>(), c.k}, weight.device, y.as<>(), c.n,
                                       workspace.as<>(), nullptr);
        ASSERT_TRUE(status.ok()) << status.message();
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        ASSERT_TRUE(y.guard_is_intact() && workspace.guard_is_intact());
        const auto found = y.download<float>();
        for (int64_t row = 0; row<m; row += m> 20 ? 7 : 1) {
          ASSERT_EQ(compare_cuda_row(v.plan, weight.host.reference, &x[row * c.k],
                                     &found[row * c.n], {}, weight.host.bias_or_null(), row),
                    "")
              << v.name << " [" << v.plan.describe() << "]";
        }
      }
    }
  }
}

TEST_F(CudaFp8, RowsWithNanOrInfinityBecomeNanRows) {
  const GpuWeight weight = make_gpu_weight({.k = 512, .n = 64, .group_size = 128}, random_);
  for (const int64_t m : {2, 16, 40}) {
    std::vector<uint16_t> x = random_x(m, 512, Dtype::bf16);
    store_from_float(x.data(), 300, Dtype::bf16, std::nanf(""));
    store_from_float(x.data(), (m - 1) * 512 + 511, Dtype::bf16, INFINITY);
    const Buffer device_x(x);
    for (const Variant& v : kernels(problem_of(weight, m, Dtype::bf16, Dtype::f32))) {
      const Buffer y(static_cast<size_t>(m * 64 * 4)), workspace(v.plan.workspace_bytes, 0);
      ASSERT_TRUE(run_gemm(v.plan, {device_x.as<>(), 512}, weight.device, y.as<>(), 64,
                           workspace.as<>(), nullptr)
                      .ok());
      NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
      const auto found = y.download<float>();
      for (int64_t i = 0; i < m * 64; ++i) {
        ASSERT_EQ(std::isnan(found[i]), i / 64 == 0 || i / 64 == m - 1) << v.name << " " << i;
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cuda::testing
