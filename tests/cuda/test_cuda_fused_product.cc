// Products whose blocks make their activations themselves, against the separate kernels: the same
// bits. Those are held against the oracle by test_cuda_fused_quantize.cc and test_cuda_gemm.cc.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>
#include <utility>

#include "cuda_testing.h"
#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/operand.h"
#include "model/cuda/step_fusion.h"

namespace nibble::cuda::testing {
namespace {

struct Shape {
  int64_t n, k, group_size;
};
// One tile at a time, two and four; one or two chunks a thread; K streamed; K and N not multiples
// of what is packed.
constexpr Shape kShapes[] = {{512, 4096, 128},  {1056, 4096, 128}, {128, 640, 128}, {32, 96, 32},
                             {192, 2048, 64},   {64, 1152, 32},    {96, 5120, 128}, {64, 8192, 128},
                             {160, 14336, 128}, {64, 8704, 32},    {64, 16384, 64}};

Problem problem_of(const Shape& s, int64_t m, Dtype type, Granularity granularity) {
  Problem p;
  p.m = m;
  p.n = s.n;
  p.k = s.k;
  p.group_size = s.group_size;
  p.granularity = granularity;
  p.x_dtype = p.y_dtype = type;
  return p;
}

std::vector<float> random_floats(int64_t count, std::mt19937& random) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) {
    v = std::normal_distribution<float>()(random) * (random() % 301 == 0 ? 30.0f : 1.0f);
  }
  return values;
}

std::vector<uint16_t> rounded(const std::vector<float>& values, Dtype type) {
  std::vector<uint16_t> bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    store_from_float(bits.data(), static_cast<int64_t>(i), type, values[i]);
  }
  return bits;
}

/// A product, its weight, and memory for both ways to run it.
struct Case {
  Plan plan;
  GpuWeight weight;
  Buffer workspace, apart, fused;
  const float scale = 0.03f;
  Buffer static_scale;

  Case(const Problem& p, std::mt19937& random)
      : plan(*plan_gemm(p, *gpu())),
        weight(make_gpu_weight(
            {.k = p.k, .n = p.n, .group_size = p.group_size, .bias = random() % 2 == 0}, random)),
        workspace(plan.workspace_bytes, 0),
        apart(static_cast<size_t>(p.m * p.n * 2)),
        fused(static_cast<size_t>(p.m * p.n * 2)),
        static_scale(std::vector<float>{scale}) {}

  DeviceInput input(const void* x) const {
    DeviceInput input;
    input.x = x;
    input.x_stride = plan.problem.k;
    input.clip = 0.9f;
    input.static_scales = static_scale.as<float>();
    return input;
  }
  Operand operand() const { return workspace_operand(plan, workspace.as<>()); }
  void multiply_apart() const {
    const Status status = run_gemm_quantized(plan, operand(), weight.device, apart.as<>(),
                                             plan.problem.n, workspace.as<>(), nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  GemmArgs product() const {
    return gemm_args(plan, {}, weight.device, fused.as<>(), plan.problem.n);
  }
  void expect_same() const {
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    ASSERT_EQ(apart.download<uint16_t>(), fused.download<uint16_t>());
    ASSERT_TRUE(fused.guard_is_intact());
  }
};

/// Also of two rows, whatever the policy of step_fusion.h is for them.
std::optional<SlabConfig> config_of(const Plan& plan, Fusion fusion) {
  const Problem& p = plan.problem;
  const bool gated = fusion == Fusion::norm_and_gate;
  std::optional<SlabConfig> config =
      slab_quantizing_config(packed_layout(p.n, p.k, p.group_size), p.m, has_group_scales(p), gated,
                             gpu()->multiprocessors, gpu()->shared_bytes);
  if (!config || plan.family != KernelFamily::slab) return std::nullopt;
  if (fusion != Fusion::rows && config->form != SlabForm::registers) return std::nullopt;
  config->programmatic = true;
  return config;
}

/// Of all shapes, and what makes them differ: run(case, config). Returns how many there were.
template <class Run>
int for_all_cases(Fusion fusion, std::mt19937& random, const Run& run) {
  int count = 0;
  for (const Shape& s : kShapes) {
    for (const int64_t m : {1, 2}) {
      for (const Dtype type : {Dtype::f16, Dtype::bf16}) {
        for (const Granularity granularity :
             {Granularity::token, Granularity::group, Granularity::static_tensor}) {
          Case c(problem_of(s, m, type, granularity), random);
          auto config = config_of(c.plan, fusion);
          if (!config) continue;
          // As planned, and with several tiles a block, not all as many.
          for (const int blocks : {config->blocks, 3}) {
            config->blocks = blocks;
            SCOPED_TRACE(c.plan.describe() + ", " + config->describe());
            c.fused.fill(0x5a);
            run(std::as_const(c), *config);
            if (::testing::Test::HasFatalFailure()) return count;
          }
          ++count;
        }
      }
    }
  }
  return count;
}

TEST(CudaFusedProduct, RowsGiveTheBitsOfTwoLaunches) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(21);
  const int count = for_all_cases(Fusion::rows, random, [&](const Case& c, const SlabConfig& how) {
    const Problem& p = c.plan.problem;
    const Buffer x(rounded(random_floats(p.m * p.k, random), p.x_dtype));
    const Status status = quantize_activations(c.plan, c.input(x.as<>()), c.operand(), nullptr);
    ASSERT_TRUE(status.ok()) << status.message();
    c.multiply_apart();
    NIBBLE_CHECK_CUDA(launch_w4a8_slab_rows_sm90(quantize_args(c.plan, c.input(x.as<>()), {}),
                                                 c.product(), how, nullptr));
    c.expect_same();
  });
  EXPECT_GE(count, 11 * 12);
}

TEST(CudaFusedProduct, FloatRowsGiveTheBitsOfTwoLaunches) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(22);
  const int count = for_all_cases(Fusion::rows, random, [&](const Case& c, const SlabConfig& how) {
    const Problem& p = c.plan.problem;
    const Buffer x(random_floats(p.m * p.k, random));
    QuantizeArgs args = quantize_args(c.plan, c.input(x.as<>()), c.operand());
    args.type = Element::f32;
    NIBBLE_CHECK_CUDA(launch_quantize(args, nullptr));
    c.multiply_apart();
    NIBBLE_CHECK_CUDA(launch_w4a8_slab_rows_sm90(args, c.product(), how, nullptr));
    c.expect_same();
  });
  EXPECT_GE(count, 11 * 12);
}

/// RowRanges of `count` parts of each row, and zeros up to a multiple of 4.
std::vector<uint32_t> ranges_of(const std::vector<float>& x, int64_t m, int64_t count) {
  const int64_t k = static_cast<int64_t>(x.size()) / m, padded = (count + 3) / 4 * 4;
  std::vector<uint32_t> largest(static_cast<size_t>(m * padded));
  for (int64_t i = 0; i < m * k; ++i) {
    uint32_t& part = largest[static_cast<size_t>(i / k * padded + i % k % count)];
    part = std::max(part, std::bit_cast<uint32_t>(std::fabs(x[static_cast<size_t>(i)])));
  }
  return largest;
}

TEST(CudaFusedProduct, RowsOfKnownRangesGiveTheBitsOfTwoLaunches) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(26);
  int streamed = 0;
  for_all_cases(Fusion::rows, random, [&](const Case& c, const SlabConfig& how) {
    const Problem& p = c.plan.problem;
    for (const int count : {3, 132, kMostRowRanges}) {
      std::vector<float> values = random_floats(p.m * p.k, random);
      if (count == 3) values.back() = NAN;
      const Buffer x(values);
      const std::vector<uint32_t> largest = ranges_of(values, p.m, count);
      const Buffer parts(largest);
      const RowRanges ranges{parts.as<uint32_t>(), static_cast<int>(largest.size() / p.m)};
      QuantizeArgs args = quantize_args(c.plan, c.input(x.as<>()), c.operand());
      args.type = Element::f32;
      NIBBLE_CHECK_CUDA(launch_quantize(args, nullptr));
      c.multiply_apart();
      NIBBLE_CHECK_CUDA(launch_w4a8_slab_rows_sm90(args, c.product(), how, nullptr, ranges));
      c.expect_same();
    }
    streamed += how.form == SlabForm::streamed;
  });
  EXPECT_GE(streamed, 2 * 3 * 12);
}

/// Input of a norm, twice: launch_norm_quantize() writes where it reads.
struct NormInput {
  std::vector<float> hidden;
  Buffer apart, read, sum, delta, norm, post_norm;

  NormInput(const Problem& p, std::mt19937& random)
      : hidden(random_floats(p.m * p.k, random)),
        apart(hidden),
        read(hidden),
        sum(hidden.size() * 4),
        delta(rounded(random_floats(p.m * p.k, random), p.x_dtype)),
        norm(random_floats(p.k, random)),
        post_norm(random_floats(p.k, random)) {}

  NormArgs args(const Problem& p, bool with_delta, bool with_post_norm) const {
    NormArgs a;
    a.m = p.m;
    a.k = p.k;
    a.hidden = apart.as<float>();
    a.type = static_cast<Element>(p.x_dtype);
    a.norm = norm.as<float>();
    a.eps = 1e-5f;
    if (with_delta) a.delta = delta.as<>();
    if (with_post_norm) a.post_norm = post_norm.as<float>();
    return a;
  }
  void expect_sums(bool with_delta) const {
    ASSERT_EQ(read.download<float>(), hidden);
    if (with_delta) {
      ASSERT_EQ(sum.download<float>(), apart.download<float>());
    }
    ASSERT_TRUE(sum.guard_is_intact());
  }
};

TEST(CudaFusedProduct, NormGivesTheBitsOfTwoLaunches) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(23);
  const int count = for_all_cases(Fusion::norm, random, [&](const Case& c, const SlabConfig& how) {
    for (const int kind : {0, 1, 2}) {  // without delta, with it, with a norm of it
      const Problem& p = c.plan.problem;
      const NormInput x(p, random);
      NormProductArgs args;
      args.norm = x.args(p, kind > 0, kind > 1);
      NIBBLE_CHECK_CUDA(launch_norm_quantize(
          args.norm, quantize_args(c.plan, c.input(nullptr), c.operand()), nullptr));
      c.multiply_apart();
      args.norm.hidden = x.read.as<float>();
      args.sum = kind > 0 ? x.sum.as<float>() : nullptr;
      args.to = quantize_args(c.plan, c.input(nullptr), {});
      args.product = c.product();
      NIBBLE_CHECK_CUDA(launch_w4a8_slab_norm_sm90(args, how, nullptr));
      c.expect_same();
      x.expect_sums(kind > 0);
    }
  });
  EXPECT_GE(count, 8 * 12);
}

TEST(CudaFusedProduct, AGateGivesTheCodesOfThreeLaunches) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(24);
  const auto expect_gate = [&](const Case& c, const SlabConfig& how, GateFunction function) {
    const Problem& p = c.plan.problem;
    const int64_t width = p.n / 2;
    const NormInput x(p, random);
    NormProductArgs args;
    args.norm = x.args(p, true, false);
    NIBBLE_CHECK_CUDA(launch_norm_quantize(
        args.norm, quantize_args(c.plan, c.input(nullptr), c.operand()), nullptr));
    c.multiply_apart();
    // A code and a scale of every 32 values are all that can be seen of a gate apart.
    GateQuantizeArgs gate;
    const auto groups = static_cast<size_t>((width + 31) / 32);
    const int64_t padded = (width + kSlabDepth - 1) / kSlabDepth * kSlabDepth;
    const Buffer codes(static_cast<size_t>(p.m * padded)), codes_of_fused(codes.download<char>());
    const Buffer scales(p.m * groups * 4), scales_of_fused(p.m * groups * 4);
    QuantizeArgs& to = gate.to;
    to.x = c.apart.as<>();
    to.x_stride = gate.up_stride = p.n;
    to.type = static_cast<Element>(p.y_dtype);
    to.m = p.m;
    to.k = width;
    to.padded_k = padded;
    to.group_size = to.promoted = 32;
    to.scaling = Scaling::group;
    to.codes = codes.as<int8_t>();
    to.scales = scales.as<float>();
    gate.up = c.apart.as<uint16_t>() + width;
    gate.function = function;
    NIBBLE_CHECK_CUDA(launch_gate_quantize(gate, nullptr));

    const Buffer gated(static_cast<size_t>(p.m * width * 4));
    args.norm.hidden = x.read.as<float>();
    args.sum = x.sum.as<float>();
    args.to = quantize_args(c.plan, c.input(nullptr), {});
    args.product = c.product();
    args.gated = gated.as<float>();
    args.gated_stride = width;
    args.function = function;
    const int parts = gated_ranges(c.product().layout, how);
    const Buffer ranges(static_cast<size_t>(p.m * parts * 4));
    args.ranges = {ranges.as<uint32_t>(), parts};
    NIBBLE_CHECK_CUDA(launch_w4a8_slab_norm_sm90(args, how, nullptr));
    QuantizeArgs floats = to;
    floats.x = gated.as<>();
    floats.x_stride = width;
    floats.type = Element::f32;
    floats.codes = codes_of_fused.as<int8_t>();
    floats.scales = scales_of_fused.as<float>();
    NIBBLE_CHECK_CUDA(launch_quantize(floats, nullptr));
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    ASSERT_EQ(codes.download<int8_t>(), codes_of_fused.download<int8_t>());
    ASSERT_EQ(scales.download<float>(), scales_of_fused.download<float>());
    ASSERT_TRUE(gated.guard_is_intact());
    ASSERT_TRUE(ranges.guard_is_intact());
    const std::vector<float> values = gated.download<float>();
    const std::vector<uint32_t> largest = ranges.download<uint32_t>();
    const std::vector<uint32_t> expected = ranges_of(values, p.m, 1);
    for (int64_t m = 0; m < p.m; ++m) {
      ASSERT_EQ(*std::max_element(largest.begin() + m * parts, largest.begin() + (m + 1) * parts),
                expected[static_cast<size_t>(4 * m)]);
    }
    x.expect_sums(true);
  };
  const int count =
      for_all_cases(Fusion::norm_and_gate, random, [&](const Case& c, const SlabConfig& how) {
        if (c.plan.problem.n % 64 != 0) return;  // groups of 32 of a half
        expect_gate(c, how, GateFunction::silu);
        expect_gate(c, how, GateFunction::gelu_tanh);
      });
  EXPECT_GE(count, 5 * 12);
}

TEST(CudaFusedProduct, ARowWithANanBecomesNan) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(25);
  const Case c(problem_of(kShapes[0], 2, Dtype::bf16, Granularity::token), random);
  const Problem& p = c.plan.problem;
  std::vector<float> rows = random_floats(p.m * p.k, random);
  rows[7] = NAN;
  const Buffer x(rounded(rows, p.x_dtype));
  const auto how = config_of(c.plan, Fusion::rows);
  ASSERT_TRUE(how);
  NIBBLE_CHECK_CUDA(launch_w4a8_slab_rows_sm90(quantize_args(c.plan, c.input(x.as<>()), {}),
                                               c.product(), *how, nullptr));
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<uint16_t> y = c.fused.download<uint16_t>();
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    ASSERT_EQ(std::isnan(load_as_float(y.data(), i, p.y_dtype)), i < p.n) << i;
  }
}

TEST(CudaFusedProduct, RefusesWhatItCannotDo) {
  GemmArgs product;
  product.layout = packed_layout(512, 4096, 128);
  product.m = 1;
  SlabConfig config = *slab_quantizing_config(product.layout, 1, false, true, 132, 227 * 1024);
  QuantizeArgs x;
  x.x = reinterpret_cast<void*>(256);  // not looked at
  x.m = 1;
  x.k = x.x_stride = x.padded_k = 4096;
  QuantizeArgs bad = x;
  bad.scaling = Scaling::tensor;
  EXPECT_EQ(launch_w4a8_slab_rows_sm90(bad, product, config, nullptr), cudaErrorInvalidValue);
  bad = x;
  bad.symmetric = false;
  EXPECT_EQ(launch_w4a8_slab_rows_sm90(bad, product, config, nullptr), cudaErrorInvalidValue);
  bad = x;
  bad.k = 2048;
  EXPECT_EQ(launch_w4a8_slab_rows_sm90(bad, product, config, nullptr), cudaErrorInvalidValue);
  GemmArgs three = product;
  three.m = 3;
  EXPECT_EQ(launch_w4a8_slab_rows_sm90(x, three, config, nullptr), cudaErrorInvalidValue);
  SlabConfig other = config;
  other.quantizes = false;
  EXPECT_EQ(launch_w4a8_slab_rows_sm90(x, product, other, nullptr), cudaErrorInvalidValue);

  NormProductArgs norm;
  norm.norm.m = 1;
  norm.norm.k = 4096;
  norm.norm.hidden = reinterpret_cast<float*>(256);
  norm.norm.norm = norm.norm.hidden;
  norm.norm.delta = norm.norm.hidden;
  norm.to = x;
  norm.product = product;
  EXPECT_EQ(launch_w4a8_slab_norm_sm90(norm, config, nullptr), cudaErrorInvalidValue);  // no sum
  norm.sum = norm.norm.hidden;  // which every block reads
  EXPECT_EQ(launch_w4a8_slab_norm_sm90(norm, config, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace nibble::cuda::testing
