// Plans of the CUDA path: which kernel, why not another, and where things lie in the workspace.
// Pure host functions; no GPU is needed.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "gemm/cuda/plan.h"
#include "gemm/cuda/ss_plan.h"

namespace nibble::cuda {
namespace {

DeviceInfo h200() {
  DeviceInfo device;
  device.ordinal = 1;
  device.name = "H200";
  device.capability = 90;
  device.multiprocessors = 132;
  device.l2_bytes = 60 << 20;
  device.memory_bytes = int64_t{140} << 30;
  device.shared_bytes = 232448;
  return device;
}

DeviceInfo of_capability(int capability) {
  DeviceInfo device = h200();
  device.capability = capability;
  device.shared_bytes = 99 << 10;
  return device;
}

Problem problem(int64_t m, int64_t n = 4096, int64_t k = 4096, int64_t group_size = 128) {
  Problem p;
  p.m = m;
  p.n = n;
  p.k = k;
  p.group_size = group_size;
  p.x_dtype = p.y_dtype = Dtype::bf16;
  return p;
}

std::string kernel_for(const Problem& p, const DeviceInfo& device, const char* force = nullptr) {
  const Result<Plan> plan = plan_gemm(p, device, force);
  return plan.ok() ? plan->kernel_name() : plan.status().message();
}

void expect_refused(const Problem& p, const DeviceInfo& device, const char* force, Code code,
                    std::initializer_list<const char*> words) {
  const Result<Plan> plan = plan_gemm(p, device, force);
  ASSERT_FALSE(plan.ok()) << plan->describe();
  EXPECT_EQ(plan.status().code(), code) << plan.status().message();
  for (const char* word : words) {
    EXPECT_NE(plan.status().message().find(word), std::string::npos)
        << word << " is not in: " << plan.status().message();
  }
}

TEST(CudaPlan, ExpandedWeightsAreWorthItFromFewerRowsOnAndNeedNoWorkspace) {
  const auto plan = [](Mode mode, int64_t m, bool expanded) {
    Problem p = problem(m);
    p.mode = mode;
    const Result<Plan> made = plan_gemm(p, h200(), nullptr, expanded);
    EXPECT_TRUE(made.ok()) << made.status().message();
    return made.ok() ? *made : Plan();
  };
  for (const auto& [mode, first] : {std::pair{Mode::w4a8, 640}, {Mode::w4a8_fp8, 384}}) {
    SCOPED_TRACE(mode_name(mode));
    EXPECT_EQ(plan(mode, first, true).family, KernelFamily::ss);
    EXPECT_EQ(plan(mode, first - 1, true).family, KernelFamily::rs);
    EXPECT_EQ(plan(mode, first, false).family, KernelFamily::rs);
    const Plan kept = plan(mode, 4096, true), made = plan(mode, 4096, false);
    EXPECT_TRUE(kept.ss.expanded);
    EXPECT_FALSE(made.ss.expanded);
    const auto image = static_cast<size_t>(kept.problem.n * kept.problem.k);
    EXPECT_LE(kept.workspace_bytes + image, made.workspace_bytes);
    EXPECT_NE(kept.describe().find("expanded before"), std::string::npos) << kept.describe();
  }
  EXPECT_FALSE(plan(Mode::w4a16, 2048, true).ss.expanded);  // none in 16 bits
}

TEST(CudaPlan, HopperRunsSlabsForFewRowsAndWgmmaForMore) {
  for (int64_t m = 0; m <= 16; ++m) EXPECT_EQ(kernel_for(problem(m), h200()), "w4a8_slab_sm90");
  for (const int64_t m : {17, 32, 100, 1535}) {
    EXPECT_EQ(kernel_for(problem(m), h200()), "w4a8_rs_sm90");
  }
  for (const int64_t m : {3072, 4096, 100000}) {
    EXPECT_EQ(kernel_for(problem(m), h200()), "w4a8_ss_sm90");
  }
  for (const int64_t m : {1535, 1536}) {  // few tiles of short K are not worth expanding yet
    const char* many = m < 1536 ? "w4a8_rs_sm90" : "w4a8_ss_sm90";
    EXPECT_EQ(kernel_for(problem(m), h200()), "w4a8_rs_sm90");
    EXPECT_EQ(kernel_for(problem(m, 28672, 4096), h200()), many);
    EXPECT_EQ(kernel_for(problem(m, 4096, 14336), h200()), many);
  }
  Problem groups = problem(3071);
  groups.granularity = Granularity::group;
  EXPECT_EQ(kernel_for(groups, h200()), "w4a8_rs_sm90");
  groups.m = 3072;
  EXPECT_EQ(kernel_for(groups, h200()), "w4a8_ss_sm90");
}

// sm_90a code runs on 9.0 only, not on later devices.
TEST(CudaPlan, OtherDevicesRunMma) {
  for (const int capability : {80, 86, 87, 89, 100, 103, 120}) {
    for (const int64_t m : {1, 16, 17, 1000}) {
      EXPECT_EQ(kernel_for(problem(m), of_capability(capability)), "w4a8_mma_sm80");
    }
  }
  expect_refused(problem(1), of_capability(75), nullptr, Code::unsupported,
                 {"w4a8_mma_sm80", "8.0", "7.5"});
}

TEST(CudaPlan, AKernelCanBeForcedWhereItRuns) {
  EXPECT_EQ(kernel_for(problem(1), h200(), "w4a8_rs_sm90"), "w4a8_rs_sm90");
  EXPECT_EQ(kernel_for(problem(1), h200(), "w4a8_mma_sm80"), "w4a8_mma_sm80");
  EXPECT_EQ(kernel_for(problem(16), h200(), "w4a8_slab_sm90"), "w4a8_slab_sm90");
  expect_refused(problem(17), h200(), "w4a8_slab_sm90", Code::unsupported, {"at most 16", "17"});
  expect_refused(problem(1), of_capability(89), "w4a8_rs_sm90", Code::unsupported, {"9.0", "8.9"});
  expect_refused(problem(1), of_capability(100), "w4a8_slab_sm90", Code::unsupported,
                 {"9.0", "10.0"});
  expect_refused(problem(1), h200(), "w4a8_amx", Code::invalid_argument, {"w4a8_amx"});
}

TEST(CudaPlan, OneLaunchThatQuantizesAsWellIsForcedByName) {
  const auto* const rows = "w4a8_slab_rows_sm90";
  const auto* const handed = "w4a8_slab_handed_sm90";
  const auto of_bf16 = [](int64_t m, int64_t k = 4096, int64_t group_size = 128) {
    Problem p = problem(m, 4096, k, group_size);
    p.x_dtype = Dtype::bf16;
    return p;
  };
  for (const int64_t m : {1, 2, 3, 16}) {
    for (const int64_t k : {96, 4096, 14336, 131072}) {
      const Problem p = of_bf16(m, k, 32);
      const Result<Plan> plan = plan_gemm(p, h200(), handed);
      ASSERT_TRUE(plan.ok()) << plan.status().message();
      EXPECT_STREQ(plan->kernel_name(), handed);
      EXPECT_TRUE(plan->is_one_launch());
      EXPECT_TRUE(plan->reads_flags());
      EXPECT_TRUE(plan->fused.handed);
      EXPECT_TRUE(plan->fused.programmatic);
      EXPECT_EQ(plan->fused.k_warps, plan->slab.k_warps);  // so the same bits
      EXPECT_EQ(plan->fused.form, plan->slab.form);
      EXPECT_NE(plan->describe().find("one launch"), std::string::npos) << plan->describe();
    }
  }
  for (const int64_t m : {1, 2}) {
    const Result<Plan> plan = plan_gemm(of_bf16(m), h200(), rows);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_STREQ(plan->kernel_name(), rows);
    EXPECT_TRUE(plan->is_one_launch());
    EXPECT_FALSE(plan->reads_flags());
    EXPECT_TRUE(plan->fused.quantizes);
    EXPECT_EQ(plan->fused.k_warps, plan->slab.k_warps);
  }
  // Two rows and fewer without a name, where x has 16 bits; by the product's name never.
  EXPECT_TRUE(plan_gemm(of_bf16(2), h200())->fused.quantizes);
  EXPECT_STREQ(plan_gemm(of_bf16(2), h200())->kernel_name(), "w4a8_slab_sm90");
  EXPECT_FALSE(plan_gemm(of_bf16(3), h200())->is_one_launch());
  EXPECT_FALSE(plan_gemm(of_bf16(1, 28672), h200())->is_one_launch());
  EXPECT_FALSE(plan_gemm(of_bf16(1), h200(), "w4a8_slab_sm90")->is_one_launch());
  EXPECT_FALSE(plan_gemm(of_bf16(1), of_capability(80))->is_one_launch());
  expect_refused(of_bf16(3), h200(), rows, Code::unsupported, {rows, "at most 2", "3"});
  expect_refused(of_bf16(17), h200(), handed, Code::unsupported, {handed, "at most 16", "17"});
  expect_refused(of_bf16(1, 28672), h200(), rows, Code::unsupported, {rows, "1 rows", "28672"});
  for (const char* name : {rows, handed}) {
    Problem p = problem(1);  // f32
    p.x_dtype = Dtype::f32;
    EXPECT_FALSE(plan_gemm(p, h200())->is_one_launch());
    expect_refused(p, h200(), name, Code::unsupported, {name, "f16 or bf16", "f32"});
    p = of_bf16(1, 204, 204);
    expect_refused(p, h200(), name, Code::unsupported, {name, "multiple of 8", "204"});
    p = of_bf16(1);
    p.granularity = Granularity::tensor;
    expect_refused(p, h200(), name, Code::unsupported, {name, "tensor"});
    p.granularity = Granularity::group;
    EXPECT_EQ(kernel_for(p, h200(), name), name);
    p.group_size = 256;
    expect_refused(p, h200(), name, Code::unsupported, {name, "at most 128", "256"});
    p = of_bf16(1);
    p.mode = Mode::w4a4;
    EXPECT_EQ(kernel_for(p, h200(), name), name);
    p.symmetric = false;
    expect_refused(p, h200(), name, Code::unsupported, {name, "symmetric"});
    expect_refused(of_bf16(1), of_capability(80), name, Code::unsupported, {name, "9.0", "8.0"});
  }
}

TEST(CudaPlan, RefusalsNameWhatIsWrong) {
  Problem p = problem(1);
  p.mode = Mode::w4a16;
  p.x_dtype = Dtype::f32;
  expect_refused(p, h200(), nullptr, Code::unsupported, {"w4a16", "f32", "f16 and bf16"});
  p = problem(1, 64, 204, 204);
  p.mode = Mode::w4a16;
  expect_refused(p, h200(), nullptr, Code::unsupported, {"w4a16", "204", "multiple of 8"});
  expect_refused(problem(1, 12), h200(), nullptr, Code::invalid_argument, {"12", "8"});
  expect_refused(problem(1, 64, 4096, 96), h200(), nullptr, Code::invalid_argument, {"96", "4096"});
  expect_refused(problem(1, 64, 960, 96), h200(), nullptr, Code::unsupported, {"96", "32, 64"});
  expect_refused(problem(1, 64, 96, 96), h200(), nullptr, Code::unsupported, {"96"});
  expect_refused(problem(1, 64, 1024, 16), h200(), nullptr, Code::unsupported, {"16"});
  expect_refused(problem(-1), h200(), nullptr, Code::invalid_argument, {"-1"});
  Problem mixed = problem(1);
  mixed.mode = Mode::w4a4;
  mixed.granularity = Granularity::group;
  mixed.mixed_groups = true;
  expect_refused(mixed, h200(), nullptr, Code::unsupported, {"8 bits"});
  Problem asymmetric = problem(1);
  asymmetric.symmetric = false;
  expect_refused(asymmetric, h200(), nullptr, Code::invalid_argument, {"asymmetric"});
}

TEST(CudaPlan, W4a16ReadsXWhereItIs) {
  for (const int capability : {80, 86, 89, 90, 100}) {
    for (const int64_t m : {1, 16, 17, 100, 4096}) {
      Problem p = problem(m);
      p.mode = Mode::w4a16;
      p.granularity = Granularity::group;  // ignored
      const Result<Plan> plan = plan_gemm(p, of_capability(capability));
      ASSERT_TRUE(plan.ok()) << plan.status().message();
      EXPECT_TRUE(std::string_view(plan->kernel_name()).starts_with("w4a16_"));
      const WorkspaceLayout w = workspace_layout(*plan);
      const auto reordered =
          static_cast<size_t>(plan->family == KernelFamily::rs ? m * 4096 * 2 : 0);
      EXPECT_EQ(w.total - w.codes, reordered);  // nothing is quantized
      EXPECT_NE(plan->describe().find("act=bf16"), std::string::npos) << plan->describe();
    }
  }
  Problem p = problem(16);
  p.mode = Mode::w4a16;
  for (const auto& [n, k] : {std::pair{57344, 8192}, std::pair{8192, 28672}}) {
    p.n = n;
    p.k = k;
    EXPECT_EQ(kernel_for(p, h200()), "w4a16_rs_sm90");
    EXPECT_EQ(kernel_for(p, h200(), "w4a16_slab_sm90"), "w4a16_slab_sm90");
  }
  for (const auto& [n, k] : {std::pair{57344, 4096}, std::pair{4096, 8192}}) {
    p.n = n;
    p.k = k;
    EXPECT_EQ(kernel_for(p, h200()), "w4a16_slab_sm90");
  }
  p = problem(1);
  p.mode = Mode::w4a16;
  expect_refused(p, h200(), "w4a8_mma_sm80", Code::unsupported, {"mode w4a8", "w4a16"});
  expect_refused(problem(1), h200(), "w4a16_mma_sm80", Code::unsupported, {"mode w4a16", "w4a8"});
}

TEST(CudaPlan, E4m3ActivationsMultiplyInFp8WhereThereAreManyRows) {
  Problem p = problem(4096);
  p.mode = Mode::w4a8_fp8;
  const Result<Plan> many = plan_gemm(p, h200());
  ASSERT_TRUE(many.ok()) << many.status().message();
  EXPECT_STREQ(many->kernel_name(), "w4a8_fp8_ss_sm90");
  EXPECT_FALSE(multiplies_halves(*many));
  for (const int64_t m : {1, 8, 9, 16, 2047}) {
    p.m = m;
    const Result<Plan> plan = plan_gemm(p, h200());
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_STREQ(plan->kernel_name(), m <= 8 ? "w4a8_fp8_slab_sm90" : "w4a8_fp8_rs_sm90");
    EXPECT_EQ(multiplies_halves(*plan), m <= 8);
    const WorkspaceLayout w = workspace_layout(*plan);
    EXPECT_EQ(w.scales - w.codes, static_cast<size_t>(m * 4096 * (m <= 8 ? 2 : 1)));
    EXPECT_STREQ(plan_gemm(p, of_capability(86))->kernel_name(), "w4a8_fp8_mma_sm80");
  }
  p.m = 1024;
  EXPECT_EQ(kernel_for(p, h200()), "w4a8_fp8_rs_sm90");  // few tiles of short K
  p.n = 28672;
  EXPECT_EQ(kernel_for(p, h200()), "w4a8_fp8_ss_sm90");
  p.m = 1023;
  EXPECT_EQ(kernel_for(p, h200()), "w4a8_fp8_rs_sm90");
  p.group_size = 64;
  p.m = 4096;
  EXPECT_EQ(kernel_for(p, h200()), "w4a8_fp8_rs_sm90");
  p.granularity = Granularity::group;
  expect_refused(p, h200(), nullptr, Code::unsupported, {"w4a8-fp8", "group", "one scale a token"});
}

TEST(CudaPlan, GroupSizesOfTheLayout) {
  for (const int64_t g : {32, 64, 128, 256, 1152}) {
    EXPECT_TRUE(plan_gemm(problem(4, 64, 1152 * 2, g), h200()).ok()) << g;
  }
  for (const int64_t k : {136, 200, 576, 1152, 4096}) {  // one group, whole blocks or not
    EXPECT_TRUE(plan_gemm(problem(4, 64, k, k), h200()).ok()) << k;
  }
}

// int4 codes run through the int8 kernels: exact, and the plan says that nothing is gained.
TEST(CudaPlan, Int4RunsThroughInt8AndSaysSo) {
  Problem p = problem(64);
  p.mode = Mode::w4a4;
  p.granularity = Granularity::group;
  p.symmetric = false;
  const Result<Plan> plan = plan_gemm(p, h200());
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_STREQ(plan->kernel_name(), "w4a8_rs_sm90");
  EXPECT_NE(plan->describe().find("as fast as w4a8"), std::string::npos) << plan->describe();
}

// 8.0 to 8.9 have 4-bit tensor cores; later ones emulate them, so there only by name.
TEST(CudaPlan, Int4RunsNativelyWhereThatIsNotEmulated) {
  for (const bool symmetric : {true, false}) {
    Problem p = problem(200);
    p.mode = Mode::w4a4;
    p.symmetric = symmetric;
    for (const Granularity granularity : {Granularity::token, Granularity::group}) {
      p.granularity = granularity;
      for (const int capability : {80, 86, 89}) {
        const Result<Plan> plan = plan_gemm(p, of_capability(capability));
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        EXPECT_STREQ(plan->kernel_name(), "w4a4_mma_sm80");
        EXPECT_EQ(plan->describe().find("as fast as w4a8"), std::string::npos);
        EXPECT_FALSE(plan->reads_flags());
        const WorkspaceLayout w = workspace_layout(*plan);
        EXPECT_GE(w.codes, kFlagBytes + size_t{200} * 4096 / 2 + size_t{200} * 32 * 4);
      }
      for (const int capability : {90, 100, 120}) {
        const DeviceInfo device = of_capability(capability);
        EXPECT_NE(kernel_for(p, device), "w4a4_mma_sm80");
        EXPECT_EQ(kernel_for(p, device, "w4a4_mma_sm80"), "w4a4_mma_sm80");
      }
    }
  }
  Problem p = problem(64);
  p.mode = Mode::w4a4;
  EXPECT_EQ(kernel_for(p, of_capability(89)), "w4a8_mma_sm80");  // bound by the read of weights
  p = problem(200, 4096, 4096, 64);
  p.mode = Mode::w4a4;
  EXPECT_EQ(kernel_for(p, of_capability(80)), "w4a4_mma_sm80");
  p.group_size = 32;
  EXPECT_EQ(kernel_for(p, of_capability(80)), "w4a8_mma_sm80");
  expect_refused(p, of_capability(80), "w4a4_mma_sm80", Code::unsupported, {"at least 64"});
  expect_refused(problem(200), of_capability(80), "w4a4_mma_sm80", Code::unsupported,
                 {"int4 codes"});
  EXPECT_EQ(kernel_for(problem(200), of_capability(80)), "w4a8_mma_sm80");
}

// Symmetric int4 codes are exact in fp8 products, which are faster where there are many rows.
TEST(CudaPlan, ManyRowsOfInt4RunInFp8) {
  Problem p = problem(4096);
  EXPECT_STREQ(plan_gemm(p, h200())->kernel_name(), "w4a8_ss_sm90");
  p.mode = Mode::w4a4;
  EXPECT_STREQ(plan_gemm(p, h200())->kernel_name(), "w4a4_ss_sm90");
  EXPECT_EQ(plan_gemm(p, h200())->describe().find("as fast as w4a8"), std::string::npos);
  p.m = 128;
  EXPECT_EQ(kernel_for(p, h200()), "w4a4_rs_sm90");
  EXPECT_TRUE(plan_gemm(p, h200())->e4m3);
  p.m = 127;
  EXPECT_EQ(kernel_for(p, h200()), "w4a8_rs_sm90");
  EXPECT_FALSE(plan_gemm(p, h200())->e4m3);
  p.m = 128;
  p.granularity = Granularity::group;
  EXPECT_EQ(kernel_for(p, h200()), "w4a8_rs_sm90");
  expect_refused(p, h200(), "w4a4_rs_sm90", Code::unsupported, {"one scale a token"});
  p.granularity = Granularity::token;
  p.m = 4096;
  p.symmetric = false;  // up to 15: more bits than fp8 accumulation keeps
  EXPECT_STREQ(plan_gemm(p, h200())->kernel_name(), "w4a8_ss_sm90");
  expect_refused(p, h200(), "w4a4_ss_sm90", Code::unsupported, {"symmetric"});
  expect_refused(p, h200(), "w4a4_rs_sm90", Code::unsupported, {"symmetric"});
  p.granularity = Granularity::group;
  EXPECT_STREQ(plan_gemm(p, h200())->kernel_name(), "w4a8_ss_sm90");
}

// What no wgmma kernel is compiled for is left to the one that runs everywhere.
TEST(CudaPlan, ScalesPerShortGroupRunByMma) {
  Problem p = problem(64, 4096, 4096, 64);
  EXPECT_STREQ(plan_gemm(p, h200())->kernel_name(), "w4a8_rs_sm90");
  p.granularity = Granularity::group;
  EXPECT_STREQ(plan_gemm(p, h200())->kernel_name(), "w4a8_mma_sm80");
}

TEST(CudaPlan, OperandsAreInTheOrderOfTheKernel) {
  EXPECT_EQ(plan_gemm(problem(1), h200())->order, OperandOrder::natural);
  EXPECT_EQ(plan_gemm(problem(64), h200())->order, OperandOrder::wgmma);
  EXPECT_EQ(plan_gemm(problem(64), of_capability(80))->order, OperandOrder::natural);
  EXPECT_EQ(plan_gemm(problem(1), h200())->device, 1);
  EXPECT_EQ(plan_gemm(problem(1, 64, 576, 64), h200())->padded_k, 1024);
}

TEST(CudaPlan, ManyRowsOfFloatsRunWithExpandedWeights) {
  Problem p = problem(2048);
  p.mode = Mode::w4a16;
  const Result<Plan> plan = plan_gemm(p, h200());
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_STREQ(plan->kernel_name(), "w4a16_ss_sm90");
  EXPECT_EQ(plan->order, OperandOrder::natural);  // x is read where it is
  EXPECT_TRUE(multiplies_halves(*plan));
  EXPECT_GE(plan->workspace_bytes, size_t{4096} * 4096 * 2);
  p.m = 1535;
  EXPECT_EQ(kernel_for(p, h200()), "w4a16_rs_sm90");
  p.m = 4096;
  p.group_size = 64;
  EXPECT_EQ(kernel_for(p, h200()), "w4a16_rs_sm90");
}

// Tiles of 192 rows, in 16 bits of 128; of e4m3 also 176 and 128, whichever costs least: the fewest
// rounds of the shortest tiles where rounds are few, large tiles where they are many.
TEST(CudaPlan, TilesOfExpandedWeights) {
  const auto config = [](int64_t m, int64_t n, SsConfig kind) {
    set_ss_work(kind, packed_layout(n, 4096, 128), m);
    return kind;
  };
  struct Case {
    int64_t m, n;
    int tile;
    bool split;
  };
  for (const Case& c : {Case{384, 28672, 192, true},
                        {512, 4096, 128, false},    // 4 x 16 of 66 clusters at once
                        {768, 4096, 192, false},    // 4 x 16
                        {1024, 4096, 128, false},   // 8 x 16: two rounds
                        {2048, 28672, 192, false},  // 11 x 112
                        {4096, 28672, 192, false}}) {
    const SsConfig e4m3 = config(c.m, c.n, {.e4m3 = true});
    EXPECT_EQ(e4m3.token_tile, c.tile) << c.m << " x " << c.n;
    EXPECT_EQ(e4m3.split_tail, c.split) << c.m << " x " << c.n;
    EXPECT_EQ(e4m3.image().columns, 128);
    EXPECT_EQ(config(c.m, c.n, {}).token_tile, 192);
    EXPECT_EQ(config(c.m, c.n, {.e4m3 = true, .group_scales = true}).token_tile, 192);
    const SsConfig halves = config(c.m, c.n, {.halves = true});
    EXPECT_EQ(halves.token_tile, 128);
    EXPECT_EQ(halves.image().columns, 192);
    EXPECT_EQ(halves.image().weight_bytes, 2);
  }
  EXPECT_TRUE(config(512, 1024, {.e4m3 = true}).split_tail);  // a quarter of a wave
  EXPECT_TRUE(config(2048, 4096, {}).split_tail);
  EXPECT_FALSE(config(4096, 28672, {}).split_tail);
}

// Where each multiprocessor has some tiles, the others' weights are expanded beside them: that is
// worth it from fewer rows on.
TEST(CudaPlan, WavesOfTilesRunWithExpandedWeights) {
  const auto family = [](Mode mode, int64_t m, int64_t n) {
    Problem p = problem(m);
    p.mode = mode;
    p.n = n;
    return plan_gemm(p, h200())->family;
  };
  for (const auto& [mode, narrow] : {std::pair{Mode::w4a4, 2048}, {Mode::w4a16, 1536}}) {
    SCOPED_TRACE(mode_name(mode));
    EXPECT_EQ(family(mode, 1024, 28672), KernelFamily::ss);
    EXPECT_EQ(family(mode, 1023, 28672), KernelFamily::rs);
    EXPECT_EQ(family(mode, narrow, 4096), KernelFamily::ss);
    EXPECT_EQ(family(mode, narrow - 1, 4096), KernelFamily::rs);
    EXPECT_EQ(family(mode, 0, 4096), KernelFamily::slab);
  }
}

// Many rows: products long enough to expand beside. Few, or few columns: all weights beforehand.
TEST(CudaPlan, WeightsAreExpandedBesideLongProducts) {
  const auto plan = [](Mode mode, int64_t m, int64_t n, int64_t k) {
    Problem p = problem(m);
    p.mode = mode;
    p.n = n;
    p.k = k;
    const Result<Plan> made = plan_gemm(p, h200());
    EXPECT_TRUE(made.ok()) << made.status().message();
    EXPECT_EQ(made->family, KernelFamily::ss);
    return *made;
  };
  for (const Mode mode : {Mode::w4a8, Mode::w4a8_fp8, Mode::w4a4, Mode::w4a16}) {
    SCOPED_TRACE(mode_name(mode));
    int64_t before = std::numeric_limits<int>::max();
    for (const int64_t m : {1536, 2048, 4096, 16384}) {
      const Plan wide = plan(mode, m, 57344, 8192);
      const PackedLayout layout = packed_layout(57344, 8192, 128);
      const int64_t first = ss_first_pairs(layout, wide.ss);
      EXPECT_GT(first, 0) << m;  // the first wave has nothing to wait beside
      EXPECT_LE(first, before) << m;
      EXPECT_LT(2 * first, wide.ss.image().tiles(layout)) << m;
      before = first;
      const std::string text = fmt::format("{} of 57344 columns expanded beside",
                                           57344 - first * 2 * wide.ss.image().columns);
      EXPECT_NE(wide.describe().find(text), std::string::npos) << wide.describe();
    }
    const Plan narrow = plan(mode, 4096, 512, 4096);
    EXPECT_EQ(ss_piece_words(packed_layout(512, 4096, 128), narrow.ss), 0);
    EXPECT_EQ(narrow.describe().find("beside"), std::string::npos) << narrow.describe();
  }
}

TEST(CudaPlan, TokenTilesHoldAllRowsWithLittlePadding) {
  const std::span<const RsTile> tiles =
      rs_tiles(packed_layout(4096, 4096, 128), RsActivations::codes);
  for (int64_t m = 1; m <= 20000; m += m < 700 ? 1 : 37) {
    const RsConfig config = rs_config(packed_layout(4096, 4096, 128), m, RsActivations::codes, 132);
    const auto known = [&](const RsTile& tile) {
      return tile.tokens == config.token_tile && tile.math_groups == config.math_groups &&
             tile.blocks == config.blocks;
    };
    ASSERT_EQ(std::count_if(tiles.begin(), tiles.end(), known), 1) << m;
    const int64_t padded = (m + config.token_tile - 1) / config.token_tile * config.token_tile;
    if (m <= 64) {
      ASSERT_LE(padded, m <= 32 ? 32 : 64) << m;
    } else if (m >= 2048) {
      ASSERT_LT(static_cast<double>(padded), 1.08 * static_cast<double>(m)) << m;
    }
  }
}

/// Whether w4a8-fp8 is multiplied by tiles of so many rows and warpgroups.
bool multiplies_e4m3_by(int64_t n, int64_t k, int64_t m, int tokens, int math_groups) {
  const RsConfig config = rs_config(packed_layout(n, k, 128), m, RsActivations::e4m3, 132);
  return config.token_tile == tokens && config.math_groups == math_groups;
}

RsConfig config_of_codes(int64_t n, int64_t k, int64_t m) {
  return rs_config(packed_layout(n, k, 128), m, RsActivations::codes, 132);
}

TEST(CudaPlan, TilesAreSplitWhereThatEvensOutTheWork) {
  EXPECT_TRUE(config_of_codes(4096, 14336, 32).split_tail);      // fewer tiles than workers
  EXPECT_TRUE(config_of_codes(28672, 4096, 128).split_tail);     // a little more than one wave
  EXPECT_FALSE(config_of_codes(66 * 384, 4096, 96).split_tail);  // one wave of 66 clusters
  EXPECT_FALSE(config_of_codes(4096, 512, 32).split_tail);       // one slice: nothing to split
  for (int64_t n = 1024; n <= 66 * 512 * 2; n += 1024) {
    for (const int64_t m : {17, 40, 100, 300, 1000}) {
      const PackedLayout layout = packed_layout(n, 4096, 128);
      const RsConfig config = config_of_codes(n, 4096, m);
      const RsSchedule schedule = rs_schedule_of(layout, m, config);
      EXPECT_EQ(config.split_tail, schedule.whole < schedule.tiles()) << n << " " << m;
    }
  }
}

// What was fastest on an H200, or within a few percent of it (docs/notes.md).
TEST(CudaPlan, MeasuredShapesGetTheTilesThatWereFast) {
  struct Case {
    int64_t n, k, m;
    int tokens, math_groups;
    bool split;
    int parts = 1;
  };
  for (const Case& c : {Case{4096, 4096, 32, 32, 2, false, 4},
                        {6144, 4096, 32, 32, 2, false, 4},
                        {4096, 14336, 32, 32, 2, true},
                        {28672, 4096, 32, 32, 2, false},
                        {4096, 14336, 64, 64, 3, true},
                        {4096, 4096, 64, 64, 3, false, 4},
                        {28672, 4096, 64, 64, 4, false},
                        {4096, 4096, 128, 64, 1, false},
                        {6144, 4096, 128, 128, 2, false, 2},
                        {4096, 14336, 128, 64, 3, true},
                        {28672, 4096, 128, 128, 2, true},
                        {8192, 28672, 128, 128, 2, true},  // shared widely
                        {4096, 4096, 256, 64, 2, false},
                        {28672, 4096, 256, 128, 2, true},
                        {28672, 4096, 320, 160, 2, true},
                        {4096, 4096, 640, 160, 2, false}}) {
    const RsConfig config = config_of_codes(c.n, c.k, c.m);
    EXPECT_EQ(config.token_tile, c.tokens) << c.n << "x" << c.k << " " << c.m;
    EXPECT_EQ(config.math_groups, c.math_groups) << c.n << "x" << c.k << " " << c.m;
    EXPECT_EQ(config.split_tail, c.split) << c.n << "x" << c.k << " " << c.m;
    EXPECT_EQ(config.parts, c.parts) << c.n << "x" << c.k << " " << c.m;
  }
}

TEST(CudaPlan, E4m3TakesTilesOfUpTo192Rows) {
  EXPECT_TRUE(multiplies_e4m3_by(4096, 4096, 32, 32, 2));
  EXPECT_TRUE(multiplies_e4m3_by(4096, 4096, 256, 64, 2));
  EXPECT_TRUE(multiplies_e4m3_by(28672, 4096, 256, 128, 2));
  EXPECT_TRUE(multiplies_e4m3_by(28672, 4096, 320, 160, 2));
  EXPECT_TRUE(multiplies_e4m3_by(4096, 14336, 768, 192, 2));
  EXPECT_TRUE(multiplies_e4m3_by(8192, 28672, 384, 192, 2));
}

TEST(CudaPlan, FlagsOfEveryTileFit) {
  for (const RsActivations activations :
       {RsActivations::codes, RsActivations::e4m3, RsActivations::halves}) {
    for (const RsTile& tile : rs_tiles(packed_layout(4096, 4096, 128), activations)) {
      const int blocks = 132 * tile.blocks;
      EXPECT_LE(sizeof(uint32_t) * blocks * tile.math_groups, kFlagBytes) << tile.tokens;
    }
  }
}

TEST(CudaPlan, DivisorsDivide) {
  for (const int by : {1, 2, 3, 5, 7, 64, 66, 132, 1000, 65537, 1 << 30, 0x7fffffff}) {
    const Divisor divisor(by);
    const auto d = static_cast<unsigned>(by);
    for (unsigned q = 0; q <= 0xffffffffu / d && q < 100000; q = q * 3 + 1) {
      for (const unsigned n : {q * d, q * d + d - 1, 0xffffffffu / d * d - 1, 0xffffffffu}) {
        if (n < q * d) continue;  // past 32 bits
        ASSERT_EQ(static_cast<unsigned>(divisor.quotient(n)), n / d) << n << " / " << d;
      }
    }
  }
}

// What everybody who waits for parts of a tile relies on.
TEST(CudaPlan, SharersOfATileAreThoseWhoWorkOnIt) {
  for (const int64_t weight_tiles : {1, 3, 11, 40, 75}) {
    for (const int64_t token_tiles : {1, 2, 9}) {
      for (const int64_t slices : {2, 8, 28}) {
        for (const int resident : {3, 66, 132}) {
          const RsSchedule s = rs_schedule(weight_tiles, token_tiles, slices, resident, true);
          for (int worker = 0; worker < s.workers; ++worker) {
            for (int item = s.whole_of(worker); item < s.items(worker); ++item) {
              const RsWork work = s.work(worker, item);
              const RsSharers sharers = s.sharers(work.index);
              ASSERT_GE(worker, sharers.first);
              ASSERT_LT(worker, sharers.first + sharers.count);
              ASSERT_EQ(work.slice0 == 0, worker == sharers.first);
              ASSERT_EQ(work.slice1 == slices, worker == sharers.first + sharers.count - 1);
              ASSERT_TRUE(sharers.count <= 2 || s.shares_widely());
            }
          }
        }
      }
    }
  }
}

// Every slice of every tile is done exactly once, by consecutive workers where a tile is shared.
TEST(CudaPlan, RsScheduleCoversEverySliceOnce) {
  for (const int64_t weight_tiles : {1, 3, 16, 40}) {
    for (const int64_t token_tiles : {1, 2, 9, 33}) {
      for (const int64_t slices : {1, 2, 8, 29}) {
        for (const bool split : {false, true}) {
          const RsSchedule schedule = rs_schedule(weight_tiles, token_tiles, slices, 66, split);
          std::set<std::tuple<int, int, int>> done;
          for (int worker = 0; worker < schedule.workers; ++worker) {
            for (int item = 0; item < schedule.items(worker); ++item) {
              const RsWork work = schedule.work(worker, item);
              ASSERT_LT(work.weight_tile, weight_tiles);
              ASSERT_LT(work.token_tile, token_tiles);
              ASSERT_LT(work.slice0, work.slice1);
              for (int slice = work.slice0; slice < work.slice1; ++slice) {
                ASSERT_TRUE(done.insert({work.weight_tile, work.token_tile, slice}).second);
              }
            }
          }
          ASSERT_EQ(static_cast<int64_t>(done.size()), weight_tiles * token_tiles * slices)
              << weight_tiles << " x " << token_tiles << " x " << slices << " split " << split;
        }
      }
    }
  }
}

// The workers of a cluster have consecutive parts of one tile, from k = 0 on.
TEST(CudaPlan, PartsOfAClusterCoverEverySliceOnce) {
  for (const int64_t slices : {2, 3, 7, 28}) {
    for (const int parts : {2, 3, 4}) {
      if (parts > slices) continue;
      const RsSchedule s = rs_schedule(5, 9, slices, 66, false, 8, parts);
      ASSERT_EQ(s.workers, 45 * parts);
      ASSERT_FALSE(s.shares_widely());
      std::set<std::tuple<int, int, int>> done;
      for (int worker = 0; worker < s.workers; ++worker) {
        ASSERT_EQ(s.items(worker), 1);
        const RsWork work = s.work(worker, 0), first = s.work(worker / parts * parts, 0);
        ASSERT_EQ(work.index, first.index);
        ASSERT_LT(work.slice0, work.slice1);
        ASSERT_EQ(work.slice0 == 0, worker % parts == 0);
        for (int slice = work.slice0; slice < work.slice1; ++slice) {
          ASSERT_TRUE(done.insert({work.weight_tile, work.token_tile, slice}).second);
        }
      }
      ASSERT_EQ(static_cast<int64_t>(done.size()), 45 * slices);
    }
  }
}

TEST(CudaPlan, WorkspaceHoldsEverythingAligned) {
  for (const Granularity granularity :
       {Granularity::tensor, Granularity::token, Granularity::group, Granularity::static_group}) {
    for (const int64_t m : {1, 16, 17, 161}) {
      for (const int64_t group_size : {32, 64, 128, 256, 576}) {
        Problem p = problem(m, 520, group_size == 576 ? 576 : 1280, group_size);
        p.granularity = granularity;
        const Result<Plan> plan = plan_gemm(p, h200());
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        const WorkspaceLayout w = workspace_layout(*plan);
        const int64_t groups = scales_per_group(granularity) ? p.k / group_size : 1;
        EXPECT_EQ(w.scratch, 0u);  // its flags lie where those of every other plan do
        EXPECT_GE(w.codes - w.scratch, kFlagBytes);
        EXPECT_GE(w.scales - w.codes, static_cast<size_t>(m * plan->padded_k));
        EXPECT_GE(w.range - w.scales, static_cast<size_t>(m * groups * 4));
        EXPECT_GE(w.total - w.range, 16u);
        for (const size_t offset : {w.codes, w.scales, w.range, w.total}) {
          EXPECT_EQ(offset % kWorkspaceAlignment, 0u);
        }
        EXPECT_EQ(plan->workspace_bytes, w.total);
      }
    }
  }
}

TEST(CudaPlan, DescribesItselfInOneLine) {
  for (const int64_t m : {1, 64}) {
    const std::string text = plan_gemm(problem(m), h200())->describe();
    EXPECT_EQ(text.find('\n'), std::string::npos);
    for (const char* word : {"M=", "N=4096", "K=4096", "g=128", "bf16", "token", "workspace="}) {
      EXPECT_NE(text.find(word), std::string::npos) << word << " is not in: " << text;
    }
  }
}

TEST(CudaPlan, TableNamesEveryKernel) {
  std::set<std::string> names;
  for (const KernelRow& row : kernel_table()) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name;
    std::string mode = mode_name(row.mode);
    std::replace(mode.begin(), mode.end(), '-', '_');
    EXPECT_TRUE(std::string_view(row.name).starts_with(mode + "_")) << row.name;
  }
  EXPECT_EQ(names.size(), 17u);
}

}  // namespace
}  // namespace nibble::cuda
