// The CUDA quantizer against the oracle, bit for bit: codes in both operand orders, scales, sums.
#include <cmath>

#include "cuda_testing.h"

namespace nibble::cuda::testing {
namespace {

struct Case {
  Mode mode = Mode::w4a8;
  bool symmetric = true;
  float clip = 1.0f;
};

std::vector<float> awkward_floats(int64_t m, int64_t k, std::mt19937& random) {
  std::vector<float> values(static_cast<size_t>(m * k));
  for (int64_t i = 0; i < m * k; ++i) {
    // rows of different sizes, some zeros, some outliers; row 3 is zero, row 4 almost
    const auto scale = std::ldexp(1.0f, static_cast<int>(i / k % 5) * 3 - 6);
    values[i] = std::normal_distribution<float>()(random) * scale;
    if (random() % 19 == 0) values[i] = 0;
    if (random() % 97 == 0) values[i] *= 30;
    if (i / k == 3) values[i] = 0;
    if (i / k == 4) values[i] *= 0x1p-120f;
  }
  return values;
}

/// Codes, scales and sums of one plan against ref::quantize.
void expect_equals_oracle(const Plan& plan, const GemmInput& host, const Buffer& x,
                          const Buffer& static_scales) {
  const Problem& p = plan.problem;
  const ref::Activations expected = ref::quantize(p, host);
  const int64_t promoted = promoted_depth(p.group_size), blocks = plan.padded_k / promoted;
  const Buffer codes(static_cast<size_t>(p.m * plan.padded_k)), range(16);
  const Buffer scales(expected.scales.size() * 4), sums(static_cast<size_t>(p.m * blocks * 4));
  DeviceInput input{x.as<>(), host.x_stride, host.clip, static_scales.as<float>()};
  const Status status = quantize_activations(
      plan, input,
      {codes.as<int8_t>(), scales.as<float>(), sums.as<int32_t>(), range.as<uint32_t>()}, nullptr);
  ASSERT_TRUE(status.ok()) << status.message();
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  const auto found_codes = codes.download<int8_t>();
  std::vector<int32_t> expected_sums(static_cast<size_t>(p.m * blocks));
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t i = 0; i < plan.padded_k; ++i) {
      const int64_t k = natural_index(plan.order, i);
      const int8_t code = k < p.k ? expected.codes[row * p.k + k] : int8_t{0};
      ASSERT_EQ(found_codes[row * plan.padded_k + i], stored_code(plan, code))
          << "row " << row << ", k " << k;
      expected_sums[row * blocks + k / promoted] += code;
    }
  }
  ASSERT_EQ(scales.download<float>(), expected.scales);
  if (!plan.e4m3) {
    ASSERT_EQ(sums.download<int32_t>(), expected_sums);
  }
  for (const Buffer* buffer : {&codes, &scales, &sums, &range}) {
    ASSERT_TRUE(buffer->guard_is_intact());
  }
}

void expect_all_granularities(const Case& kind, Dtype dtype, int64_t m, int64_t k,
                              int64_t group_size, std::mt19937& random) {
  const std::vector<float> values = awkward_floats(m, k, random);
  const int64_t stride = (k + 15) / 8 * 8;
  std::vector<std::byte> x(static_cast<size_t>(m * stride * dtype_bytes(dtype)));
  for (int64_t i = 0; i < m * k; ++i) {
    store_from_float(x.data(), i / k * stride + i % k, dtype, values[i]);
  }
  std::vector<float> static_scales(static_cast<size_t>(k / group_size));
  for (float& t : static_scales) t = std::uniform_real_distribution<float>(0.005f, 0.1f)(random);
  const Buffer device_x(x), device_scales(static_scales);
  for (const Granularity granularity : {Granularity::tensor, Granularity::token, Granularity::group,
                                        Granularity::static_tensor, Granularity::static_group}) {
    const Problem problem{.m = m,
                          .n = 64,
                          .k = k,
                          .group_size = group_size,
                          .mode = kind.mode,
                          .x_dtype = dtype,
                          .granularity = granularity,
                          .symmetric = kind.symmetric};
    const GemmInput host{.x = x.data(),
                         .x_stride = stride,
                         .clip = kind.clip,
                         .static_scales = static_scales.data()};
    if (!check_problem(problem).ok()) continue;
    for (const Variant& variant : kernels(problem)) {
      SCOPED_TRACE(variant.plan.describe());
      expect_equals_oracle(variant.plan, host, device_x, device_scales);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(CudaQuantize, EqualsTheOracle) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(7);
  struct Shape {
    int64_t m, k, group_size;
  };
  for (const Case& kind : {Case{}, Case{.clip = 0.9f}, Case{.mode = Mode::w4a4},
                           Case{.mode = Mode::w4a4, .symmetric = false},
                           Case{.mode = Mode::w4a4, .symmetric = false, .clip = 0.8f}}) {
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
      for (const Shape shape : {Shape{5, 512, 128},
                                {1, 128, 32},
                                {17, 1152, 64},
                                {6, 4096, 128},
                                {7, 576, 576},
                                {5, 1280, 256},
                                {40, 14336, 128},
                                {5, 200, 200}}) {
        expect_all_granularities(kind, dtype, shape.m, shape.k, shape.group_size, random);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// As many rows as get the launch for many: several chunks a thread; K is padded.
TEST(CudaQuantize, ManyRowsEqualTheOracle) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(8);
  struct Many {
    Case kind;
    Dtype dtype;
    int64_t m, k;
    Granularity granularity;
  };
  for (const Many& many :
       {Many{{}, Dtype::bf16, 500, 13960, Granularity::token},
        Many{{.clip = 0.9f}, Dtype::f16, 1300, 4096, Granularity::static_tensor},
        Many{{.mode = Mode::w4a4, .symmetric = false}, Dtype::f32, 1000, 7000, Granularity::token},
        Many{{.mode = Mode::w4a4}, Dtype::bf16, 6500, 1024, Granularity::token}}) {
    const int64_t m = many.m, k = many.k;
    const std::vector<float> values = awkward_floats(m, k, random);
    std::vector<std::byte> x(static_cast<size_t>(m * k * dtype_bytes(many.dtype)));
    for (int64_t i = 0; i < m * k; ++i) store_from_float(x.data(), i, many.dtype, values[i]);
    const Buffer device_x(x), device_scale(std::vector<float>{0.03f});
    const float scale = 0.03f;
    const Problem problem{.m = m,
                          .n = 64,
                          .k = k,
                          .group_size = k % 128 == 0 ? 128 : k,
                          .mode = many.kind.mode,
                          .x_dtype = many.dtype,
                          .granularity = many.granularity,
                          .symmetric = many.kind.symmetric};
    const GemmInput host{
        .x = x.data(), .x_stride = k, .clip = many.kind.clip, .static_scales = &scale};
    const bool exact_in_fp8 = problem.mode == Mode::w4a4 && problem.symmetric;
    for (const char* kernel : {"w4a8_mma_sm80", "w4a8_rs_sm90", "w4a4_rs_sm90"}) {  // both orders
      if (kernel == std::string_view("w4a4_rs_sm90") && !exact_in_fp8) continue;
      const Result<Plan> plan = plan_gemm(problem, *gpu(), kernel);
      if (!plan.ok() && gpu()->capability != 90) continue;
      ASSERT_TRUE(plan.ok()) << plan.status().message();
      SCOPED_TRACE(plan->describe());
      expect_equals_oracle(*plan, host, device_x, device_scale);
      if (HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace nibble::cuda::testing
