// One launch from x of 16 bits to y, some blocks of which quantize x for all: against the separate
// kernels, which must give the same bits, and against the oracle; and what blocks that wait for
// each other could get wrong: launches behind each other, several rows a block, flags left behind.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cuda_testing.h"
#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/operand.h"

namespace nibble::cuda::testing {
namespace {

constexpr const char* kHanded = "w4a8_slab_handed_sm90";
constexpr const char* kRows = "w4a8_slab_rows_sm90";

std::vector<uint16_t> random_rows(const Problem& p, int64_t stride, std::mt19937& random) {
  std::vector<uint16_t> bits(static_cast<size_t>(p.m * stride), 0xffff);  // behind a row: NaN
  for (int64_t i = 0; i < p.m * p.k; ++i) {
    const float outlier = random() % 301 == 0 ? 30.0f : 1.0f;
    store_from_float(bits.data(), i / p.k * stride + i % p.k, p.x_dtype,
                     outlier * std::normal_distribution<float>()(random));
  }
  return bits;
}

/// x, and y of one plan after another.
struct Runs {
  const Problem problem;
  const GpuWeight& weight;
  const int64_t stride;
  const std::vector<uint16_t> rows;
  const std::vector<float> scales;
  const Buffer x, static_scales;
  Buffer y;

  Runs(const Problem& p, const GpuWeight& w, std::mt19937& random)
      : problem(p),
        weight(w),
        stride((p.k + 7) / 8 * 8 + 16),
        rows(random_rows(p, stride, random)),
        scales(static_cast<size_t>(p.k / p.group_size), 0.03f),
        x(rows),
        static_scales(scales),
        y(static_cast<size_t>(p.m * p.n * dtype_bytes(p.y_dtype))) {}

  DeviceInput input() const {
    DeviceInput in{x.as<>(), stride};
    in.clip = 0.9f;
    in.static_scales = static_scales.as<float>();
    return in;
  }
  Status whole(const Plan& plan, void* workspace, cudaStream_t stream = nullptr) const {
    return run_gemm(plan, input(), weight.device, y.as<>(), problem.n, workspace, stream);
  }
  std::vector<std::byte> result() const {
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    EXPECT_TRUE(y.guard_is_intact());
    return y.download<std::byte>();
  }
  /// By quantize.cu and the slab kernel.
  std::vector<std::byte> apart() const {
    const Plan plan = *plan_gemm(problem, *gpu(), "w4a8_slab_sm90");
    const Buffer workspace(plan.workspace_bytes, 0);
    const Status status = whole(plan, workspace.as<>());
    EXPECT_TRUE(status.ok()) << status.message();
    return result();
  }
  /// Empty, or how y differs from the oracle's.
  std::string against_oracle(const Plan& plan, const std::vector<std::byte>& found) const {
    const GemmInput host{
        .x = rows.data(), .x_stride = stride, .clip = 0.9f, .static_scales = scales.data()};
    const ref::Activations a = ref::quantize(problem, host);
    const Quantized input{a.codes, a.scales};
    return compare(plan, expected_of(problem, weight, input), found, problem.n);
  }
};

/// The plan, also with few blocks: several tiles each, and rows too where there are more.
std::vector<Plan> plans_of(const Problem& p, const char* name) {
  std::vector<Plan> plans(2, *plan_gemm(p, *gpu(), name));
  plans[1].fused.blocks = 3;
  return plans;
}

void expect_same_bits(const Problem& p, const GpuWeight& weight, bool with_oracle,
                      std::mt19937& random) {
  Runs runs(p, weight, random);
  const std::vector<std::byte> expected = runs.apart();
  for (const char* name : {kHanded, kRows, static_cast<const char*>(nullptr)}) {
    if (!plan_gemm(p, *gpu(), name).ok()) {
      ASSERT_NE(name, kHanded) << plan_gemm(p, *gpu(), name).status().message();
      continue;
    }
    for (const Plan& plan : plans_of(p, name)) {
      SCOPED_TRACE(plan.describe());
      const Buffer workspace(plan.workspace_bytes, 0);
      runs.y.fill(0xcc);
      const Status status = runs.whole(plan, workspace.as<>());
      ASSERT_TRUE(status.ok()) << status.message();
      const std::vector<std::byte> found = runs.result();
      ASSERT_EQ(found, expected);
      ASSERT_TRUE(workspace.guard_is_intact());
      const auto flags = workspace.download<std::byte>();
      ASSERT_TRUE(std::all_of(flags.begin(), flags.begin() + kFlagBytes,
                              [](std::byte b) { return b == std::byte{0}; }));
      if (with_oracle) {
        ASSERT_EQ(runs.against_oracle(plan, found), "");
      }
    }
  }
}

struct Shape {
  int64_t n, k, group_size;
};

TEST(CudaHandedProduct, EveryRowCountGivesTheBitsOfTwoLaunches) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(31);
  // Ragged N; K of one slice and less, of many, not of whole ones; four tiles at a time, two, one;
  // streamed; more K than a block's threads take at once; one block for all rows.
  for (const Shape& s : {Shape{136, 1152, 128},
                         {72, 96, 32},
                         {1000, 576, 64},
                         {136, 200, 200},
                         {2056, 4096, 128},
                         {8, 4096, 128},
                         {264, 8192, 64},
                         {136, 14336, 128},
                         {24, 20480, 32}}) {
    const GpuWeight weight = make_gpu_weight(
        {.k = s.k, .n = s.n, .group_size = s.group_size, .bias = s.k % 128 == 0}, random);
    for (int64_t m = 1; m <= kSlabTokens; ++m) {
      for (const Granularity granularity :
           {Granularity::token, Granularity::group, Granularity::static_tensor,
            Granularity::static_group}) {
        if (scales_per_group(granularity) && s.group_size > 128) continue;
        const bool f16 = random() % 2 == 0;
        const Problem p = {.m = m,
                           .n = s.n,
                           .k = s.k,
                           .group_size = s.group_size,
                           .x_dtype = f16 ? Dtype::f16 : Dtype::bf16,
                           .y_dtype = f16 ? Dtype::f16 : Dtype::bf16,
                           .granularity = granularity};
        expect_same_bits(p, weight, s.n * s.k < 200000, random);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(CudaHandedProduct, Int4CodesToo) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(32);
  const GpuWeight weight = make_gpu_weight({.k = 1152, .n = 136, .group_size = 128}, random);
  for (const int64_t m : {1, 2, 7, 16}) {
    const Problem p = {.m = m,
                       .n = 136,
                       .k = 1152,
                       .group_size = 128,
                       .mode = Mode::w4a4,
                       .x_dtype = Dtype::bf16,
                       .y_dtype = Dtype::f32};
    expect_same_bits(p, weight, true, random);
  }
}

// Launch behind launch in one workspace, each with other rows, launched programmatically from a
// graph, replayed: whoever read codes or a counter of the launch in front would be found out.
TEST(CudaHandedProduct, LaunchesBehindEachOtherShareAWorkspace) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(33);
  constexpr int kLaunches = 24;
  for (const int64_t k : {4096, 14336}) {
    const GpuWeight weight = make_gpu_weight({.k = k, .n = 4104, .group_size = 128}, random);
    std::vector<std::unique_ptr<Runs>> runs;
    std::vector<Plan> plans;
    std::vector<std::vector<std::byte>> expected;
    size_t bytes = 0;
    for (int i = 0; i < kLaunches; ++i) {
      const Problem p = {.m = 1 + static_cast<int64_t>(random() % kSlabTokens),
                         .n = 4104,
                         .k = k,
                         .group_size = 128,
                         .x_dtype = Dtype::bf16,
                         .y_dtype = Dtype::bf16};
      runs.push_back(std::make_unique<Runs>(p, weight, random));
      plans.push_back(*plan_gemm(p, *gpu(), kHanded));
      bytes = std::max(bytes, plans.back().workspace_bytes);
      expected.push_back(runs.back()->apart());
    }
    const Buffer workspace(bytes, 0);
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    NIBBLE_CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    NIBBLE_CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kLaunches; ++i) {
      const Status status = runs[i]->whole(plans[i], workspace.as<>(), stream);
      EXPECT_TRUE(status.ok()) << status.message();
    }
    NIBBLE_CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    NIBBLE_CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
    for (int replay = 0; replay < 20; ++replay) {
      for (const auto& run : runs) run->y.fill(0xcc);
      NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
      for (int i = 0; i < 3; ++i) NIBBLE_CHECK_CUDA(cudaGraphLaunch(executable, stream));
      for (int i = 0; i < kLaunches; ++i) {
        ASSERT_EQ(runs[i]->result(), expected[i]) << plans[i].describe() << ", launch " << i;
      }
    }
    NIBBLE_CHECK_CUDA(cudaGraphExecDestroy(executable));
    NIBBLE_CHECK_CUDA(cudaGraphDestroy(graph));
    NIBBLE_CHECK_CUDA(cudaStreamDestroy(stream));
  }
}

TEST(CudaHandedProduct, ARowWithANanBecomesNan) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(34);
  const GpuWeight weight = make_gpu_weight({.k = 512, .n = 64, .group_size = 128}, random);
  const int64_t m = 5, k = 512, n = 64;
  std::vector<float> values(static_cast<size_t>(m * k));
  for (float& v : values) v = std::normal_distribution<float>()(random);
  values[1 * k + 300] = NAN;
  values[4 * k + 511] = -INFINITY;
  std::vector<uint16_t> rows(values.size());
  for (int64_t i = 0; i < m * k; ++i) store_from_float(rows.data(), i, Dtype::bf16, values[i]);
  const Buffer x(rows), y(static_cast<size_t>(m * n * 4));
  for (const Granularity granularity : {Granularity::token, Granularity::group}) {
    const Problem p = {.m = m,
                       .n = n,
                       .k = k,
                       .group_size = 128,
                       .x_dtype = Dtype::bf16,
                       .granularity = granularity};
    const Plan plan = *plan_gemm(p, *gpu(), kHanded);
    const Buffer workspace(plan.workspace_bytes, 0);
    const Status status =
        run_gemm(plan, {x.as<>(), k}, weight.device, y.as<>(), n, workspace.as<>(), nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    const std::vector<float> found = y.download<float>();
    for (int64_t i = 0; i < m * n; ++i) {
      ASSERT_EQ(std::isnan(found[i]), i / n == 1 || i / n == 4) << i / n;
    }
  }
}

TEST(CudaHandedProduct, RefusesWhatItCannotDo) {
  GemmArgs product;
  product.layout = packed_layout(512, 4096, 128);
  product.m = 3;
  SlabConfig config = slab_handed_config(product.layout, 3, false, 132, 227 * 1024);
  QuantizeArgs x;
  x.x = reinterpret_cast<void*>(256);  // nothing of it is looked at
  x.codes = reinterpret_cast<int8_t*>(512);
  x.scales = reinterpret_cast<float*>(768);
  x.m = 3;
  x.k = x.x_stride = x.padded_k = 4096;
  product.codes = x.codes;
  product.scales = x.scales;
  void* scratch = x.codes;
  const auto expect_refused = [&](const QuantizeArgs& of, const GemmArgs& to, void* flags) {
    EXPECT_EQ(launch_w4a8_slab_handed_sm90(of, to, config, flags, nullptr), cudaErrorInvalidValue);
  };
  expect_refused(x, product, nullptr);
  QuantizeArgs bad = x;
  bad.scaling = Scaling::tensor;
  expect_refused(bad, product, scratch);
  bad = x;
  bad.symmetric = false;
  expect_refused(bad, product, scratch);
  bad = x;
  bad.type = Element::f32;
  expect_refused(bad, product, scratch);
  bad = x;
  bad.x_stride = 4097;
  expect_refused(bad, product, scratch);
  bad = x;
  bad.m = 2;
  expect_refused(bad, product, scratch);
  bad = x;
  bad.scaling = Scaling::group;  // of a product with a scale a token
  expect_refused(bad, product, scratch);
  GemmArgs other = product;
  other.codes = nullptr;  // not those that are made
  expect_refused(x, other, scratch);
  config.handed = false;
  expect_refused(x, product, scratch);
}

}  // namespace
}  // namespace nibble::cuda::testing
