// Which kernels of a decoding step become one: for every shape a configuration that the kernels
// take, and the same order of sums as apart.
#include <gtest/gtest.h>

#include "model/cuda/step_fusion.h"
#include "plan_testing.h"

namespace nibble::cuda {
namespace {

DeviceInfo h200() { return testing::made_up_device(); }

Plan plan_of(int64_t m, int64_t n, int64_t k, Granularity granularity = Granularity::token,
             Mode mode = Mode::w4a8, const DeviceInfo& device = h200()) {
  Problem p = testing::made_up_problem(m, n, k, mode);
  p.granularity = granularity;
  const Result<Plan> plan = plan_gemm(p, device);
  EXPECT_TRUE(plan.ok()) << plan.status().message();
  return *plan;
}

TEST(StepFusion, ALayerOfLlama8BIsFiveLaunches) {
  for (const Granularity granularity : {Granularity::token, Granularity::group}) {
    EXPECT_TRUE(fused_config(plan_of(1, 6144, 4096), Fusion::norm, h200()));
    EXPECT_TRUE(fused_config(plan_of(1, 4096, 4096, granularity), Fusion::rows, h200()));
    EXPECT_TRUE(fused_config(plan_of(1, 28672, 4096), Fusion::norm_and_gate, h200()));
    EXPECT_TRUE(fused_config(plan_of(1, 4096, 14336, granularity), Fusion::rows, h200()));
  }
}

TEST(StepFusion, WhatNoKernelTakesStaysApart) {
  const auto fused = [](const Plan& plan, Fusion fusion) {
    return fused_config(plan, fusion, h200()).has_value();
  };
  EXPECT_FALSE(fused(plan_of(2, 4096, 4096), Fusion::rows));
  EXPECT_FALSE(fused(plan_of(1, 4096, 4096, Granularity::tensor), Fusion::rows));
  EXPECT_FALSE(fused(plan_of(1, 4096, 4096, Granularity::token, Mode::w4a16), Fusion::rows));
  EXPECT_FALSE(fused(plan_of(1, 4096, 4096, Granularity::token, Mode::w4a8_fp8), Fusion::norm));
  EXPECT_FALSE(fused(plan_of(1, 4096, 28672), Fusion::rows));               // too long a row
  EXPECT_FALSE(fused(plan_of(1, 4096, 14336), Fusion::norm));               // form streamed
  EXPECT_FALSE(fused(plan_of(1, 28672, 8192), Fusion::norm_and_gate));      // one tile at a time
  EXPECT_FALSE(fused(plan_of(1, 4096 + 16, 4096), Fusion::norm_and_gate));  // half a tile
  DeviceInfo ampere = h200();
  ampere.capability = 80;
  EXPECT_FALSE(fused_config(plan_of(1, 4096, 4096, Granularity::token, Mode::w4a8, ampere),
                            Fusion::rows, ampere));
}

TEST(StepFusion, SumsAreAddedInTheSameOrder) {
  for (const int64_t k : {128, 512, 2048, 4096, 5120, 8192, 8704, 14336, 16384}) {
    for (const int64_t n : {32, 1024, 4096, 57344}) {
      for (const Granularity granularity : {Granularity::token, Granularity::group}) {
        for (const Fusion fusion : {Fusion::norm, Fusion::norm_and_gate, Fusion::rows}) {
          const Plan plan = plan_of(1, n, k, granularity);
          const auto config = fused_config(plan, fusion, h200());
          const bool streamed_norm = fusion != Fusion::rows && k > 8192;
          const bool one_tile_a_block = fusion == Fusion::norm_and_gate && k > 4096;
          ASSERT_EQ(config.has_value(), !streamed_norm && !one_tile_a_block) << n << " x " << k;
          if (!config) continue;
          SCOPED_TRACE(config->describe());
          EXPECT_EQ(config->form, plan.slab.form);
          EXPECT_EQ(config->k_warps, plan.slab.k_warps);
          EXPECT_TRUE(config->programmatic);
        }
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cuda
