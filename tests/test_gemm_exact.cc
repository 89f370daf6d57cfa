// Every integer kernel against the oracle: partial sums and outputs bit for bit.
#include <rapidcheck.h>

#include <cstdlib>

#include "gemm_testing.h"

namespace nibble::testing {
namespace {

class GemmExact : public ::testing::TestWithParam<Mode> {
 protected:
  std::mt19937 random_{20260101};
};

INSTANTIATE_TEST_SUITE_P(Modes, GemmExact, ::testing::Values(Mode::w4a8, Mode::w4a4),
                         [](const auto& mode) { return mode_name(mode.param); });

TEST_P(GemmExact, AllTinyShapes) {
  for (const int64_t n : {8, 16, 24, 32, 40, 72}) {
    for (int64_t group = 1; group <= 9; ++group) {
      for (int64_t groups = 1; groups <= 3; ++groups) {
        const TestWeight weight =
            make_weight({.k = group * groups, .n = n, .group_size = group}, random_);
        for (const std::string& kernel : runnable_kernels(GetParam())) {
          for (int64_t m = 0; m <= 5; ++m) {
            expect_kernel_equals_oracle(kernel, {.m = m, .mode = GetParam()}, weight, random_);
          }
        }
      }
    }
  }
}

TEST_P(GemmExact, EveryRowCountFrom1To70) {
  const TestWeight weight = make_weight({.k = 256, .n = 40, .group_size = 128}, random_);
  for (const std::string& kernel : runnable_kernels(GetParam())) {
    for (int64_t m = 1; m <= 70; ++m) {
      for (const Granularity granularity : {Granularity::token, Granularity::group}) {
        expect_kernel_equals_oracle(
            kernel, {.m = m, .mode = GetParam(), .granularity = granularity}, weight, random_);
      }
    }
  }
}

// Depths around every step a kernel takes along K: quads of 4, chunks of 8 quads (avx2), tiles of
// 64, scratch of 4 tiles (amx), chunks of 72 quads (w4a4_avx2), int16 sums up to 255.
TEST_P(GemmExact, GroupDepthsAroundEveryPipelineStep) {
  for (const int64_t group : {3,   4,   5,   31,  32,  33,  60,  63,  64,  65,  68,  127, 128,
                              129, 192, 252, 255, 256, 257, 260, 284, 288, 292, 320, 512, 516}) {
    for (int64_t groups = 1; groups <= 2; ++groups) {
      const TestWeight weight =
          make_weight({.k = group * groups, .n = 64, .group_size = group}, random_);
      for (const std::string& kernel : runnable_kernels(GetParam())) {
        for (const int64_t m : {1, 3, 17, 33}) {
          expect_kernel_equals_oracle(kernel, {.m = m, .mode = GetParam()}, weight, random_);
        }
      }
    }
  }
}

TEST_P(GemmExact, EveryGroupSizeOfRealModels) {
  for (const int64_t group : {32, 64, 128, 1024}) {
    const TestWeight weight = make_weight({.k = 1024, .n = 96, .group_size = group}, random_);
    for (const std::string& kernel : runnable_kernels(GetParam())) {
      for (const int64_t m : {1, 2, 4, 8, 16, 32, 64, 300}) {
        for (const Granularity granularity : {Granularity::token, Granularity::group}) {
          expect_kernel_equals_oracle(
              kernel, {.m = m, .mode = GetParam(), .granularity = granularity}, weight, random_);
        }
      }
    }
  }
}

// A K beyond 65536 / 15 in one group: float(S) rounds, int16 shortcuts would overflow.
TEST_P(GemmExact, OneGroupOverALongK) {
  const TestWeight weight = make_weight({.k = 28672, .n = 32, .group_size = 28672}, random_);
  for (const std::string& kernel : runnable_kernels(GetParam())) {
    expect_kernel_equals_oracle(kernel, {.m = 17, .mode = GetParam()}, weight, random_);
  }
}

TEST_P(GemmExact, ExtremeCodesZerosAndActivations) {
  const int low = GetParam() == Mode::w4a4 ? -15 : -128, high = GetParam() == Mode::w4a4 ? 15 : 127;
  for (const int64_t group : {32, 128, 512}) {
    for (const int code : {0, 15}) {
      for (const int zero : {0, 15}) {
        const TestWeight weight = make_weight(
            {.k = 512, .n = 32, .group_size = group, .fixed_code = code, .fixed_zero = zero},
            random_);
        for (const int a : {low, high}) {
          const std::vector<int8_t> codes(18 * 512, static_cast<int8_t>(a));
          const std::vector<float> scales(18, 0.5f);
          for (const std::string& kernel : runnable_kernels(GetParam())) {
            std::string why;
            ASSERT_TRUE(kernel_equals_oracle(
                kernel, {.m = 18, .n = 32, .k = 512, .group_size = group, .mode = GetParam()},
                weight, codes, scales, &why))
                << why;
          }
        }
      }
    }
  }
}

TEST_P(GemmExact, EveryScaleKindBiasAndOutputType) {
  for (const Dtype scale_dtype : {Dtype::f16, Dtype::bf16}) {
    for (const ScaleKind kind :
         {ScaleKind::ordinary, ScaleKind::negative, ScaleKind::subnormal, ScaleKind::mixed}) {
      for (const bool bias : {false, true}) {
        const TestWeight weight = make_weight({.k = 128,
                                               .n = 56,
                                               .group_size = 64,
                                               .scale_dtype = scale_dtype,
                                               .scales = kind,
                                               .bias = bias},
                                              random_);
        for (const Dtype y : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
          for (const Granularity granularity : {Granularity::token, Granularity::group}) {
            for (const std::string& kernel : runnable_kernels(GetParam())) {
              expect_kernel_equals_oracle(
                  kernel, {.m = 19, .mode = GetParam(), .y_dtype = y, .granularity = granularity},
                  weight, random_);
            }
          }
        }
      }
    }
  }
}

// 10,000 random cases, each through every kernel of its mode.
TEST(GemmExactRandom, TenThousandCases) {
  setenv("RC_PARAMS", "max_success=5000 seed=7", 0);
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const std::vector<std::string> kernels = runnable_kernels(mode);
    const bool ok = rc::check(std::string("kernels equal the oracle, ") + mode_name(mode), [&] {
      const auto group = *rc::gen::weightedElement<int64_t>(
          {{2, *rc::gen::inRange<int64_t>(1, 140)}, {1, 32}, {1, 64}, {1, 128}});
      const auto groups = *rc::gen::inRange<int64_t>(1, 4);
      const auto n = 8 * *rc::gen::inRange<int64_t>(1, 10);
      const auto m = *rc::gen::inRange<int64_t>(1, 40);
      const auto seed = *rc::gen::arbitrary<uint32_t>();
      std::mt19937 random(seed);
      const Problem problem{.m = m,
                            .n = n,
                            .k = group * groups,
                            .group_size = group,
                            .mode = mode,
                            .y_dtype = static_cast<Dtype>(random() % 3),
                            .granularity = random() % 2 ? Granularity::token : Granularity::group};
      const TestWeight weight = make_weight({.k = problem.k,
                                             .n = n,
                                             .group_size = group,
                                             .scale_dtype = random() % 2 ? Dtype::f16 : Dtype::bf16,
                                             .scales = static_cast<ScaleKind>(random() % 4),
                                             .bias = random() % 2 == 0},
                                            random);
      const auto codes = random_codes(mode, m * problem.k, random);
      std::vector<float> scales(
          static_cast<size_t>(m * (problem.granularity == Granularity::group ? groups : 1)));
      for (float& t : scales) t = std::uniform_real_distribution<float>(1e-6f, 10.0f)(random);
      for (const std::string& kernel : kernels) {
        std::string why;
        if (!kernel_equals_oracle(kernel, problem, weight, codes, scales, &why)) RC_FAIL(why);
      }
    });
    EXPECT_TRUE(ok);
  }
}

}  // namespace
}  // namespace nibble::testing
