// Inputs of run_gemm that are not a plain matrix: rows made on demand, and K-groups of which some
// keep 8-bit activations. Both must equal, bit for bit, what the plain parts give.
#include <algorithm>
#include <cmath>
#include <limits>

#include "gemm_testing.h"

namespace nibble::testing {
namespace {

constexpr int64_t kK = 192, kN = 72, kGroup = 32, kGroups = kK / kGroup;

class GemmSources : public ::testing::Test {
 protected:
  std::vector<float> random_rows(int64_t m) {
    std::vector<float> x(static_cast<size_t>(m * kK));
    for (float& value : x) value = std::normal_distribution<float>()(random_);
    return x;
  }

  std::vector<float> multiply(const Problem& problem, const GemmInput& input, int threads) {
    const Result<Plan> plan = plan_gemm(problem, nullptr, threads);
    EXPECT_TRUE(plan.ok()) << plan.status().message();
    std::vector<float> y(static_cast<size_t>(problem.m * kN), -1.0f);
    const GemmTarget target{&weight_.packed, y.data(), kN};
    const Status status = run(*plan, input, {&target, 1});
    EXPECT_TRUE(status.ok()) << status.message();
    return y;
  }

  static Problem problem_of(Mode mode, int64_t m, Granularity granularity) {
    Problem problem;
    problem.m = m;
    problem.n = kN;
    problem.k = kK;
    problem.group_size = kGroup;
    problem.mode = mode;
    problem.granularity = granularity;
    return problem;
  }

  std::mt19937 random_{7};
  TestWeight weight_ = make_weight({.k = kK, .n = kN, .group_size = kGroup, .bias = true}, random_);
};

/// Row source that counts its calls and doubles rows of a matrix.
struct Doubling {
  const float* x;
  std::vector<int> calls;
  bool in_place;  // false: it returns memory of its own
  std::vector<float> own;

  RowSource source() {
    return {[](void* context, int64_t row, float* scratch) -> const float* {
              auto& self = *static_cast<Doubling*>(context);
              ++self.calls[static_cast<size_t>(row)];
              float* to = self.in_place ? scratch : &self.own[static_cast<size_t>(row * kK)];
              for (int64_t i = 0; i < kK; ++i) to[i] = 2 * self.x[row * kK + i];
              return to;
            },
            this};
  }
};

TEST_F(GemmSources, RowsMadeOnDemandGiveTheBitsOfTheSameMatrix) {
  for (const Mode mode : {Mode::w4a16, Mode::w4a8, Mode::w4a4}) {
    for (const Granularity granularity : {Granularity::token, Granularity::group}) {
      for (const int64_t m : {1, 5, 40, 300}) {
        const std::vector<float> x = random_rows(m);
        std::vector<float> twice = x;
        for (float& value : twice) value *= 2;
        const Problem problem = problem_of(mode, m, granularity);
        const std::vector<float> expected =
            multiply(problem, {.x = twice.data(), .x_stride = kK}, 1);
        for (const bool in_place : {true, false}) {
          Doubling rows{x.data(), std::vector<int>(static_cast<size_t>(m)), in_place, twice};
          GemmInput input;
          input.rows = rows.source();
          EXPECT_EQ(multiply(problem, input, 3), expected) << mode_name(mode) << " m " << m;
          // a source may add to what it reads from: it must be asked once
          for (const int calls : rows.calls) ASSERT_EQ(calls, 1);
        }
      }
    }
  }
}

TEST_F(GemmSources, ARowSourceIsRefusedWhereItCannotServe) {
  const std::vector<float> x = random_rows(2);
  Doubling rows{x.data(), std::vector<int>(2), true, {}};
  GemmInput input;
  input.rows = rows.source();
  std::vector<float> y(2 * kN);
  const GemmTarget target{&weight_.packed, y.data(), kN};
  Problem problem = problem_of(Mode::w4a8, 2, Granularity::tensor);
  EXPECT_EQ(run(*plan_gemm(problem), input, {&target, 1}).code(), Code::invalid_argument);
  problem.granularity = Granularity::token;
  problem.x_dtype = Dtype::f16;
  EXPECT_EQ(run(*plan_gemm(problem), input, {&target, 1}).code(), Code::invalid_argument);
}

TEST_F(GemmSources, NonFiniteRowsOfASourceAreNamed) {
  std::vector<float> x = random_rows(3);
  x[2 * kK + 5] = std::numeric_limits<float>::infinity();
  Doubling rows{x.data(), std::vector<int>(3), true, {}};
  GemmInput input;
  input.rows = rows.source();
  std::vector<float> y(3 * kN);
  const GemmTarget target{&weight_.packed, y.data(), kN};
  const Status status =
      run(*plan_gemm(problem_of(Mode::w4a8, 3, Granularity::token)), input, {&target, 1});
  EXPECT_EQ(status.code(), Code::non_finite);
  EXPECT_NE(status.message().find("row 2"), std::string::npos) << status.message();
}

TEST_F(GemmSources, MixedGroupsEqualTheQuantizersOfBothWidthsPutTogether) {
  for (const bool symmetric : {true, false}) {
    for (const int64_t m : {1, 13, 70}) {
      const std::vector<float> x = random_rows(m);
      const GemmInput plain{.x = x.data(), .x_stride = kK};
      Problem narrow = problem_of(Mode::w4a4, m, Granularity::group);
      narrow.symmetric = symmetric;
      const Problem wide = problem_of(Mode::w4a8, m, Granularity::group);
      std::vector<int8_t> codes(x.size()), wide_codes(x.size());
      std::vector<float> scales(static_cast<size_t>(m * kGroups)), wide_scales(scales);
      ASSERT_TRUE(
          quantize_activations(*plan_gemm(narrow), plain, codes.data(), scales.data(), nullptr)
              .ok());
      ASSERT_TRUE(quantize_activations(*plan_gemm(wide), plain, wide_codes.data(),
                                       wide_scales.data(), nullptr)
                      .ok());
      const uint8_t choice[kGroups] = {0, 1, 0, 0, 1, 1};
      for (int64_t i = 0; i < m * kGroups; ++i) {
        if (choice[i % kGroups] == 0) continue;
        scales[i] = wide_scales[i];
        std::copy_n(&wide_codes[i * kGroup], kGroup, &codes[i * kGroup]);
      }
      std::vector<float> expected(static_cast<size_t>(m * kN));
      const GemmTarget target{&weight_.packed, expected.data(), kN};
      const Plan by_parts = *plan_gemm(wide);
      AlignedBuffer workspace = std::move(*AlignedBuffer::zeroed(by_parts.workspace_bytes));
      ASSERT_TRUE(run_gemm_quantized(by_parts, {codes.data(), kK, scales.data()}, {&target, 1},
                                     workspace.data())
                      .ok());
      Problem mixed = narrow;
      mixed.mixed_groups = true;
      GemmInput input = plain;
      input.wide_groups = choice;
      EXPECT_EQ(multiply(mixed, input, 2), expected) << "m " << m << " symmetric " << symmetric;
    }
  }
}

TEST_F(GemmSources, MixedGroupsAreRefusedWhereTheyMeanNothing) {
  Problem problem = problem_of(Mode::w4a8, 2, Granularity::group);
  problem.mixed_groups = true;
  EXPECT_EQ(plan_gemm(problem).status().code(), Code::invalid_argument);
  problem.mode = Mode::w4a4;
  problem.granularity = Granularity::token;
  EXPECT_EQ(plan_gemm(problem).status().code(), Code::invalid_argument);
  problem.granularity = Granularity::group;
  const Result<Plan> plan = plan_gemm(problem);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(std::string(plan->kernel_name()).substr(0, 4), "w4a8") << "w4a4 kernels take -15..15";
  const std::vector<float> x = random_rows(2);
  std::vector<float> y(2 * kN);
  const GemmTarget target{&weight_.packed, y.data(), kN};
  EXPECT_EQ(run(*plan, {.x = x.data(), .x_stride = kK}, {&target, 1}).code(),
            Code::invalid_argument);
}

}  // namespace
}  // namespace nibble::testing
