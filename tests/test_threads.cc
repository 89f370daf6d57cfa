// Concurrency: the pool's threads inside a call, callers' threads around it. These tests also run
// under ThreadSanitizer, so they are small and start few threads.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "gemm_testing.h"

namespace nibble::testing {
namespace {

constexpr Mode kModes[] = {Mode::w4a16, Mode::w4a8, Mode::w4a4};
constexpr int64_t kK = 128, kN = 200, kGroup = 64;

std::vector<float> random_floats(int64_t count, std::mt19937& random) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = std::normal_distribution<float>()(random);
  return values;
}

Problem problem_of(Mode mode, int64_t m, Granularity granularity = Granularity::token) {
  return {.m = m, .n = kN, .k = kK, .group_size = kGroup, .mode = mode, .granularity = granularity};
}

/// y of one call, or the failure in `status`.
std::vector<float> multiply(const Plan& plan, const TestWeight& weight, const std::vector<float>& x,
                            Status* status) {
  std::vector<float> y(static_cast<size_t>(plan.problem.m * kN), -1.0f);
  const GemmTarget target{&weight.packed, y.data(), kN};
  *status = run(plan, {x.data(), kK}, {&target, 1});
  return y;
}

class Threads : public ::testing::Test {
 protected:
  std::mt19937 random_{20260104};
  TestWeight weight_ = make_weight({.k = kK, .n = kN, .group_size = kGroup, .bias = true}, random_);
};

TEST_F(Threads, EveryKernelGivesTheSameBitsOnTwoThreadsAsOnOne) {
  for (const Mode mode : kModes) {
    for (const Granularity granularity :
         {Granularity::tensor, Granularity::token, Granularity::group}) {
      for (const int64_t m : {1, 70}) {
        const std::vector<float> x = random_floats(m * kK, random_);
        for (const std::string& kernel : runnable_kernels(mode)) {
          std::vector<std::vector<float>> outputs;
          for (const int threads : {1, 2}) {
            const Plan plan = *plan_gemm(problem_of(mode, m, granularity), kernel.c_str(), threads);
            Status status;
            outputs.push_back(multiply(plan, weight_, x, &status));
            ASSERT_TRUE(status.ok()) << status.message();
          }
          ASSERT_EQ(outputs[0], outputs[1]) << kernel << " m " << m;
        }
      }
    }
  }
}

// Callers share the weight, the plan and x; each has its own workspace and y.
TEST_F(Threads, CallersMaySharePlanWeightAndInput) {
  constexpr int kCallers = 3, kRepeats = 3;
  for (const Mode mode : kModes) {
    const std::vector<float> x = random_floats(33 * kK, random_);
    for (const std::string& kernel : runnable_kernels(mode)) {
      for (const int threads : {1, 2}) {
        const Plan plan = *plan_gemm(problem_of(mode, 33), kernel.c_str(), threads);
        Status status;
        const std::vector<float> expected = multiply(plan, weight_, x, &status);
        ASSERT_TRUE(status.ok()) << status.message();
        int equal[kCallers] = {};
        std::barrier start(kCallers);
        std::vector<std::thread> callers;
        for (int caller = 0; caller < kCallers; ++caller) {
          callers.emplace_back([&, caller] {
            start.arrive_and_wait();
            for (int i = 0; i < kRepeats; ++i) {
              Status mine;
              equal[caller] += multiply(plan, weight_, x, &mine) == expected && mine.ok();
            }
          });
        }
        for (std::thread& caller : callers) caller.join();
        for (const int count : equal) EXPECT_EQ(count, kRepeats) << kernel;
      }
    }
  }
}

// Different modes and kernels at once: nothing of one call may leak into another.
TEST_F(Threads, CallersMayRunDifferentKernels) {
  struct Job {
    Plan plan;
    std::vector<float> x, expected;
    bool same = false;
  };
  std::vector<Job> jobs;
  for (const Mode mode : kModes) {
    for (const int64_t m : {1, 20}) {
      Job job{*plan_gemm(problem_of(mode, m), nullptr, 2), random_floats(m * kK, random_), {}};
      Status status;
      job.expected = multiply(job.plan, weight_, job.x, &status);
      ASSERT_TRUE(status.ok()) << status.message();
      jobs.push_back(std::move(job));
    }
  }
  std::vector<std::thread> callers;
  for (Job& job : jobs) {
    callers.emplace_back([&job, this] {
      Status status;
      job.same = multiply(job.plan, weight_, job.x, &status) == job.expected && status.ok();
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const Job& job : jobs) EXPECT_TRUE(job.same) << job.plan.describe();
}

// Several threads find bad rows at once, in several blocks of rows: the first row is reported.
TEST_F(Threads, TheFirstNonFiniteRowIsReportedWhateverTheThreads) {
  constexpr int64_t kRows = 600;
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    for (const Granularity granularity :
         {Granularity::tensor, Granularity::token, Granularity::group}) {
      std::vector<float> x = random_floats(kRows * kK, random_);
      for (const int64_t row : {598, 311, 310, 297, 290}) {
        x[row * kK + row % kK] = std::numeric_limits<float>::quiet_NaN();
        for (const int threads : {1, 2, 3}) {
          const Plan plan = *plan_gemm(problem_of(mode, kRows, granularity), nullptr, threads);
          Status status;
          multiply(plan, weight_, x, &status);
          EXPECT_EQ(status.code(), Code::non_finite);
          EXPECT_EQ(status.message(), "x has a NaN or infinity in row " + std::to_string(row));
        }
      }
    }
  }
}

TEST_F(Threads, OneCallersNanDoesNotDisturbAnother) {
  const std::vector<float> x = random_floats(40 * kK, random_);
  std::vector<float> bad = x;
  bad[17 * kK + 3] = std::numeric_limits<float>::infinity();
  const Plan plan = *plan_gemm(problem_of(Mode::w4a8, 40), nullptr, 2);
  Status status;
  const std::vector<float> expected = multiply(plan, weight_, x, &status);
  ASSERT_TRUE(status.ok()) << status.message();
  Status good_status, bad_status;
  std::vector<float> y;
  std::thread good([&] { y = multiply(plan, weight_, x, &good_status); });
  std::thread wrong([&] { multiply(plan, weight_, bad, &bad_status); });
  good.join();
  wrong.join();
  EXPECT_TRUE(good_status.ok()) << good_status.message();
  EXPECT_EQ(y, expected);
  EXPECT_EQ(bad_status.code(), Code::non_finite);
}

TEST_F(Threads, QuantizingAloneGivesTheSameCodesOnTwoThreads) {
  const std::vector<float> x = random_floats(50 * kK, random_);
  for (const Granularity granularity :
       {Granularity::tensor, Granularity::token, Granularity::group}) {
    std::vector<ref::Activations> results;
    for (const int threads : {1, 2}) {
      const Plan plan = *plan_gemm(problem_of(Mode::w4a8, 50, granularity), nullptr, threads);
      ref::Activations& a = results.emplace_back();
      a.codes.resize(50 * kK);
      a.scales.resize(50 * kK / kGroup);
      a.sums.resize(50 * kK / kGroup);
      const Status status = quantize_activations(plan, {x.data(), kK}, a.codes.data(),
                                                 a.scales.data(), a.sums.data());
      ASSERT_TRUE(status.ok()) << status.message();
    }
    EXPECT_EQ(results[0].codes, results[1].codes);
    EXPECT_EQ(results[0].scales, results[1].scales);
    EXPECT_EQ(results[0].sums, results[1].sums);
  }
}

TEST_F(Threads, PackingGivesTheSameBytesWhateverTheThreads) {
  const std::byte* expected = weight_.packed.storage.data();  // packed by one thread
  for (const int threads : {2, 3, 9}) {
    const Result<PackedWeights> packed =
        pack_weights(weight_.tensors.view(), weight_.bias.data(), Dtype::f32, threads);
    ASSERT_TRUE(packed.ok()) << packed.status().message();
    ASSERT_EQ(packed->bytes(), weight_.packed.bytes());
    EXPECT_EQ(std::memcmp(packed->storage.data(), expected, static_cast<size_t>(packed->bytes())),
              0);
    EXPECT_TRUE(std::ranges::equal(packed->bias, weight_.packed.bias));
  }
}

TEST_F(Threads, CallersMayPackAndPlanAtTheSameTime) {
  std::vector<std::thread> callers;
  bool same[3] = {};
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&, i] {
      const Result<PackedWeights> packed =
          pack_weights(weight_.tensors.view(), weight_.bias.data(), Dtype::f32, 2);
      const Result<Plan> plan = plan_gemm(problem_of(Mode::w4a8, 8), nullptr, 1);
      same[i] = packed.ok() && plan.ok() && packed->bytes() == weight_.packed.bytes() &&
                std::memcmp(packed->storage.data(), weight_.packed.storage.data(),
                            static_cast<size_t>(packed->bytes())) == 0;
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const bool s : same) EXPECT_TRUE(s);
}

}  // namespace
}  // namespace nibble::testing
