// Which plans `bench gemm --plans` times: the one that is chosen among them, all valid, none twice.
// No GPU is needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "gemm/cuda/plan.h"
#include "gemm/cuda/plan_candidates.h"
#include "plan_testing.h"

namespace nibble::cuda {
namespace {

using testing::made_up_device;
using testing::made_up_problem;

void expect_valid(const Plan& plan, const DeviceInfo& device) {
  const Problem& p = plan.problem;
  const PackedLayout layout = packed_layout(p.n, p.k, p.group_size);
  EXPECT_EQ(plan.workspace_bytes, workspace_layout(plan).total) << plan.describe();
  if (plan.family == KernelFamily::slab) {
    EXPECT_LE(plan.slab.warps(), kSlabWarps) << plan.describe();
    EXPECT_LE(slab_shared_bytes(layout, p.m, has_group_scales(p), plan.slab), device.shared_bytes);
    if (plan.slab.form == SlabForm::registers) {
      EXPECT_GE(plan.slab.k_warps, layout.slices) << plan.describe();
    } else {
      EXPECT_LE(plan.slab.k_warps, layout.slices) << plan.describe();
    }
  }
  if (plan.family == KernelFamily::rs) {
    const auto tiles = rs_tiles(layout, rs_activations(plan));
    EXPECT_TRUE(std::any_of(tiles.begin(), tiles.end(), [&](const RsTile& tile) {
      return tile.tokens == plan.rs.token_tile && tile.math_groups == plan.rs.math_groups &&
             tile.blocks == plan.rs.blocks;
    })) << plan.describe();
  }
}

TEST(PlanCandidates, TheChosenPlanIsFirstAndAllAreValid) {
  const DeviceInfo device = made_up_device(90);
  for (const Mode mode : {Mode::w4a8, Mode::w4a8_fp8, Mode::w4a16, Mode::w4a4}) {
    for (const auto& [n, k] : {std::pair{4096, 4096}, {4096, 14336}, {57344, 8192}, {8, 128}}) {
      for (const int64_t m : {1, 2, 8, 9, 16, 17, 64, 128, 1000, 4096}) {
        const Problem p = made_up_problem(m, n, k, mode);
        const std::vector<Plan> plans = plan_candidates(p, device);
        ASSERT_FALSE(plans.empty());
        EXPECT_EQ(plans[0].describe(), plan_gemm(p, device)->describe());
        std::set<std::string> texts;
        for (const Plan& plan : plans) {
          expect_valid(plan, device);
          EXPECT_TRUE(texts.insert(plan.describe()).second) << plan.describe();
        }
      }
    }
  }
}

TEST(PlanCandidates, EveryKernelTileAndSplitIsAmongThem) {
  const Problem p = made_up_problem(100, 28672, 4096, Mode::w4a8);
  const std::vector<Plan> plans = plan_candidates(p, made_up_device(90));
  const auto count = [&](KernelFamily family) {
    return std::count_if(plans.begin(), plans.end(),
                         [&](const Plan& plan) { return plan.family == family; });
  };
  const auto tiles = rs_tiles(packed_layout(28672, 4096, 128), RsActivations::codes);
  int64_t ways = 0;
  for (const RsTile& tile : tiles) {
    ways += 2 + tile.most_parts - 1;  // whole, the last ones shared, in parts
  }
  EXPECT_EQ(count(KernelFamily::rs), ways);
  EXPECT_EQ(count(KernelFamily::ss), 3);  // less than two waves, if shared, leave none beside
  EXPECT_EQ(count(KernelFamily::mma), 1);
  EXPECT_EQ(count(KernelFamily::slab), 0);
  EXPECT_GT(plan_candidates(made_up_problem(1, 28672, 4096, Mode::w4a8), made_up_device(90)).size(),
            15u);
}

TEST(PlanCandidates, WeightsAreExpandedBeforeAndBeside) {
  const std::vector<Plan> plans =
      plan_candidates(made_up_problem(4096, 28672, 4096, Mode::w4a8), made_up_device(90));
  std::set<std::pair<bool, bool>> ways;
  for (const Plan& plan : plans) {
    if (plan.family != KernelFamily::ss) continue;
    const bool beside = plan.describe().find("expanded beside") != std::string::npos;
    ways.emplace(plan.ss.split_tail, beside);
  }
  EXPECT_EQ(ways.size(), 4u);
}

TEST(PlanCandidates, BeforeHopperThereIsOne) {
  for (const int capability : {80, 86, 89, 100}) {
    EXPECT_EQ(
        plan_candidates(made_up_problem(64, 4096, 4096, Mode::w4a8), made_up_device(capability))
            .size(),
        1u);
  }
}

TEST(PlanCandidates, NoneForWhatIsRefused) {
  EXPECT_TRUE(
      plan_candidates(made_up_problem(1, 12, 4096, Mode::w4a8), made_up_device(90)).empty());
}

}  // namespace
}  // namespace nibble::cuda
