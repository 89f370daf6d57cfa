// Which kernel runs: the table, forcing by argument and by NIBBLE_KERNEL, proof that the planned
// kernel is the one that is called, and the pure policy functions on imagined CPUs.
#include <atomic>
#include <cstdlib>
#include <optional>
#include <set>
#include <string_view>

#include "gemm/cpu/plan.h"
#include "gemm_testing.h"

namespace nibble::testing {
namespace {

constexpr Mode kModes[] = {Mode::w4a16, Mode::w4a8, Mode::w4a4};

/// Sets or, with null, unsets NIBBLE_KERNEL, and restores it.
class ForcedByEnvironment {
 public:
  explicit ForcedByEnvironment(const char* value) {
    if (const char* before = std::getenv(kName)) before_ = before;
    set(value);
  }
  ~ForcedByEnvironment() { set(before_ ? before_->c_str() : nullptr); }
  ForcedByEnvironment(const ForcedByEnvironment&) = delete;
  ForcedByEnvironment& operator=(const ForcedByEnvironment&) = delete;

 private:
  static constexpr const char* kName = "NIBBLE_KERNEL";
  static void set(const char* value) {
    if (value == nullptr) {
      unsetenv(kName);
    } else {
      setenv(kName, value, 1);
    }
  }
  std::optional<std::string> before_;
};

Problem problem_of(Mode mode, int64_t m = 4) {
  return {.m = m, .n = 64, .k = 128, .group_size = 64, .mode = mode};
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

// ---- the table ----------------------------------------------------------------------------------

TEST(KernelTable, NamesAreUniqueAndBeginWithTheirMode) {
  std::set<std::string> names;
  for (const KernelInfo& info : kernel_table()) {
    EXPECT_TRUE(names.insert(info.name).second) << info.name;
    EXPECT_EQ(std::string(info.name), std::string(mode_name(info.mode)) + "_" + isa_name(info.isa));
    EXPECT_EQ(info.runs_here, info.reason.empty()) << info.name;
  }
}

TEST(KernelTable, EveryModeHasAScalarKernelThatRunsAndIsLast) {
  for (const Mode mode : kModes) {
    std::optional<KernelInfo> last;
    std::set<void (*)(const GemmBlock&)> functions;
    for (const CpuKernel& kernel : cpu_kernels()) {
      if (kernel.mode != mode) continue;
      EXPECT_TRUE(functions.insert(kernel.run).second) << kernel.name;
    }
    for (const KernelInfo& info : kernel_table()) {
      if (info.mode == mode) last = info;
    }
    ASSERT_TRUE(last.has_value()) << mode_name(mode);
    EXPECT_EQ(last->isa, Isa::scalar) << mode_name(mode);
    EXPECT_TRUE(last->runs_here) << mode_name(mode);
  }
}

// ---- forcing ------------------------------------------------------------------------------------

TEST(Dispatch, TheEnvironmentForcesEveryKernel) {
  for (const Mode mode : kModes) {
    for (const std::string& name : runnable_kernels(mode)) {
      const ForcedByEnvironment forced(name.c_str());
      for (const int64_t m : {0, 1, 4, 1000}) {
        const Result<Plan> plan = plan_gemm(problem_of(mode, m));
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        EXPECT_EQ(plan->kernel_name(), name);
      }
    }
  }
}

TEST(Dispatch, E4m3ActivationsAreForCudaDevices) {
  const Result<Plan> plan = plan_gemm(problem_of(Mode::w4a8_fp8));
  ASSERT_FALSE(plan.ok());
  EXPECT_EQ(plan.status().code(), Code::unsupported);
  EXPECT_NE(plan.status().message().find("CUDA"), std::string::npos) << plan.status().message();
}

TEST(Dispatch, AnArgumentWinsOverTheEnvironment) {
  const ForcedByEnvironment forced("nonsense");
  for (const Mode mode : kModes) {
    for (const std::string& name : runnable_kernels(mode)) {
      const Result<Plan> plan = plan_gemm(problem_of(mode), name.c_str());
      ASSERT_TRUE(plan.ok()) << plan.status().message();
      EXPECT_EQ(plan->kernel_name(), name);
    }
  }
}

TEST(Dispatch, AnUnknownNameIsAnErrorNeverAFallback) {
  const ForcedByEnvironment none(nullptr);
  for (const char* name : {"nonsense", "w4a8", "W4A8_SCALAR", "w4a8_scalar ", "w4a8_scalar,", ""}) {
    const Status status = plan_gemm(problem_of(Mode::w4a8), name).status();
    EXPECT_EQ(status.code(), Code::invalid_argument);
    EXPECT_TRUE(contains(status.message(), "'" + std::string(name) + "'")) << status.message();
  }
  for (const char* list : {"nonsense", "w4a8_scalar,nonsense", "nonsense,w4a8_scalar",
                           "w4a8_scalar,,w4a4_scalar", " w4a8_scalar"}) {
    const ForcedByEnvironment forced(list);
    for (const Mode mode : kModes) {
      const Status status = plan_gemm(problem_of(mode)).status();
      EXPECT_EQ(status.code(), Code::invalid_argument) << list;
      EXPECT_TRUE(contains(status.message(), "NIBBLE_KERNEL")) << status.message();
    }
  }
}

TEST(Dispatch, AnEmptyEnvironmentVariableForcesNothing) {
  std::string preferred;
  {
    const ForcedByEnvironment none(nullptr);
    preferred = plan_gemm(problem_of(Mode::w4a8))->kernel_name();
  }
  const ForcedByEnvironment empty("");
  EXPECT_EQ(plan_gemm(problem_of(Mode::w4a8))->kernel_name(), preferred);
}

TEST(Dispatch, AListForcesOneKernelPerMode) {
  const ForcedByEnvironment forced("w4a16_scalar,w4a8_scalar,w4a4_scalar");
  for (const Mode mode : kModes) {
    EXPECT_EQ(plan_gemm(problem_of(mode))->kernel_name(), std::string(mode_name(mode)) + "_scalar");
  }
}

TEST(Dispatch, NamesOfOtherModesAreIgnored) {
  std::string preferred;
  {
    const ForcedByEnvironment none(nullptr);
    preferred = plan_gemm(problem_of(Mode::w4a8))->kernel_name();
  }
  const ForcedByEnvironment forced("w4a16_scalar");
  EXPECT_EQ(plan_gemm(problem_of(Mode::w4a8))->kernel_name(), preferred);
}

TEST(Dispatch, AListWithTwoKernelsOfOneModeIsAnErrorInThatMode) {
#if !NIBBLE_SIMD
  GTEST_SKIP() << "this build has one kernel per mode";
#endif
  const ForcedByEnvironment forced("w4a8_scalar,w4a8_avx2");
  const Status status = plan_gemm(problem_of(Mode::w4a8)).status();
  EXPECT_EQ(status.code(), Code::invalid_argument);
  EXPECT_TRUE(contains(status.message(), "w4a8_scalar")) << status.message();
  EXPECT_TRUE(contains(status.message(), "w4a8_avx2")) << status.message();
  EXPECT_TRUE(plan_gemm(problem_of(Mode::w4a16)).ok());
}

TEST(Dispatch, AKernelOfAnotherModeIsRefused) {
  const Status status = plan_gemm(problem_of(Mode::w4a16), "w4a8_scalar").status();
  EXPECT_EQ(status.code(), Code::invalid_argument);
  EXPECT_TRUE(contains(status.message(), "w4a8_scalar")) << status.message();
  EXPECT_TRUE(contains(status.message(), "w4a16")) << status.message();
}

TEST(Dispatch, AKernelThatThisCpuLacksIsRefusedWithTheReason) {
  int lacking = 0;
  for (const KernelInfo& info : kernel_table()) {
    if (info.runs_here) continue;
    ++lacking;
    for (const bool by_environment : {false, true}) {
      const ForcedByEnvironment forced(by_environment ? info.name : nullptr);
      const Status status =
          plan_gemm(problem_of(info.mode), by_environment ? nullptr : info.name).status();
      EXPECT_EQ(status.code(), Code::unsupported) << info.name;
      EXPECT_TRUE(contains(status.message(), info.name)) << status.message();
      EXPECT_TRUE(contains(status.message(), info.reason)) << status.message();
    }
  }
  if (lacking == 0) GTEST_SKIP() << "this CPU runs every kernel of the build: nothing to refuse";
}

// ---- the planned kernel is the one that runs ----------------------------------------------------

std::atomic<int> g_calls{0};
void (*g_counted)(const GemmBlock&) = nullptr;

void counting_run(const GemmBlock& block) {
  ++g_calls;
  g_counted(block);
}

// A plan holds a row of the table. Swapping in a copy of that row whose function counts shows that
// run_gemm calls exactly it, and that it alone makes y.
TEST(Dispatch, RunGemmCallsTheKernelOfThePlan) {
  std::mt19937 random(1);
  const TestWeight weight = make_weight({.k = 128, .n = 64, .group_size = 64}, random);
  const std::vector<float> x(4 * 128, 0.75f);
  for (const Mode mode : kModes) {
    for (const std::string& name : runnable_kernels(mode)) {
      Plan plan = *plan_gemm(problem_of(mode), name.c_str(), 2);
      ASSERT_EQ(plan.kernel->name, name);
      const bool in_table = plan.kernel >= cpu_kernels().data() &&
                            plan.kernel < cpu_kernels().data() + cpu_kernels().size();
      ASSERT_TRUE(in_table);
      std::vector<float> y(4 * 64, -1), same(4 * 64, -2);
      const GemmTarget target{&weight.packed, y.data(), 64};
      ASSERT_TRUE(run(plan, {x.data(), 128}, {&target, 1}).ok());
      CpuKernel counting = *plan.kernel;
      g_counted = counting.run;
      counting.run = counting_run;
      plan.kernel = &counting;
      g_calls = 0;
      const GemmTarget counted{&weight.packed, same.data(), 64};
      ASSERT_TRUE(run(plan, {x.data(), 128}, {&counted, 1}).ok());
      const int64_t per_task = plan.blocks_per_task;
      const int64_t tasks = (weight.packed.blocks + per_task - 1) / per_task;
      EXPECT_EQ(g_calls, tasks) << name;
      EXPECT_EQ(y, same) << name;
      counting.run = [](const GemmBlock&) {};
      std::fill(same.begin(), same.end(), -2.0f);
      ASSERT_TRUE(run(plan, {x.data(), 128}, {&counted, 1}).ok());
      EXPECT_EQ(same, std::vector<float>(4 * 64, -2)) << name;
    }
  }
}

TEST(Dispatch, TheQuantizerIsNoWiderThanTheKernel) {
  EXPECT_EQ(&quantizer_ops_for(Isa::scalar), &quantizer_ops_scalar());
#if NIBBLE_SIMD
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx_vnni}) {
    EXPECT_NE(&quantizer_ops_for(isa), &quantizer_ops_avx512()) << isa_name(isa);
  }
#endif
}

TEST(Dispatch, ExplainNamesEveryKernelOfTheModeAndNoOther) {
  const ForcedByEnvironment none(nullptr);
  for (const Mode mode : kModes) {
    for (const std::string& forced : runnable_kernels(mode)) {
      const std::string text = explain_plan(problem_of(mode), forced.c_str());
      for (const KernelInfo& info : kernel_table()) {
        EXPECT_EQ(contains(text, "  " + std::string(info.name) + " "), info.mode == mode) << text;
        if (info.mode == mode) {
          EXPECT_TRUE(contains(text, info.reason)) << text;
        }
      }
      const size_t chosen = text.find("chosen");
      ASSERT_NE(chosen, std::string::npos) << text;
      EXPECT_EQ(text.find("chosen", chosen + 1), std::string::npos) << text;
      EXPECT_TRUE(contains(text, plan_gemm(problem_of(mode), forced.c_str())->describe())) << text;
    }
    EXPECT_TRUE(contains(explain_plan(problem_of(mode), "nonsense"), "'nonsense'"));
  }
}

TEST(Dispatch, DescribeStatesEveryDecision) {
  const Plan plan = *plan_gemm({.m = 5,
                                .n = 64,
                                .k = 128,
                                .group_size = 64,
                                .mode = Mode::w4a4,
                                .x_dtype = Dtype::bf16,
                                .y_dtype = Dtype::f16,
                                .granularity = Granularity::group,
                                .symmetric = false},
                               "w4a4_scalar", 3);
  for (const char* part : {"w4a4_scalar:", "M=5", "N=64", "K=128", "g=64", "x=bf16", "y=f16",
                           "group asymmetric", "threads=3", "block_rows=5"}) {
    EXPECT_TRUE(contains(plan.describe(), part)) << part << " in " << plan.describe();
  }
}

TEST(Dispatch, ThreadsDefaultToTheCpusOfThisProcess) {
  for (const int threads : {0, -1}) {
    EXPECT_EQ(plan_gemm(problem_of(Mode::w4a8), nullptr, threads)->threads, available_cpus());
  }
  EXPECT_EQ(plan_gemm(problem_of(Mode::w4a8), nullptr, 3)->threads, 3);
}

// ---- policy on imagined CPUs --------------------------------------------------------------------

struct ImaginedCpu {
  const char* name;
  bool (*runs)(Isa);
  const char* decode[3];   // best kernel of w4a16, w4a8, w4a4 at M = 1
  const char* prefill[3];  // and at M = 512
};

#if NIBBLE_SIMD
const ImaginedCpu kCpus[] = {
    {"scalar",
     [](Isa isa) { return isa == Isa::scalar; },
     {"w4a16_scalar", "w4a8_scalar", "w4a4_scalar"},
     {"w4a16_scalar", "w4a8_scalar", "w4a4_scalar"}},
    {"avx2",
     [](Isa isa) { return isa <= Isa::avx2; },
     {"w4a16_avx2", "w4a8_avx2", "w4a4_avx2"},
     {"w4a16_avx2", "w4a8_avx2", "w4a4_avx2"}},
    {"avx2 with avx-vnni",
     [](Isa isa) { return isa <= Isa::avx_vnni; },
     {"w4a16_avx2", "w4a8_avxvnni", "w4a4_avxvnni"},
     {"w4a16_avx2", "w4a8_avxvnni", "w4a4_avxvnni"}},
    {"avx512 without vnni",
     [](Isa isa) { return isa <= Isa::avx2 || isa == Isa::avx512; },
     {"w4a16_avx512", "w4a8_avx2", "w4a4_avx2"},
     {"w4a16_avx512", "w4a8_avx2", "w4a4_avx2"}},
    {"vnni without amx",
     [](Isa isa) { return isa != Isa::amx_int8; },
     {"w4a16_avx512", "w4a8_avx512vnni", "w4a4_avx512vnni"},
     {"w4a16_avx512", "w4a8_avx512vnni", "w4a4_avx512vnni"}},
    {"everything",
     [](Isa) { return true; },
     {"w4a16_avx512", "w4a8_avx512vnni", "w4a4_avx512vnni"},
     {"w4a16_avx512", "w4a8_amx", "w4a4_amx"}},
};
#else
const ImaginedCpu kCpus[] = {{"scalar",
                              [](Isa) { return true; },
                              {"w4a16_scalar", "w4a8_scalar", "w4a4_scalar"},
                              {"w4a16_scalar", "w4a8_scalar", "w4a4_scalar"}}};
#endif

TEST(Policy, PrefersTheWidestKernelThatTheCpuRuns) {
  for (const ImaginedCpu& cpu : kCpus) {
    for (const Mode mode : kModes) {
      const auto at = static_cast<size_t>(mode);
      EXPECT_STREQ(preferred_kernel(problem_of(mode, 1), cpu.runs)->name, cpu.decode[at])
          << cpu.name;
      EXPECT_STREQ(preferred_kernel(problem_of(mode, 512), cpu.runs)->name, cpu.prefill[at])
          << cpu.name;
    }
  }
}

TEST(Policy, ThePreferenceChangesAtMostOnceWithM) {
  for (const ImaginedCpu& cpu : kCpus) {
    for (const Mode mode : kModes) {
      std::vector<const CpuKernel*> seen;
      for (int64_t m = 0; m <= 600; ++m) {
        const CpuKernel* kernel = preferred_kernel(problem_of(mode, m), cpu.runs);
        ASSERT_NE(kernel, nullptr) << cpu.name;
        ASSERT_TRUE(cpu.runs(kernel->isa) && kernel->mode == mode) << cpu.name;
        if (seen.empty() || seen.back() != kernel) seen.push_back(kernel);
      }
      EXPECT_LE(seen.size(), 2u) << cpu.name << " " << mode_name(mode);
    }
  }
}

Plan sized(const CpuKernel& kernel, const Problem& problem, int threads, int64_t l2) {
  Plan plan;
  plan.problem = problem;
  plan.kernel = &kernel;
  plan.threads = threads;
  size_plan(plan, {.l2_bytes = l2});
  return plan;
}

TEST(Policy, SizesStayWithinBoundsAndFitTheCache) {
  for (const CpuKernel& kernel : cpu_kernels()) {
    const int64_t element = kernel.layout == ActivationLayout::floats ? 4 : 1;
    for (const int64_t l2 : {int64_t{0}, int64_t{256} << 10, int64_t{1} << 20, int64_t{4} << 20}) {
      for (const int64_t k : {64, 4096, 14336, 1 << 20}) {
        for (const int64_t m : {0, 1, 7, 31, 32, 33, 256, 257, 100000}) {
          for (const int threads : {1, 2, 64}) {
            const Problem p{.m = m, .n = 4096, .k = k, .group_size = 64, .mode = kernel.mode};
            const Plan plan = sized(kernel, p, threads, l2);
            ASSERT_GE(plan.block_rows, 1);
            ASSERT_LE(plan.block_rows, 256);
            if (plan.block_rows < m) {
              ASSERT_EQ(plan.block_rows % 32, 0) << plan.describe();
            }
            if (plan.block_rows > 32) {
              ASSERT_LE(plan.block_rows * k * element, l2 / 2) << plan.describe();
            }
            ASSERT_GE(plan.blocks_per_task, 1);
            ASSERT_LE(plan.blocks_per_task, 4);
            ASSERT_EQ(static_cast<int64_t>(plan.workspace_bytes),
                      workspace_layout(p, kernel.layout, plan.block_rows).total_bytes);
          }
        }
      }
    }
  }
}

TEST(Policy, SizesAreMonotone) {
  for (const CpuKernel& kernel : cpu_kernels()) {
    const Problem base{.m = 1000, .n = 4096, .k = 4096, .group_size = 64, .mode = kernel.mode};
    Plan before = sized(kernel, base, 1, 0);
    for (int64_t l2 = 64 << 10; l2 <= 16 << 20; l2 += 100000) {  // a larger cache: more rows
      const Plan plan = sized(kernel, base, 1, l2);
      ASSERT_GE(plan.block_rows, before.block_rows) << plan.describe();
      ASSERT_GE(plan.workspace_bytes, before.workspace_bytes) << plan.describe();
      before = plan;
    }
    before = sized(kernel, base, 1, 2 << 20);
    for (Problem p = base; p.k <= 40000; p.k += 640) {  // longer rows: fewer of them
      const Plan plan = sized(kernel, p, 1, 2 << 20);
      ASSERT_LE(plan.block_rows, before.block_rows) << plan.describe();
      before = plan;
    }
    Problem p = base;
    p.m = 0;
    before = sized(kernel, p, 1, 2 << 20);
    for (; p.m <= 600; ++p.m) {  // more rows: no smaller workspace
      const Plan plan = sized(kernel, p, 1, 2 << 20);
      ASSERT_GE(plan.workspace_bytes, before.workspace_bytes) << plan.describe();
      before = plan;
    }
    before = sized(kernel, base, 1, 2 << 20);
    for (int threads = 1; threads <= 128; ++threads) {  // more threads: shorter tasks
      const Plan plan = sized(kernel, base, threads, 2 << 20);
      ASSERT_LE(plan.blocks_per_task, before.blocks_per_task) << plan.describe();
      before = plan;
    }
  }
}

TEST(Policy, WorkspacePartsAreAlignedAndDoNotOverlap) {
  using enum ActivationLayout;
  for (const ActivationLayout layout : {rows, tiles, floats}) {
    for (const Granularity granularity : {Granularity::token, Granularity::group}) {
      for (const int64_t group : {1, 5, 64, 100, 128}) {
        for (const int64_t groups : {1, 3, 32}) {
          for (const int64_t block_rows : {1, 15, 16, 17, 256}) {
            const Problem p{.m = block_rows,
                            .n = 8,
                            .k = group * groups,
                            .group_size = group,
                            .granularity = granularity};
            const WorkspaceLayout w = workspace_layout(p, layout, block_rows);
            const int64_t scales = granularity == Granularity::group ? groups : 1;
            if (layout == floats) {
              EXPECT_EQ(w.codes_bytes, 0);
              EXPECT_EQ(w.floats_bytes, block_rows * p.k * 4);
              EXPECT_GE(w.total_bytes, w.floats_bytes);
              continue;
            }
            EXPECT_EQ(w.floats_bytes, 0);
            EXPECT_GE(w.codes_bytes, block_rows * p.k);
            if (layout == tiles) {
              EXPECT_EQ(w.codes_bytes % (kTileRows * kTileDepth), 0);
            }
            EXPECT_EQ(w.scales_offset % kCacheLineBytes, 0u);
            EXPECT_EQ(w.sums_offset % kCacheLineBytes, 0u);
            EXPECT_GE(w.scales_offset, w.codes_bytes);
            EXPECT_GE(w.sums_offset, w.scales_offset + block_rows * scales * 4);
            EXPECT_GE(w.total_bytes, w.sums_offset + block_rows * groups * 4);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace nibble::testing
