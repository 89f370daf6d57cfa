// run_gemm and its neighbours through every kernel: the fused path against its parts and the
// oracle, what it may touch, what it must not depend on, its error bounds, its identities and its
// refusals.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include <fmt/format.h>

#include "gemm/cpu/plan.h"
#include "gemm_testing.h"

namespace nibble::testing {
namespace {

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
constexpr Mode kModes[] = {Mode::w4a16, Mode::w4a8, Mode::w4a4};
constexpr unsigned char kGuard = 0xa5;

/// A matrix (rows, columns) of any dtype with `stride` elements between rows, guard bytes before,
/// after and between the rows, and no more than the alignment of one element.
class Matrix {
 public:
  Matrix(Dtype dtype, int64_t rows, int64_t columns, int64_t stride)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        stride_(stride),
        bytes_(static_cast<size_t>(2 * kMargin + (rows * stride + 1) * dtype_bytes(dtype)),
               kGuard) {}

  void* data() { return bytes_.data() + offset(0, 0); }
  const void* data() const { return bytes_.data() + offset(0, 0); }
  int64_t stride() const { return stride_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  float get(int64_t row, int64_t i) const {
    return load_as_float(data(), row * stride_ + i, dtype_);
  }
  void set(int64_t row, int64_t i, float value) {
    store_from_float(data(), row * stride_ + i, dtype_, value);
  }
  const unsigned char* row(int64_t index) const { return bytes_.data() + offset(index, 0); }
  size_t row_bytes() const { return static_cast<size_t>(columns_ * dtype_bytes(dtype_)); }

  std::vector<float> floats() const {
    std::vector<float> values;
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t i = 0; i < columns_; ++i) values.push_back(get(row, i));
    }
    return values;
  }

  /// Position of the first changed byte outside the rows, or -1.
  int64_t first_touched_guard() const {
    std::vector<bool> ours(bytes_.size(), false);
    for (int64_t row = 0; row < rows_; ++row) {
      std::fill_n(ours.begin() + offset(row, 0), row_bytes(), true);
    }
    for (size_t i = 0; i < bytes_.size(); ++i) {
      if (!ours[i] && bytes_[i] != kGuard) return static_cast<int64_t>(i);
    }
    return -1;
  }

 private:
  static constexpr int64_t kMargin = 128;
  int64_t offset(int64_t row, int64_t i) const {
    return kMargin + (row * stride_ + i + 1) * dtype_bytes(dtype_);
  }

  Dtype dtype_;
  int64_t rows_, columns_, stride_;
  std::vector<unsigned char> bytes_;
};

Matrix random_x(Dtype dtype, int64_t m, int64_t k, int64_t stride, std::mt19937& random) {
  Matrix x(dtype, m, k, stride);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i) x.set(row, i, std::normal_distribution<float>()(random));
  }
  return x;
}

/// The bits of y as the library documents them, before rounding to y's type.
std::vector<float> oracle(const Problem& p, const TestWeight& weight, const GemmInput& input,
                          const Matrix& x) {
  const ref::Weights& w = weight.reference;
  if (p.mode == Mode::w4a16) {
    return ref::multiply_w4a16(w, x.floats().data(), p.m, weight.bias_or_null());
  }
  const ref::Activations a = ref::quantize(p, input);
  return ref::epilogue(p, w, ref::partial_sums(w, a.codes.data(), p.m), a.scales.data(),
                       weight.bias_or_null());
}

/// Empty, or the first place where y is not `expected` rounded to y's type.
std::string first_difference(const Matrix& y, Dtype dtype, const std::vector<float>& expected) {
  for (int64_t row = 0; row < y.rows(); ++row) {
    for (int64_t n = 0; n < y.columns(); ++n) {
      unsigned char rounded[4];
      const float value = expected[row * y.columns() + n];
      store_from_float(rounded, 0, dtype, value);
      if (std::memcmp(rounded, y.row(row) + n * dtype_bytes(dtype), dtype_bytes(dtype)) != 0) {
        return fmt::format("row {}, column {}: {}, expected {}", row, n, y.get(row, n), value);
      }
    }
  }
  return "";
}

bool rows_equal(const Matrix& a, int64_t row_a, const Matrix& b, int64_t row_b) {
  return std::memcmp(a.row(row_a), b.row(row_b), a.row_bytes()) == 0;
}

Problem problem_for(const TestWeight& weight, Problem p) {
  p.n = weight.reference.n;
  p.k = weight.reference.k;
  p.group_size = weight.reference.group_size;
  return p;
}

/// Plans with `kernel` (null: the preferred one) and runs; a fresh y.
Matrix multiply(const Problem& p, const char* kernel, const TestWeight& weight,
                const GemmInput& input, int threads = 1) {
  Matrix y(p.y_dtype, p.m, p.n, p.n);
  const Result<Plan> plan = plan_gemm(p, kernel, threads);
  EXPECT_TRUE(plan.ok()) << plan.status().message();
  if (!plan.ok()) return y;
  const GemmTarget target{&weight.packed, y.data(), y.stride()};
  const Status status = run(*plan, input, {&target, 1});
  EXPECT_TRUE(status.ok()) << status.message();
  return y;
}

class GemmApi : public ::testing::Test {
 protected:
  std::mt19937 random_{20260102};

  std::vector<float> random_scales(int64_t count) {
    std::vector<float> scales(static_cast<size_t>(count));
    for (float& t : scales) t = std::uniform_real_distribution<float>(0.005f, 0.05f)(random_);
    return scales;
  }
};

// ---- the fused path is its parts ----------------------------------------------------------------

std::vector<Problem> every_kind(Mode mode) {
  if (mode == Mode::w4a16) return {{.mode = mode}};
  std::vector<Problem> kinds;
  for (int g = 0; g <= static_cast<int>(Granularity::static_group); ++g) {
    const auto granularity = static_cast<Granularity>(g);
    kinds.push_back({.mode = mode, .granularity = granularity});
    if (mode == Mode::w4a4 && granularity <= Granularity::group) {
      kinds.push_back({.mode = mode, .granularity = granularity, .symmetric = false});
    }
  }
  return kinds;
}

/// y by quantize_activations, then run_gemm_quantized.
Matrix multiply_in_two_steps(const Plan& plan, const TestWeight& weight, const GemmInput& input,
                             const ref::Activations& expected) {
  const Problem& p = plan.problem;
  Matrix y(p.y_dtype, p.m, p.n, p.n);
  std::vector<int8_t> codes(expected.codes.size());
  std::vector<float> scales(expected.scales.size());
  std::vector<int32_t> sums(expected.sums.size());
  const Status quantized =
      quantize_activations(plan, input, codes.data(), scales.data(), sums.data());
  EXPECT_TRUE(quantized.ok()) << quantized.message();
  EXPECT_EQ(codes, expected.codes);
  EXPECT_EQ(scales, expected.scales);
  EXPECT_EQ(sums, expected.sums);
  AlignedBuffer workspace = std::move(*AlignedBuffer::zeroed(plan.workspace_bytes));
  const GemmTarget target{&weight.packed, y.data(), y.stride()};
  const Status status =
      run_gemm_quantized(plan, {codes.data(), p.k, scales.data()}, {&target, 1}, workspace.data());
  EXPECT_TRUE(status.ok()) << status.message();
  return y;
}

TEST_F(GemmApi, FusedEqualsTwoStepsEqualsTheOracle) {
  for (const int64_t group : {24, 64}) {
    const TestWeight weight =
        make_weight({.k = 3 * group, .n = 40, .group_size = group, .bias = group == 24}, random_);
    for (const Mode mode : kModes) {
      for (Problem p : every_kind(mode)) {
        for (const Dtype x_dtype : kDtypes) {
          for (const Dtype y_dtype : kDtypes) {
            p.m = 1 + static_cast<int64_t>(random_() % 40);
            p.x_dtype = x_dtype;
            p.y_dtype = y_dtype;
            p = problem_for(weight, p);
            const Matrix x = random_x(x_dtype, p.m, p.k, p.k, random_);
            const std::vector<float> given = random_scales(3);
            const GemmInput input{x.data(), x.stride(), 0.95f, given.data()};
            const std::vector<float> expected = oracle(p, weight, input, x);
            for (const std::string& kernel : runnable_kernels(mode)) {
              const Plan plan = *plan_gemm(p, kernel.c_str(), 1);
              ASSERT_EQ(
                  first_difference(multiply(p, kernel.c_str(), weight, input), y_dtype, expected),
                  "")
                  << plan.describe();
              if (mode == Mode::w4a16) continue;
              const Matrix y = multiply_in_two_steps(plan, weight, input, ref::quantize(p, input));
              ASSERT_EQ(first_difference(y, y_dtype, expected), "") << plan.describe();
            }
          }
        }
      }
    }
  }
}

TEST_F(GemmApi, W4a16KernelsEqualTheOracleForEveryShape) {
  for (const int64_t group : {1, 3, 4, 5, 64, 100, 260}) {
    for (const int64_t n : {8, 24, 32, 56, 136}) {
      for (const Dtype scale_dtype : {Dtype::f16, Dtype::bf16}) {
        const TestWeight weight = make_weight({.k = 2 * group,
                                               .n = n,
                                               .group_size = group,
                                               .scale_dtype = scale_dtype,
                                               .scales = ScaleKind::mixed,
                                               .bias = n == 56},
                                              random_);
        for (const int64_t m : {1, 2, 3, 7, 13}) {
          const Problem p = problem_for(weight, {.m = m,
                                                 .mode = Mode::w4a16,
                                                 .x_dtype = kDtypes[random_() % 3],
                                                 .y_dtype = kDtypes[random_() % 3]});
          const Matrix x = random_x(p.x_dtype, m, p.k, p.k, random_);
          const GemmInput input{x.data(), x.stride()};
          const std::vector<float> expected = oracle(p, weight, input, x);
          for (const std::string& kernel : runnable_kernels(Mode::w4a16)) {
            ASSERT_EQ(
                first_difference(multiply(p, kernel.c_str(), weight, input), p.y_dtype, expected),
                "")
                << kernel << " m " << m << " n " << n << " group " << group;
          }
        }
      }
    }
  }
}

// w4a16 does not quantize, so it has nothing to refuse: a NaN stays in its row.
TEST_F(GemmApi, W4a16PassesNonFiniteValuesThrough) {
  const TestWeight weight =
      make_weight({.k = 64, .n = 32, .group_size = 32, .fixed_code = 9, .fixed_zero = 3}, random_);
  for (const std::string& kernel : runnable_kernels(Mode::w4a16)) {
    const Problem p = problem_for(weight, {.m = 9, .mode = Mode::w4a16});
    Matrix x = random_x(Dtype::f32, p.m, p.k, p.k, random_);
    const Matrix before = multiply(p, kernel.c_str(), weight, {x.data(), x.stride()});
    x.set(4, 63, std::nanf(""));
    x.set(7, 0, std::numeric_limits<float>::infinity());
    const Matrix y = multiply(p, kernel.c_str(), weight, {x.data(), x.stride()});
    for (int64_t row = 0; row < p.m; ++row) {
      if (row == 4) {
        EXPECT_TRUE(std::isnan(y.get(row, 5))) << kernel;
      } else if (row == 7) {
        EXPECT_TRUE(std::isinf(y.get(row, 5))) << kernel;
      } else {
        EXPECT_TRUE(rows_equal(y, row, before, row)) << kernel << " row " << row;
      }
    }
  }
}

// ---- several targets, strides, and what may be touched ------------------------------------------

TEST_F(GemmApi, TargetsThatShareXEqualSeparateCalls) {
  std::vector<TestWeight> weights;
  for (const int64_t n : {96, 8, 40, 264}) {
    weights.push_back(make_weight({.k = 128, .n = n, .group_size = 64, .bias = n == 40}, random_));
  }
  for (const Mode mode : kModes) {
    for (const std::string& kernel : runnable_kernels(mode)) {
      for (const int64_t m : {1, 19}) {
        const Matrix x = random_x(Dtype::bf16, m, 128, 128, random_);
        const GemmInput input{x.data(), x.stride()};
        Problem p = problem_for(
            weights[0], {.m = m, .mode = mode, .x_dtype = Dtype::bf16, .y_dtype = Dtype::bf16});
        p.n = 96 + 8 + 40 + 264;
        std::vector<Matrix> outputs;
        for (const TestWeight& w : weights) {
          outputs.emplace_back(p.y_dtype, m, w.reference.n, w.reference.n + 3);
        }
        std::vector<GemmTarget> targets;
        for (size_t i = 0; i < weights.size(); ++i) {
          targets.push_back({&weights[i].packed, outputs[i].data(), outputs[i].stride()});
        }
        const Result<Plan> plan = plan_gemm(p, kernel.c_str(), 2);
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        const Status status = run(*plan, input, targets);
        ASSERT_TRUE(status.ok()) << status.message();
        for (size_t i = 0; i < weights.size(); ++i) {
          const Matrix alone =
              multiply(problem_for(weights[i], p), kernel.c_str(), weights[i], input);
          for (int64_t row = 0; row < m; ++row) {
            ASSERT_TRUE(rows_equal(outputs[i], row, alone, row)) << kernel << " target " << i;
          }
          ASSERT_EQ(outputs[i].first_touched_guard(), -1) << kernel << " target " << i;
        }
      }
    }
  }
}

TEST_F(GemmApi, OnlyYAndTheWorkspaceAreWritten) {
  constexpr size_t kMargin = 192;  // keeps the workspace 64-byte aligned
  for (const int64_t n : {8, 24, 40, 72}) {
    const TestWeight weight =
        make_weight({.k = 99, .n = n, .group_size = 33, .bias = true}, random_);
    for (const Mode mode : kModes) {
      for (const Granularity granularity : {Granularity::token, Granularity::group}) {
        for (const std::string& kernel : runnable_kernels(mode)) {
          for (const int64_t m : {1, 6, 35}) {
            const Problem p = problem_for(weight, {.m = m,
                                                   .mode = mode,
                                                   .x_dtype = kDtypes[random_() % 3],
                                                   .y_dtype = kDtypes[random_() % 3],
                                                   .granularity = granularity});
            const Matrix x = random_x(p.x_dtype, m, p.k, p.k + 7, random_);
            const std::vector<float> expected = oracle(p, weight, {x.data(), x.stride()}, x);
            Matrix y(p.y_dtype, m, n, n + 5);
            const Plan plan = *plan_gemm(p, kernel.c_str(), 2);
            AlignedBuffer memory =
                std::move(*AlignedBuffer::zeroed(plan.workspace_bytes + 2 * kMargin));
            std::memset(memory.data(), kGuard, memory.bytes());
            const GemmTarget target{&weight.packed, y.data(), y.stride()};
            const Status status =
                run_gemm(plan, {x.data(), x.stride()}, {&target, 1}, memory.data() + kMargin);
            ASSERT_TRUE(status.ok()) << status.message();
            ASSERT_EQ(first_difference(y, p.y_dtype, expected), "") << plan.describe();
            ASSERT_EQ(y.first_touched_guard(), -1) << plan.describe();
            ASSERT_EQ(x.first_touched_guard(), -1) << plan.describe();
            for (size_t i = 0; i < kMargin; ++i) {
              ASSERT_EQ(memory.data()[i], std::byte{kGuard}) << plan.describe();
              ASSERT_EQ(memory.data()[memory.bytes() - 1 - i], std::byte{kGuard})
                  << plan.describe();
            }
          }
        }
      }
    }
  }
}

TEST_F(GemmApi, NoRowsAndNoTargetsAreNothingToDo) {
  const TestWeight weight = make_weight({.k = 32, .n = 8, .group_size = 32}, random_);
  for (const Mode mode : kModes) {
    for (const std::string& kernel : runnable_kernels(mode)) {
      const Plan empty = *plan_gemm(problem_for(weight, {.m = 0, .mode = mode}), kernel.c_str());
      const GemmTarget target{&weight.packed, nullptr, 8};
      EXPECT_TRUE(run_gemm(empty, {nullptr, 32}, {&target, 1}, nullptr).ok()) << kernel;
      const Plan one = *plan_gemm(problem_for(weight, {.m = 1, .mode = mode}), kernel.c_str(), 1);
      const Matrix x = random_x(Dtype::f32, 1, 32, 32, random_);
      EXPECT_TRUE(run(one, {x.data(), 32}, {}).ok()) << kernel;
      if (mode == Mode::w4a16) continue;
      EXPECT_TRUE(run_gemm_quantized(empty, {}, {&target, 1}, nullptr).ok()) << kernel;
      EXPECT_TRUE(quantize_activations(empty, {nullptr, 32}, nullptr, nullptr, nullptr).ok());
    }
  }
}

// ---- what y must not depend on ------------------------------------------------------------------

// The preferred kernel changes with M; the bits of a row do not.
TEST_F(GemmApi, ARowOfYDoesNotDependOnM) {
  for (const Mode mode : kModes) {
    for (const Granularity granularity : {Granularity::token, Granularity::group}) {
      const TestWeight weight =
          make_weight({.k = 256, .n = 104, .group_size = 128, .bias = true}, random_);
      Problem p = problem_for(weight, {.m = 40, .mode = mode, .granularity = granularity});
      const Matrix x = random_x(Dtype::f32, 40, p.k, p.k, random_);
      const Matrix all = multiply(p, nullptr, weight, {x.data(), x.stride()});
      for (int64_t row = 0; row < 40; ++row) {
        p.m = 1;
        const Matrix alone = multiply(p, nullptr, weight, {x.row(row), x.stride()});
        ASSERT_TRUE(rows_equal(alone, 0, all, row)) << mode_name(mode) << " row " << row;
      }
      for (int64_t m = 1; m <= 40; ++m) {
        p.m = m;
        const Matrix some = multiply(p, nullptr, weight, {x.data(), x.stride()});
        for (int64_t row = 0; row < m; ++row) {
          ASSERT_TRUE(rows_equal(some, row, all, row)) << mode_name(mode) << " M " << m;
        }
      }
    }
  }
}

TEST_F(GemmApi, YDoesNotDependOnThreadsOrBlocking) {
  const TestWeight weight = make_weight({.k = 160, .n = 200, .group_size = 80}, random_);
  for (const Mode mode : kModes) {
    for (const Granularity granularity : {Granularity::tensor, Granularity::group}) {
      const Problem p = problem_for(weight, {.m = 70, .mode = mode, .granularity = granularity});
      const Matrix x = random_x(Dtype::f32, p.m, p.k, p.k, random_);
      const GemmInput input{x.data(), x.stride()};
      const std::vector<float> expected = oracle(p, weight, input, x);
      for (const std::string& kernel : runnable_kernels(mode)) {
        for (int threads = 1; threads <= 4; ++threads) {
          ASSERT_EQ(first_difference(multiply(p, kernel.c_str(), weight, input, threads), p.y_dtype,
                                     expected),
                    "")
              << kernel << ", threads " << threads;
        }
        for (const int64_t block_rows : {1, 5, 16, 31, 64}) {
          for (const int64_t blocks_per_task : {1, 3}) {
            Plan plan = *plan_gemm(p, kernel.c_str(), block_rows == 16 ? 2 : 1);
            plan.block_rows = block_rows;
            plan.blocks_per_task = blocks_per_task;
            plan.workspace_bytes = static_cast<size_t>(
                workspace_layout(p, plan.kernel->layout, block_rows).total_bytes);
            Matrix y(p.y_dtype, p.m, p.n, p.n);
            const GemmTarget target{&weight.packed, y.data(), y.stride()};
            ASSERT_TRUE(run(plan, input, {&target, 1}).ok());
            ASSERT_EQ(first_difference(y, p.y_dtype, expected), "") << plan.describe();
          }
        }
      }
    }
  }
}

// ---- error bounds -------------------------------------------------------------------------------
// u = 2^-24; a result after n roundings carries a relative error of at most
// gamma(n) = n * u / (1 - n * u) of the sum of magnitudes (Higham, Accuracy and Stability, ch. 3).
// Values here stay far from overflow and underflow, and y is fp32, so nothing else is added.

double gamma_bound(int64_t roundings) {
  const double nu = static_cast<double>(roundings) * 0x1p-24;
  return nu / (1 - nu);
}

// Per term (x, q - z, s) of w4a16: one rounding in its fma, at most group_size - 1 in those after
// it, `groups` in the fma chain over groups, one for the bias. q - z and s are exact as floats.
TEST_F(GemmApi, W4a16StaysWithinItsRoundingBound) {
  for (const int64_t group : {32, 128, 1024}) {
    const TestWeight weight =
        make_weight({.k = 2048, .n = 64, .group_size = group, .bias = true}, random_);
    const ref::Weights& w = weight.reference;
    const Problem p = problem_for(weight, {.m = 5, .mode = Mode::w4a16, .x_dtype = Dtype::f16});
    const Matrix x = random_x(p.x_dtype, p.m, p.k, p.k, random_);
    const std::vector<double> exact =
        ref::multiply_fp64(w, x.floats().data(), p.m, weight.bias.data());
    for (const std::string& kernel : runnable_kernels(p.mode)) {
      const Matrix y = multiply(p, kernel.c_str(), weight, {x.data(), x.stride()});
      for (int64_t row = 0; row < p.m; ++row) {
        for (int64_t n = 0; n < p.n; ++n) {
          double magnitude = std::fabs(weight.bias[n]);
          for (int64_t k = 0; k < p.k; ++k) {
            const int64_t g = n * w.groups + k / group;
            magnitude += std::fabs(static_cast<double>(x.get(row, k)) *
                                   (w.codes[n * p.k + k] - w.zeros[g]) * w.scales[g]);
          }
          const double bound = gamma_bound(group + w.groups + 1) * magnitude;
          ASSERT_LE(std::fabs(y.get(row, n) - exact[row * p.n + n]), bound) << kernel;
        }
      }
    }
  }
}

// Per term S * t * s of w4a8 and w4a4, S exact: one rounding of float(S), one of the product with t
// (before or after the chain), at most `groups` in the fma chain, one for the bias.
// In double the same sum has errors some 2^29 times smaller.
TEST_F(GemmApi, TheIntegerModesStayWithinTheirRoundingBound) {
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    for (const Granularity granularity : {Granularity::token, Granularity::group}) {
      for (const int64_t group : {32, 4096}) {
        const TestWeight weight =
            make_weight({.k = 4096, .n = 64, .group_size = group, .bias = true}, random_);
        const ref::Weights& w = weight.reference;
        const Problem p = problem_for(weight, {.m = 5, .mode = mode, .granularity = granularity});
        const Matrix x = random_x(p.x_dtype, p.m, p.k, p.k, random_);
        const GemmInput input{x.data(), x.stride()};
        const ref::Activations a = ref::quantize(p, input);
        const std::vector<int32_t> sums = ref::partial_sums(w, a.codes.data(), p.m);
        for (const std::string& kernel : runnable_kernels(mode)) {
          const Matrix y = multiply(p, kernel.c_str(), weight, input);
          for (int64_t row = 0; row < p.m; ++row) {
            for (int64_t n = 0; n < p.n; ++n) {
              double exact = weight.bias[n], magnitude = std::fabs(exact);
              for (int64_t g = 0; g < w.groups; ++g) {
                const double t =
                    a.scales[granularity == Granularity::group ? row * w.groups + g : row];
                const double term =
                    t * w.scales[n * w.groups + g] * sums[(row * w.groups + g) * p.n + n];
                exact += term;
                magnitude += std::fabs(term);
              }
              ASSERT_LE(std::fabs(y.get(row, n) - exact), gamma_bound(w.groups + 3) * magnitude)
                  << kernel;
            }
          }
        }
      }
    }
  }
}

// Against the product that was not quantized: each x is off by at most t / 2 (0.5001 covers the
// roundings of t and 1 / t, see test_quantizer.cc), so y by t / 2 * sum |w| and the bound above.
TEST_F(GemmApi, QuantizedActivationsMoveYByAtMostHalfAStepPerWeight) {
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const TestWeight weight = make_weight({.k = 512, .n = 64, .group_size = 128}, random_);
    const ref::Weights& w = weight.reference;
    const Problem p = problem_for(weight, {.m = 7, .mode = mode});
    const Matrix x = random_x(p.x_dtype, p.m, p.k, p.k, random_);
    const GemmInput input{x.data(), x.stride()};
    const std::vector<double> exact = ref::multiply_fp64(w, x.floats().data(), p.m, nullptr);
    const ref::Activations a = ref::quantize(p, input);
    const Matrix y = multiply(p, nullptr, weight, input);
    for (int64_t row = 0; row < p.m; ++row) {
      for (int64_t n = 0; n < p.n; ++n) {
        const double t = a.scales[row];
        double bound = 0;
        for (int64_t k = 0; k < p.k; ++k) {
          const int64_t g = n * w.groups + k / w.group_size;
          const double magnitude = std::fabs((w.codes[n * p.k + k] - w.zeros[g]) * w.scales[g]);
          bound += magnitude * t * (0.5001 + gamma_bound(w.groups + 3) * 128);
        }
        ASSERT_LE(std::fabs(y.get(row, n) - exact[row * p.n + n]), bound) << mode_name(mode);
      }
    }
  }
}

// ---- identities ---------------------------------------------------------------------------------

// A power of two commutes with every rounding of the epilogue.
TEST_F(GemmApi, GroupScalesOfOnePowerOfTwoEqualATokenScale) {
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const TestWeight weight =
        make_weight({.k = 256, .n = 72, .group_size = 64, .bias = true}, random_);
    for (const std::string& kernel : runnable_kernels(mode)) {
      for (const int64_t m : {1, 20}) {
        const std::vector<int8_t> codes = random_codes(mode, m * 256, random_);
        const std::vector<float> scales(static_cast<size_t>(m * 4), 0x1p-6f);
        std::vector<Matrix> outputs;
        for (const Granularity granularity : {Granularity::token, Granularity::group}) {
          const Problem p = problem_for(weight, {.m = m, .mode = mode, .granularity = granularity});
          const Plan plan = *plan_gemm(p, kernel.c_str(), 1);
          Matrix& y = outputs.emplace_back(p.y_dtype, m, p.n, p.n);
          AlignedBuffer workspace = std::move(*AlignedBuffer::zeroed(plan.workspace_bytes));
          const GemmTarget target{&weight.packed, y.data(), y.stride()};
          ASSERT_TRUE(run_gemm_quantized(plan, {codes.data(), p.k, scales.data()}, {&target, 1},
                                         workspace.data())
                          .ok());
        }
        for (int64_t row = 0; row < m; ++row) {
          ASSERT_TRUE(rows_equal(outputs[0], row, outputs[1], row)) << kernel;
        }
      }
    }
  }
}

// gemm.h: a static group scale is exactly a factor of s[g]. x / t and t = 1 for all, with s * t in
// the weight: an exponent shift, so nothing else rounds.
TEST_F(GemmApi, StaticGroupScalesAreFactorsOfTheWeightScales) {
  const float factors[] = {0x1p-4f, 0x1p-2f, 0x1p-5f};
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const TestWeight weight = make_weight({.k = 96, .n = 40, .group_size = 32}, random_);
    AwqTensors shifted = weight.tensors;
    for (int64_t g = 0; g < 3; ++g) {
      for (int64_t n = 0; n < 40; ++n) {
        const float s = load_as_float(shifted.scales.data(), g * 40 + n, Dtype::f16);
        shifted.scales[g * 40 + n] = f16_from_float(s * factors[g]);
        ASSERT_EQ(float_from_f16(shifted.scales[g * 40 + n]), s * factors[g]);
      }
    }
    TestWeight scaled;
    scaled.reference = ref::unpack(shifted.view());
    scaled.packed = std::move(*pack_weights(shifted.view()));
    const Matrix x = random_x(Dtype::f32, 6, 96, 96, random_);
    Matrix divided = x;
    for (int64_t row = 0; row < 6; ++row) {
      for (int64_t k = 0; k < 96; ++k) divided.set(row, k, x.get(row, k) / factors[k / 32]);
    }
    const float one = 1;
    for (const std::string& kernel : runnable_kernels(mode)) {
      const Matrix y = multiply(
          problem_for(weight, {.m = 6, .mode = mode, .granularity = Granularity::static_group}),
          kernel.c_str(), weight, {x.data(), x.stride(), 1, factors});
      const Matrix same = multiply(
          problem_for(scaled, {.m = 6, .mode = mode, .granularity = Granularity::static_tensor}),
          kernel.c_str(), scaled, {divided.data(), divided.stride(), 1, &one});
      for (int64_t row = 0; row < 6; ++row) {
        ASSERT_TRUE(rows_equal(y, row, same, row)) << kernel << " row " << row;
      }
    }
  }
}

TEST_F(GemmApi, AStaticScaleEqualToTheDynamicOneChangesNothing) {
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const float limit = mode == Mode::w4a8 ? 127 : 7;
    const TestWeight weight = make_weight({.k = 96, .n = 40, .group_size = 32}, random_);
    Matrix x = random_x(Dtype::f32, 5, 96, 96, random_);
    const float t = 0x1p-3f * (mode == Mode::w4a8 ? 1 : 16);  // amax / limit and limit / amax exact
    for (int64_t row = 0; row < 5; ++row) x.set(row, 11 * row, -t * limit);
    for (const std::string& kernel : runnable_kernels(mode)) {
      std::vector<Matrix> outputs;
      for (const Granularity granularity :
           {Granularity::token, Granularity::tensor, Granularity::static_tensor}) {
        outputs.push_back(
            multiply(problem_for(weight, {.m = 5, .mode = mode, .granularity = granularity}),
                     kernel.c_str(), weight, {x.data(), x.stride(), 1, &t}));
      }
      for (int64_t row = 0; row < 5; ++row) {
        ASSERT_TRUE(rows_equal(outputs[0], row, outputs[1], row)) << kernel;
        ASSERT_TRUE(rows_equal(outputs[0], row, outputs[2], row)) << kernel;
      }
    }
  }
}

// Without the oracle and its unpacking: nibbles taken from the words of the file by hand, q - z as
// a plain int8 weight, sums in plain ints.
TEST_F(GemmApi, AwqWordsAreExactInt8Weights) {
  constexpr int64_t k = 64, n = 48, group = 16, groups = k / group, m = 18;
  constexpr int kShift[] = {0, 16, 4, 20, 8, 24, 12, 28};  // of column 8c + j in its word
  const TestWeight weight = make_weight({.k = k, .n = n, .group_size = group}, random_);
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const std::vector<int8_t> codes = random_codes(mode, m * k, random_);
    const std::vector<float> scales(m, 1.0f);
    std::vector<int32_t> expected(m * groups * n, 0);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t column = 0; column < n; ++column) {
          const int shift = kShift[column % 8];
          const int q = (weight.tensors.qweight[i * n / 8 + column / 8] >> shift) & 15;
          const int z = (weight.tensors.qzeros[i / group * n / 8 + column / 8] >> shift) & 15;
          const auto w8 = static_cast<int8_t>(q - z);
          expected[(row * groups + i / group) * n + column] += w8 * codes[row * k + i];
        }
      }
    }
    for (const std::string& kernel : runnable_kernels(mode)) {
      const Plan plan = *plan_gemm(problem_for(weight, {.m = m, .mode = mode}), kernel.c_str(), 2);
      Matrix y(Dtype::f32, m, n, n);
      std::vector<int32_t> partials(expected.size(), -1);
      AlignedBuffer workspace = std::move(*AlignedBuffer::zeroed(plan.workspace_bytes));
      const GemmTarget target{&weight.packed, y.data(), n, partials.data()};
      ASSERT_TRUE(
          run_gemm_quantized(plan, {codes.data(), k, scales.data()}, {&target, 1}, workspace.data())
              .ok());
      EXPECT_EQ(partials, expected) << kernel;
    }
  }
}

TEST_F(GemmApi, QuantizedCodesMayBeStrided) {
  const TestWeight weight = make_weight({.k = 72, .n = 24, .group_size = 24}, random_);
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const std::vector<int8_t> wide = random_codes(mode, 20 * 80, random_);
    std::vector<int8_t> dense;
    for (int64_t row = 0; row < 20; ++row) {
      dense.insert(dense.end(), &wide[row * 80], &wide[row * 80] + 72);
    }
    const std::vector<float> scales = random_scales(20);
    for (const std::string& kernel : runnable_kernels(mode)) {
      const Plan plan = *plan_gemm(problem_for(weight, {.m = 20, .mode = mode}), kernel.c_str());
      AlignedBuffer workspace = std::move(*AlignedBuffer::zeroed(plan.workspace_bytes));
      Matrix y(Dtype::f32, 20, 24, 24), same(Dtype::f32, 20, 24, 24);
      const GemmTarget strided{&weight.packed, y.data(), 24};
      const GemmTarget plain{&weight.packed, same.data(), 24};
      ASSERT_TRUE(run_gemm_quantized(plan, {wide.data(), 80, scales.data()}, {&strided, 1},
                                     workspace.data())
                      .ok());
      ASSERT_TRUE(
          run_gemm_quantized(plan, {dense.data(), 72, scales.data()}, {&plain, 1}, workspace.data())
              .ok());
      for (int64_t row = 0; row < 20; ++row) ASSERT_TRUE(rows_equal(y, row, same, row)) << kernel;
    }
  }
}

// ---- refusals -----------------------------------------------------------------------------------

/// The code, and every one of `words` in the message.
void expect_error(const Status& status, Code code, std::initializer_list<const char*> words) {
  EXPECT_EQ(status.code(), code) << status.message();
  for (const char* word : words) {
    EXPECT_NE(status.message().find(word), std::string::npos)
        << "'" << word << "' is not in '" << status.message() << "'";
  }
}

void expect_no_plan(const Problem& problem, std::initializer_list<const char*> words) {
  expect_error(plan_gemm(problem).status(), Code::invalid_argument, words);
}

TEST(GemmErrors, ImpossibleProblemsAreNotPlanned) {
  const Problem good{.m = 1, .n = 8, .k = 64, .group_size = 32};
  ASSERT_TRUE(plan_gemm(good).ok());
  const auto with = [&](auto change) {
    Problem p = good;
    change(p);
    return p;
  };
  expect_no_plan(with([](Problem& p) { p.m = -1; }), {"M, N, K", "-1, 8, 64"});
  expect_no_plan(with([](Problem& p) { p.n = 0; }), {"1, 0, 64"});
  expect_no_plan(with([](Problem& p) { p.k = 0; }), {"1, 8, 0"});
  expect_no_plan(with([](Problem& p) { p.n = 12; }), {"12", "multiple of 8"});
  expect_no_plan(with([](Problem& p) { p.group_size = 48; }), {"48", "64"});
  expect_no_plan(with([](Problem& p) { p.group_size = 0; }), {"group size 0"});
  expect_no_plan(with([](Problem& p) { p.group_size = -1; }), {"group size -1"});
  expect_no_plan(with([](Problem& p) { p.k = p.group_size = (1 << 20) + 1; }), {"1048577"});
  expect_no_plan(with([](Problem& p) { p.k = int64_t{1} << 61; }), {"2305843009213693952"});
  expect_no_plan(with([](Problem& p) { p.n = int64_t{1} << 40; }), {"1099511627776"});
  expect_no_plan(with([](Problem& p) { p.symmetric = false; }), {"asymmetric", "w4a8"});
  expect_no_plan(with([](Problem& p) {
                   p.mode = Mode::w4a4;
                   p.symmetric = false;
                   p.granularity = Granularity::static_tensor;
                 }),
                 {"static"});
}

class GemmErrorsInMode : public ::testing::TestWithParam<Mode> {
 protected:
  std::mt19937 random_{20260103};
  TestWeight weight_ = make_weight({.k = 64, .n = 16, .group_size = 32}, random_);
  Matrix x_ = random_x(Dtype::f32, 3, 64, 64, random_);
  Matrix y_{Dtype::f32, 3, 16, 16};
  GemmInput input_{x_.data(), 64};
  GemmTarget target_{&weight_.packed, y_.data(), 16};
  AlignedBuffer workspace_ = std::move(*AlignedBuffer::zeroed(1 << 16));

  Plan plan(Granularity granularity = Granularity::token) const {
    return *plan_gemm(
        problem_for(weight_, {.m = 3, .mode = GetParam(), .granularity = granularity}));
  }
  Status run_it(const Plan& plan) {
    return run_gemm(plan, input_, {&target_, 1}, workspace_.data());
  }
  void expect_invalid(const Plan& plan, std::initializer_list<const char*> words) {
    expect_error(run_it(plan), Code::invalid_argument, words);
  }
};

INSTANTIATE_TEST_SUITE_P(Modes, GemmErrorsInMode, ::testing::ValuesIn(kModes),
                         [](const auto& mode) { return mode_name(mode.param); });

TEST_P(GemmErrorsInMode, WrongTargets) {
  ASSERT_TRUE(run_it(plan()).ok());
  const GemmTarget good = target_;
  target_.weights = nullptr;
  expect_invalid(plan(), {"no weights"});
  target_ = good;
  target_.y = nullptr;
  expect_invalid(plan(), {"no y"});
  target_ = good;
  target_.y_stride = 15;
  expect_invalid(plan(), {"15", "N=16"});
  target_ = good;
  const TestWeight other_k = make_weight({.k = 96, .n = 16, .group_size = 32}, random_);
  target_.weights = &other_k.packed;
  expect_invalid(plan(), {"K=96", "K=64"});
  const TestWeight other_group = make_weight({.k = 64, .n = 16, .group_size = 64}, random_);
  target_.weights = &other_group.packed;
  expect_invalid(plan(), {"64", "32"});
  target_ = good;
  const GemmTarget second_wrong[] = {good, {&other_k.packed, y_.data(), 16}};
  expect_error(run_gemm(plan(), input_, second_wrong, workspace_.data()), Code::invalid_argument,
               {"K=96"});
  EXPECT_TRUE(run_it(plan()).ok());
}

TEST_P(GemmErrorsInMode, WrongInputAndWorkspace) {
  const GemmInput good = input_;
  input_.x = nullptr;
  expect_invalid(plan(), {"x is null"});
  input_ = good;
  input_.x_stride = 63;
  expect_invalid(plan(), {"63", "K=64"});
  input_ = good;
  expect_error(run_gemm(plan(), input_, {&target_, 1}, nullptr), Code::invalid_argument,
               {"workspace is null"});
  expect_error(run_gemm(plan(), input_, {&target_, 1}, workspace_.data() + 32),
               Code::invalid_argument, {"64-byte aligned"});
}

TEST_P(GemmErrorsInMode, WrongClipAndStaticScales) {
  if (GetParam() == Mode::w4a16) {
    input_.clip = -1;  // ignored: nothing is quantized
    EXPECT_TRUE(run_it(plan(Granularity::static_group)).ok());
    return;
  }
  for (const float clip : {0.0f, -0.5f, 1.5f, std::nanf("")}) {
    input_.clip = clip;
    expect_invalid(plan(), {"clip", fmt::format("{}", clip).c_str(), "(0, 1]"});
  }
  input_.clip = 1;
  expect_invalid(plan(Granularity::static_tensor), {"static-tensor", "1 static"});
  expect_invalid(plan(Granularity::static_group), {"static-group", "2 static"});
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const float bad : {std::nanf(""), 0.0f, -1.0f, kInf, 0x1p-101f}) {
    const float scales[] = {0.1f, bad};
    input_.static_scales = scales;
    expect_invalid(plan(Granularity::static_group), {"scale 1 is", fmt::format("{}", bad).c_str()});
    input_.static_scales = scales + 1;
    expect_invalid(plan(Granularity::static_tensor), {"scale 0 is"});
  }
  const float least = 0x1p-100f;
  input_.static_scales = &least;
  EXPECT_TRUE(run_it(plan(Granularity::static_tensor)).ok());
}

TEST_P(GemmErrorsInMode, WrongQuantizedInput) {
  std::vector<int8_t> codes(3 * 64, 1);
  const float scales[3] = {1, 1, 1};
  const auto run_codes = [&](const QuantizedInput& input) {
    return run_gemm_quantized(plan(), input, {&target_, 1}, workspace_.data());
  };
  if (GetParam() == Mode::w4a16) {
    expect_error(run_codes({codes.data(), 64, scales}), Code::invalid_argument, {"w4a16"});
    expect_error(quantize_activations(plan(), input_, codes.data(), nullptr, nullptr),
                 Code::invalid_argument, {"w4a16"});
    return;
  }
  ASSERT_TRUE(run_codes({codes.data(), 64, scales}).ok());
  expect_error(run_codes({nullptr, 64, scales}), Code::invalid_argument, {"null"});
  expect_error(run_codes({codes.data(), 64, nullptr}), Code::invalid_argument, {"null"});
  expect_error(run_codes({codes.data(), 63, scales}), Code::invalid_argument, {"63", "K=64"});
  expect_error(quantize_activations(plan(), input_, nullptr, nullptr, nullptr),
               Code::invalid_argument, {"null"});
  for (const int code : {-128, -16, 16, 127}) {
    codes[2 * 64 + 63] = static_cast<int8_t>(code);
    if (GetParam() == Mode::w4a8) {
      EXPECT_TRUE(run_codes({codes.data(), 64, scales}).ok());
    } else {
      expect_error(run_codes({codes.data(), 64, scales}), Code::invalid_argument,
                   {"row 2", "-15..15"});
    }
  }
}

TEST_P(GemmErrorsInMode, PartialSumsAreIntegers) {
  std::vector<int32_t> partials(3 * 2 * 16);
  target_.partials = partials.data();
  if (GetParam() == Mode::w4a16) {
    expect_invalid(plan(), {"w4a16", "partial"});
  } else {
    EXPECT_TRUE(run_it(plan()).ok());
  }
}

TEST_P(GemmErrorsInMode, NonFiniteXNamesTheFirstRow) {
  if (GetParam() == Mode::w4a16) return;  // W4a16PassesNonFiniteValuesThrough
  for (const Granularity granularity : {Granularity::tensor, Granularity::token, Granularity::group,
                                        Granularity::static_tensor, Granularity::static_group}) {
    const float scales[] = {0.1f, 0.1f};
    input_.static_scales = scales;
    x_.set(2, 0, std::nanf(""));
    x_.set(1, 63, -std::numeric_limits<float>::infinity());
    expect_error(run_it(plan(granularity)), Code::non_finite, {"row 1"});
    x_.set(1, 63, 0);
    expect_error(run_it(plan(granularity)), Code::non_finite, {"row 2"});
    x_.set(2, 0, 0);
    EXPECT_TRUE(run_it(plan(granularity)).ok());
  }
}

}  // namespace
}  // namespace nibble::testing
