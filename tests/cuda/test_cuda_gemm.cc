// Every CUDA kernel against the oracle: integer sums, outputs, edge cases, and the promises about
// streams, graphs and repetition. Skipped, with the reason, where there is no GPU. The
// CudaSanitizer tests are small enough for compute-sanitizer:
//   compute-sanitizer --tool racecheck build/test_cuda --gtest_filter=CudaSanitizer.*
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <deque>

#include "cuda_testing.h"

namespace nibble::cuda::testing {
namespace {

class CudaGemm : public ::testing::Test {
 protected:
  void SetUp() override { NIBBLE_NEEDS_GPU(); }
  std::mt19937 random_{20260101};
};

TEST_F(CudaGemm, EveryRowCountUpTo70) {
  const GpuWeight weight = make_gpu_weight({.k = 640, .n = 136, .group_size = 128}, random_);
  for (int64_t m = 1; m <= 70 && !HasFailure(); ++m) {
    expect_all_variants_right({.m = m, .y_dtype = Dtype::bf16}, weight, random_);
  }
}

TEST_F(CudaGemm, RowCountsAroundTheTiles) {
  const GpuWeight weight = make_gpu_weight({.k = 1024, .n = 520, .group_size = 128}, random_);
  for (const int64_t m :
       {1, 2, 8, 16, 17, 31, 33, 64, 65, 127, 128, 129, 160, 161, 192, 193, 300, 1000}) {
    if (HasFailure()) break;
    expect_all_variants_right({.m = m, .y_dtype = Dtype::bf16}, weight, random_);
  }
}

TEST_F(CudaGemm, Shapes) {
  for (const int64_t n : {8, 24, 64, 136, 520}) {
    for (const int64_t k : {128, 384, 512, 1152, 4096}) {
      const GpuWeight weight = make_gpu_weight({.k = k, .n = n, .group_size = 128}, random_);
      for (const int64_t m : {1, 3, 16, 40, 161}) {
        if (HasFailure()) return;
        expect_all_variants_right({.m = m, .y_dtype = Dtype::f32}, weight, random_);
      }
    }
  }
}

TEST_F(CudaGemm, GroupSizesAndGranularities) {
  struct Size {
    int64_t k, group_size;
  };
  for (const Size size : {Size{1152, 32},
                          {4096, 32},
                          {576, 64},
                          {4096, 64},
                          {1152, 128},
                          {1024, 256},
                          {1280, 640},
                          {576, 576},
                          {200, 200},
                          {4096, 4096}}) {
    const GpuWeight weight = make_gpu_weight(
        {.k = size.k, .n = 136, .group_size = size.group_size, .scale_dtype = Dtype::bf16},
        random_);
    for (const Granularity granularity : {Granularity::token, Granularity::group}) {
      for (const int64_t m : {1, 2, 7, 16, 65, 200}) {
        if (HasFailure()) return;
        expect_all_variants_right({.m = m, .y_dtype = Dtype::f32, .granularity = granularity},
                                  weight, random_);
      }
    }
  }
}

// Enough columns and slices for several tiles a block, deep rings, and shared tails.
TEST_F(CudaGemm, LargerMatrices) {
  const GpuWeight weight = make_gpu_weight({.k = 8192, .n = 4608, .group_size = 128}, random_);
  for (const int64_t m : {1, 5, 16, 48}) {
    if (HasFailure()) return;
    expect_all_variants_right({.m = m, .y_dtype = Dtype::f16}, weight, random_);
  }
}

TEST_F(CudaGemm, ScalesBiasesAndTypes) {
  for (const Dtype scale_dtype : {Dtype::f16, Dtype::bf16}) {
    for (const ScaleKind kind :
         {ScaleKind::ordinary, ScaleKind::negative, ScaleKind::subnormal, ScaleKind::mixed}) {
      for (const auto& [group_size, bias] : {std::pair{64, false}, {64, true}, {128, true}}) {
        const GpuWeight weight = make_gpu_weight({.k = 256,
                                                  .n = 72,
                                                  .group_size = group_size,
                                                  .scale_dtype = scale_dtype,
                                                  .scales = kind,
                                                  .bias = bias},
                                                 random_);
        for (const Dtype y : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
          for (const Granularity granularity : {Granularity::token, Granularity::group}) {
            for (const int64_t m : {2, 19}) {
              if (HasFailure()) return;
              expect_all_variants_right({.m = m, .y_dtype = y, .granularity = granularity}, weight,
                                        random_);
            }
          }
        }
      }
    }
  }
}

// Kernels that scale partial sums in integers lose the small groups beside a large one.
TEST_F(CudaGemm, OneGroupWithScalesAHundredTimesLarger) {
  GpuWeight weight = make_gpu_weight({.k = 1024, .n = 64, .group_size = 128}, random_);
  for (int64_t n = 0; n < 64; ++n) {
    uint16_t& bits = weight.host.tensors.scales[3 * 64 + n];
    bits = f16_from_float(100.0f * float_from_f16(bits));
  }
  refresh(weight);
  for (const int64_t m : {1, 16, 33}) {
    expect_all_variants_right({.m = m, .y_dtype = Dtype::f32}, weight, random_);
  }
}

/// With scale 1 in one group, 0 in the others and t = 1, y is the integer sum of that group.
void expect_exact_sums(int64_t k, int64_t group_size, const GpuWeight& ordinary,
                       const Quantized& input, int64_t m) {
  const ref::Weights& reference = ordinary.host.reference;
  const int64_t n = reference.n, groups = k / group_size;
  const std::vector<int32_t> sums = ref::partial_sums(reference, input.codes.data(), m);
  const Problem problem{.m = m, .n = n, .k = k, .group_size = group_size};
  for (int64_t group = 0; group < groups; group += std::max<int64_t>(1, groups / 7)) {
    GpuWeight weight;
    weight.host.tensors = ordinary.host.tensors;
    for (int64_t i = 0; i < groups * n; ++i) {
      weight.host.tensors.scales[i] = f16_from_float(i / n == group ? 1.0f : 0.0f);
    }
    refresh(weight);
    for (const Variant& variant : variants(problem)) {
      const DeviceOperand operand = upload(variant.plan, input);
      const Buffer y(static_cast<size_t>(m * n * 4));
      const Buffer workspace(variant.plan.workspace_bytes, 0);
      const Status status = run_gemm_quantized(variant.plan, operand.operand(), weight.device,
                                               y.as<>(), n, workspace.as<>(), nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      const auto found = y.download<float>();
      for (int64_t i = 0; i < m * n; ++i) {
        const auto expected = static_cast<float>(sums[(i / n * groups + group) * n + i % n]);
        ASSERT_EQ(found[i], expected) << variant.name << ": S of row " << i / n << ", group "
                                      << group << ", column " << i % n;
      }
    }
  }
}

TEST_F(CudaGemm, IntegerSumsAreExact) {
  struct Size {
    int64_t k, group_size;
  };
  for (const Size size : {Size{1152, 32}, {576, 64}, {1152, 128}, {4096, 128}, {4096, 1024}}) {
    const GpuWeight weight =
        make_gpu_weight({.k = size.k, .n = 136, .group_size = size.group_size}, random_);
    for (const int64_t m : {1, 2, 9, 16, 17, 80}) {
      if (HasFailure()) return;
      Quantized input =
          random_quantized({.m = m, .n = 136, .k = size.k, .group_size = size.group_size}, random_);
      std::fill(input.scales.begin(), input.scales.end(), 1.0f);
      expect_exact_sums(size.k, size.group_size, weight, input, m);
    }
  }
}

TEST_F(CudaGemm, ExtremeCodesZerosAndActivations) {
  for (const int64_t group_size : {32, 128, 512}) {
    for (const int code : {0, 15}) {
      for (const int zero : {0, 15}) {
        const GpuWeight weight = make_gpu_weight(
            {.k = 512, .n = 40, .group_size = group_size, .fixed_code = code, .fixed_zero = zero},
            random_);
        for (const int a : {-128, -127, 127}) {
          for (const int64_t m : {1, 16, 18}) {
            if (HasFailure()) return;
            Quantized input;
            input.codes.assign(static_cast<size_t>(m * 512), static_cast<int8_t>(a));
            input.scales.assign(static_cast<size_t>(m), 1.0f);
            expect_exact_sums(512, group_size, weight, input, m);
          }
        }
      }
    }
  }
}

// q - z = 15 everywhere and x = 1: y = 15 K s, exactly representable steps all the way.
TEST_F(CudaGemm, LargestCodesTimesOne) {
  GpuWeight weight = make_gpu_weight(
      {.k = 4096, .n = 64, .group_size = 128, .fixed_code = 15, .fixed_zero = 0}, random_);
  std::fill(weight.host.tensors.scales.begin(), weight.host.tensors.scales.end(),
            f16_from_float(0x1p-6f));
  refresh(weight);
  for (const int64_t m : {1, 16, 64}) {
    const Problem problem{.m = m, .n = 64, .k = 4096, .group_size = 128};
    const std::vector<float> x(static_cast<size_t>(m * 4096), 1.0f);
    const Buffer device_x(x);
    for (const Variant& variant : variants(problem)) {
      const Buffer y(static_cast<size_t>(m * 64 * 4)), workspace(variant.plan.workspace_bytes, 0);
      const Status status = run_gemm(variant.plan, {device_x.as<>(), 4096}, weight.device, y.as<>(),
                                     64, workspace.as<>(), nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      const float expected = 15.0f * 127.0f * 4096.0f * 0x1p-6f * (1.0f / 127.0f);
      for (const float value : y.download<float>()) ASSERT_EQ(value, expected) << variant.name;
    }
  }
}

TEST_F(CudaGemm, Int4CodesAreExactToo) {
  const GpuWeight weight = make_gpu_weight({.k = 1024, .n = 136, .group_size = 128}, random_);
  for (const int64_t m : {1, 16, 65}) {
    expect_all_variants_right({.m = m,
                               .mode = Mode::w4a4,
                               .y_dtype = Dtype::bf16,
                               .granularity = Granularity::group,
                               .symmetric = false},
                              weight, random_);
  }
}

TEST_F(CudaGemm, SymmetricInt4CodesAreExactInFp8) {
  for (const int64_t k : {128, 1152, 4096}) {
    const GpuWeight weight = make_gpu_weight({.k = k, .n = 392, .group_size = 128}, random_);
    for (const int64_t m : {1, 65, 200}) {
      for (const Dtype y : {Dtype::f32, Dtype::bf16}) {
        expect_all_variants_right({.m = m, .mode = Mode::w4a4, .y_dtype = y}, weight, random_);
      }
    }
  }
}

// All kernels of w4a4, the one for 4-bit tensor cores among them: both kinds of codes, groups of
// one and of two runs in a product and of several blocks, rows and columns that fill no tile.
TEST_F(CudaGemm, Int4CodesOfEveryGroupSizeAndGranularity) {
  struct Size {
    int64_t k, group_size;
  };
  for (const Size size : {Size{576, 64},
                          {4096, 64},
                          {128, 128},
                          {1152, 128},
                          {1280, 640},
                          {200, 200},
                          {2048, 2048}}) {
    const GpuWeight weight = make_gpu_weight(
        {.k = size.k, .n = 392, .group_size = size.group_size, .bias = true}, random_);
    for (const bool symmetric : {true, false}) {
      for (const Granularity granularity : {Granularity::token, Granularity::group}) {
        for (const int64_t m : {1, 127, 130}) {
          if (HasFailure()) return;
          expect_all_variants_right({.m = m,
                                     .mode = Mode::w4a4,
                                     .y_dtype = m == 130 ? Dtype::bf16 : Dtype::f32,
                                     .granularity = granularity,
                                     .symmetric = symmetric},
                                    weight, random_);
        }
      }
    }
  }
}

// The largest sums of codes that have a zero point, and all that zero points take off again.
TEST_F(CudaGemm, LargestInt4CodesWithZeroPoints) {
  for (const int64_t group_size : {64, 128, 512}) {
    for (const auto& [code, zero] : {std::pair{15, 0}, {0, 15}, {15, 15}}) {
      const GpuWeight weight = make_gpu_weight(
          {.k = 512, .n = 40, .group_size = group_size, .fixed_code = code, .fixed_zero = zero},
          random_);
      for (const int a : {15, 0, -15}) {
        const Problem p = {.m = 20,
                           .n = 40,
                           .k = 512,
                           .group_size = group_size,
                           .mode = Mode::w4a4,
                           .y_dtype = Dtype::f32,
                           .symmetric = false};
        Quantized input{std::vector<int8_t>(static_cast<size_t>(p.m * p.k), static_cast<int8_t>(a)),
                        std::vector<float>(static_cast<size_t>(p.m), 1.0f)};
        for (int64_t row = 0; row < p.m; ++row) input.codes[row * p.k + row] = 0;  // odd sums
        const Expected expected = expected_of(p, weight, input);
        for (const Variant& variant : variants(p)) {
          ASSERT_EQ(run_and_compare(variant.plan, weight, input, expected), "") << variant.name;
        }
      }
    }
  }
}

// From floats to y by the kernel for 4-bit tensor cores, against the int8 one: the same bits.
TEST_F(CudaGemm, Int4ProductsGiveTheBitsOfInt8Ones) {
  const GpuWeight weight = make_gpu_weight({.k = 1152, .n = 264, .group_size = 128}, random_);
  const int64_t m = 150, k = 1152, n = 264;
  std::vector<float> x(static_cast<size_t>(m * k));
  for (float& v : x) v = std::normal_distribution<float>(0.3f)(random_);
  const Buffer device_x(x);
  for (const bool symmetric : {true, false}) {
    for (const Granularity granularity :
         {Granularity::token, Granularity::group, Granularity::tensor}) {
      const Problem p = {.m = m,
                         .n = n,
                         .k = k,
                         .group_size = 128,
                         .mode = Mode::w4a4,
                         .granularity = granularity,
                         .symmetric = symmetric};
      std::vector<std::vector<float>> found;
      for (const char* name : {"w4a4_mma_sm80", "w4a8_mma_sm80"}) {
        const Result<Plan> plan = plan_gemm(p, *gpu(), name);
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        const Buffer y(static_cast<size_t>(m * n * 4)), workspace(plan->workspace_bytes, 0);
        const Status status = run_gemm(*plan, {device_x.as<>(), k}, weight.device, y.as<>(), n,
                                       workspace.as<>(), nullptr);
        ASSERT_TRUE(status.ok()) << status.message();
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        ASSERT_TRUE(workspace.guard_is_intact());
        found.push_back(y.download<float>());
      }
      ASSERT_EQ(found[0], found[1]) << granularity_name(granularity) << " " << symmetric;
    }
  }
}

// The largest sums that fp8 accumulation meets, odd so that every bit counts: 15 * (-8 * 127 - 7).
TEST_F(CudaGemm, LargestInt4SumsAreExactInFp8) {
  for (const int zero : {0, 15}) {
    GpuWeight weight = make_gpu_weight(
        {.k = 256, .n = 64, .group_size = 128, .fixed_code = 15 - zero, .fixed_zero = zero},
        random_);
    std::fill(weight.host.tensors.scales.begin(), weight.host.tensors.scales.end(), 0x3c00);  // 1
    refresh(weight);
    Problem p = {.m = 128, .n = 64, .k = 256, .group_size = 128, .mode = Mode::w4a4};
    Quantized input{std::vector<int8_t>(static_cast<size_t>(p.m * p.k), -8),
                    std::vector<float>(static_cast<size_t>(p.m), 1.0f)};
    for (int64_t row = 0; row < p.m; ++row) input.codes[row * p.k + row] = -7;
    const Expected expected = expected_of(p, weight, input);
    for (const Variant& variant : variants(p)) {
      ASSERT_EQ(run_and_compare(variant.plan, weight, input, expected), "") << variant.name;
    }
  }
}

// Whole and split tiles, several of each a worker, launch after launch in one workspace; weights
// expanded by each launch, before the products and beside them, and once and for all.
TEST_F(CudaGemm, ExpandedWeightsTileAfterTile) {
  for (const int64_t k : {1152, 4096}) {
    const int64_t n = k == 1152 ? 2696 : 3848;  // 11 and 16 tiles of 256; of 384, 8 and 11
    GpuWeight weight = make_gpu_weight({.k = k, .n = n, .group_size = 128}, random_);
    for (const Granularity granularity : {Granularity::token, Granularity::group}) {
      for (const auto& [kernel, mode] : {std::pair{"w4a8_ss_sm90", Mode::w4a8},
                                         {"w4a4_ss_sm90", Mode::w4a4},
                                         {"w4a16_ss_sm90", Mode::w4a16}}) {
        if (mode == Mode::w4a16 && granularity == Granularity::group) continue;
        const Problem problem{.m = k == 1152 ? 350 : 140,  // one row of tiles, or two or three
                              .n = n,
                              .k = k,
                              .group_size = 128,
                              .mode = mode,
                              .x_dtype = Dtype::bf16,
                              .y_dtype = Dtype::bf16,
                              .granularity = granularity};
        const Quantized input = random_quantized(problem, random_);
        const Expected expected = expected_of(problem, weight, input);
        const bool int4 = mode == Mode::w4a4;
        const Plan kept = *plan_gemm(problem, *gpu(), kernel, true);
        EXPECT_EQ(kept.ss.expanded, mode != Mode::w4a16);
        if (kept.ss.expanded) {  // of the other type: as good as none
          ASSERT_TRUE(weight.device.expand(*gpu(), !int4).ok());
          EXPECT_NE(run_and_compare(kept, weight, input, expected).find("expanded to"),
                    std::string::npos);
          ASSERT_TRUE(weight.device.expand(*gpu(), int4).ok());
        }
        for (const int multiprocessors : {2, 6, 16}) {
          Plan plan = kept;
          plan.ss.multiprocessors = multiprocessors;
          for (const int first_pairs : {0, 3, 100}) {  // a cluster's columns; none beside
            plan.ss.expanded = false;
            plan.ss.first_pairs = first_pairs;
            plan.workspace_bytes = workspace_layout(plan).total;
            ASSERT_EQ(run_and_compare(plan, weight, input, expected, 5), "")
                << plan.describe() << " on " << multiprocessors;
          }
          if (!kept.ss.expanded) continue;
          plan.ss.expanded = true;
          plan.workspace_bytes = workspace_layout(plan).total;
          ASSERT_EQ(run_and_compare(plan, weight, input, expected, 5), "")
              << plan.describe() << " on " << multiprocessors;
        }
      }
    }
  }
}

// Llama's down projection: more slices than a block has warps, and one tile that all workers share.
TEST_F(CudaGemm, DeepK) {
  const GpuWeight weight = make_gpu_weight({.k = 14336, .n = 136, .group_size = 128}, random_);
  for (const Granularity granularity : {Granularity::token, Granularity::group}) {
    for (const int64_t m : {1, 3, 16, 40, 72}) {
      if (HasFailure()) return;
      expect_all_variants_right({.m = m, .y_dtype = Dtype::bf16, .granularity = granularity},
                                weight, random_);
    }
  }
}

// Tiles with two, three and more sharers, stored by pieces: every type of y, with a bias.
TEST_F(CudaGemm, TilesThatManyWorkersShare) {
  for (const int64_t n : {520, 2056}) {
    const GpuWeight weight =
        make_gpu_weight({.k = 4096, .n = n, .group_size = 128, .bias = true}, random_);
    for (const Granularity granularity : {Granularity::token, Granularity::group}) {
      for (const Dtype y : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
        for (const int64_t m : {17, 31, 64, 130}) {
          if (HasFailure()) return;
          expect_all_variants_right({.m = m, .y_dtype = y, .granularity = granularity}, weight,
                                    random_);
        }
      }
    }
  }
}

// A group for the whole of K, for two blocks of k, and a number of groups that is odd.
TEST_F(CudaGemm, ScalesPerTokenAndGroupOfEveryLength) {
  struct Size {
    int64_t k, group_size;
  };
  for (const Size size : {Size{1152, 128}, {4352, 128}, {2304, 256}, {3840, 384}, {2048, 2048}}) {
    const GpuWeight weight =
        make_gpu_weight({.k = size.k, .n = 776, .group_size = size.group_size}, random_);
    for (const int64_t m : {17, 32, 33, 65, 100, 193}) {
      if (HasFailure()) return;
      expect_all_variants_right({.m = m, .y_dtype = Dtype::bf16, .granularity = Granularity::group},
                                weight, random_);
    }
  }
}

TEST_F(CudaGemm, OtherLayoutsPackToTheSame) {
  const GpuWeight weight = make_gpu_weight({.k = 512, .n = 64, .group_size = 128}, random_);
  QuantMatrix symmetric = weight.host.tensors.view();
  symmetric.zeros = nullptr;
  Result<DeviceWeights> found = DeviceWeights::create(*gpu(), symmetric);
  ASSERT_TRUE(found.ok()) << found.status().message();
  AwqTensors eights = weight.host.tensors;
  std::fill(eights.qzeros.begin(), eights.qzeros.end(), 0x88888888u);
  Result<DeviceWeights> expected = DeviceWeights::create(*gpu(), eights.view());
  ASSERT_TRUE(expected.ok());
  std::vector<std::byte> a(static_cast<size_t>(found->bytes())), b(a.size());
  NIBBLE_CHECK_CUDA(cudaMemcpy(a.data(), found->slabs(), a.size(), cudaMemcpyDeviceToHost));
  NIBBLE_CHECK_CUDA(cudaMemcpy(b.data(), expected->slabs(), b.size(), cudaMemcpyDeviceToHost));
  EXPECT_EQ(a, b);
}

// ---- from floats to floats ----------------------------------------------------------------------

std::vector<float> random_floats(int64_t count, std::mt19937& random) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = std::normal_distribution<float>()(random);
  return values;
}

/// `values` (rows, columns) with rows `stride` apart, as `dtype`.
std::vector<std::byte> to_rows(const std::vector<float>& values, int64_t columns, int64_t stride,
                               Dtype dtype) {
  const auto rows = static_cast<int64_t>(values.size()) / columns;
  std::vector<std::byte> bytes(static_cast<size_t>(rows * stride * dtype_bytes(dtype)));
  for (int64_t i = 0; i < rows * columns; ++i) {
    store_from_float(bytes.data(), i / columns * stride + i % columns, dtype, values[i]);
  }
  return bytes;
}

/// One product from x in device memory, with everything it needs.
struct Product {
  Product(const Plan& p, const GpuWeight& w, const std::vector<std::byte>& input, int64_t stride,
          const std::vector<float>& static_scales = {1.0f})
      : plan(p),
        weight(w),
        x(input),
        scales(static_scales),
        y(static_cast<size_t>(p.problem.m * p.problem.n * dtype_bytes(p.problem.y_dtype))),
        workspace(p.workspace_bytes, 0),
        x_stride(stride) {}

  Status operator()(cudaStream_t stream = nullptr) const {
    DeviceInput from{x.as<>(), x_stride};
    from.static_scales = scales.as<float>();
    return run_gemm(plan, from, weight.device, y.as<>(), plan.problem.n, workspace.as<>(), stream);
  }
  std::vector<std::byte> result() const {
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    return y.download<std::byte>();
  }

  const Plan plan;
  const GpuWeight& weight;
  const Buffer x, scales, y, workspace;
  const int64_t x_stride;
};

TEST_F(CudaGemm, QuantizesMultipliesAndRounds) {
  const GpuWeight weight = make_gpu_weight({.k = 1152, .n = 136, .group_size = 128}, random_);
  for (const Dtype x_dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    for (const Granularity granularity :
         {Granularity::tensor, Granularity::token, Granularity::group, Granularity::static_tensor,
          Granularity::static_group}) {
      for (const int64_t m : {1, 2, 16, 70}) {
        const int64_t stride = 1160;
        const Problem problem{.m = m,
                              .n = 136,
                              .k = 1152,
                              .group_size = 128,
                              .x_dtype = x_dtype,
                              .granularity = granularity};
        const auto x = to_rows(random_floats(m * 1152, random_), 1152, stride, x_dtype);
        const std::vector<float> scales(9, 0.03f);
        const GemmInput host{.x = x.data(), .x_stride = stride, .static_scales = scales.data()};
        const ref::Activations a = ref::quantize(problem, host);
        const Quantized input{a.codes, a.scales};
        const Expected expected = expected_of(problem, weight, input);
        for (const Variant& variant : kernels(problem)) {
          const Product run(variant.plan, weight, x, stride, scales);
          const Status status = run();
          ASSERT_TRUE(status.ok()) << status.message();
          ASSERT_EQ(compare(variant.plan, expected, run.result(), 136), "")
              << variant.name << " " << granularity_name(granularity) << " M=" << m;
        }
      }
    }
  }
}

TEST_F(CudaGemm, RowsWithNanOrInfinityBecomeNanRows) {
  const GpuWeight weight = make_gpu_weight({.k = 512, .n = 64, .group_size = 128}, random_);
  for (const Granularity granularity : {Granularity::token, Granularity::group,
                                        Granularity::static_tensor, Granularity::static_group}) {
    for (const Dtype x_dtype : {Dtype::f32, Dtype::bf16}) {
      for (const int64_t m : {2, 3, 16, 40}) {
        const Problem problem{.m = m,
                              .n = 64,
                              .k = 512,
                              .group_size = 128,
                              .x_dtype = x_dtype,
                              .granularity = granularity};
        const std::vector<float> good = random_floats(m * 512, random_);
        std::vector<float> bad = good;
        bad[1 * 512 + 300] = std::nanf("");
        bad[(m - 1) * 512 + 511] = -INFINITY;
        const std::vector<float> scales(4, 0.03f);
        for (const Variant& variant : kernels(problem)) {
          const Product clean(variant.plan, weight, to_rows(good, 512, 512, x_dtype), 512, scales);
          const Product dirty(variant.plan, weight, to_rows(bad, 512, 512, x_dtype), 512, scales);
          ASSERT_TRUE(clean().ok());
          ASSERT_TRUE(dirty().ok());
          const auto expected = clean.result(), found = dirty.result();
          for (int64_t i = 0; i < m * 64; ++i) {
            const float value = load_as_float(found.data(), i, Dtype::f32);
            if (i / 64 == 1 || i / 64 == m - 1) {
              ASSERT_TRUE(std::isnan(value)) << variant.name << " row " << i / 64 << ": " << value;
            } else {
              ASSERT_EQ(value, load_as_float(expected.data(), i, Dtype::f32)) << variant.name;
            }
          }
        }
      }
    }
  }
}

TEST_F(CudaGemm, SameBitsOnEveryRepetition) {
  const GpuWeight weight = make_gpu_weight({.k = 4096, .n = 1032, .group_size = 128}, random_);
  for (const int64_t m : {1, 8, 16, 50, 300}) {
    const Problem problem{.m = m, .n = 1032, .k = 4096, .group_size = 128};
    const auto x = to_rows(random_floats(m * 4096, random_), 4096, 4096, Dtype::f32);
    for (const Variant& variant : variants(problem)) {
      const Product run(variant.plan, weight, x, 4096);
      ASSERT_TRUE(run().ok());
      const auto first = run.result();
      for (int i = 0; i < 20; ++i) {
        ASSERT_TRUE(run().ok());
        ASSERT_EQ(run.result(), first) << variant.name << " M=" << m << ", repetition " << i;
      }
    }
  }
}

/// A stream of its own, which does not wait for the default one.
class Stream {
 public:
  Stream() { NIBBLE_CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { (void)cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

TEST_F(CudaGemm, CanBeCapturedIntoAGraph) {
  const GpuWeight weight = make_gpu_weight({.k = 2048, .n = 520, .group_size = 128}, random_);
  for (const int64_t m : {1, 16, 100}) {
    for (const Granularity granularity : {Granularity::tensor, Granularity::token}) {
      const Problem problem{
          .m = m, .n = 520, .k = 2048, .group_size = 128, .granularity = granularity};
      const auto x = to_rows(random_floats(m * 2048, random_), 2048, 2048, Dtype::f32);
      for (const Variant& variant : kernels(problem)) {
        const Product direct(variant.plan, weight, x, 2048),
            captured(variant.plan, weight, x, 2048);
        ASSERT_TRUE(direct().ok());
        const Stream stream;
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        NIBBLE_CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        const Status first = captured(stream), second = captured(stream);
        NIBBLE_CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
        ASSERT_TRUE(first.ok() && second.ok()) << first.message() << second.message();
        NIBBLE_CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
        for (int i = 0; i < 3; ++i) NIBBLE_CHECK_CUDA(cudaGraphLaunch(executable, stream));
        ASSERT_EQ(captured.result(), direct.result()) << variant.name << " M=" << m;
        NIBBLE_CHECK_CUDA(cudaGraphExecDestroy(executable));
        NIBBLE_CHECK_CUDA(cudaGraphDestroy(graph));
      }
    }
  }
}

TEST_F(CudaGemm, TwoStreamsAtOnce) {
  const GpuWeight weight = make_gpu_weight({.k = 4096, .n = 1032, .group_size = 128}, random_);
  for (const int64_t m : {1, 16, 200}) {
    const Problem problem{.m = m, .n = 1032, .k = 4096, .group_size = 128};
    for (const Variant& variant : variants(problem)) {
      std::deque<Product> runs;
      std::vector<std::vector<std::byte>> expected;
      for (int i = 0; i < 2; ++i) {
        const auto x = to_rows(random_floats(m * 4096, random_), 4096, 4096, Dtype::f32);
        runs.emplace_back(variant.plan, weight, x, 4096);
        ASSERT_TRUE(runs.back()().ok());
        expected.push_back(runs.back().result());
      }
      const Stream a, b;
      for (int i = 0; i < 20; ++i) {
        ASSERT_TRUE(runs[0](a).ok());
        ASSERT_TRUE(runs[1](b).ok());
      }
      for (int i = 0; i < 2; ++i) ASSERT_EQ(runs[i].result(), expected[i]) << variant.name;
    }
  }
}

TEST_F(CudaGemm, RefusesWhatTheHostCanSee) {
  const GpuWeight weight = make_gpu_weight({.k = 256, .n = 64, .group_size = 128}, random_);
  const Problem problem{.m = 4, .n = 64, .k = 256, .group_size = 128};
  const Plan plan = *plan_gemm(problem, *gpu());
  const Buffer x(4 * 256 * 4), y(4 * 64 * 4), workspace(plan.workspace_bytes, 0);
  const auto run = [&](const Plan& p, const DeviceInput& in, void* out, int64_t stride, void* w) {
    return run_gemm(p, in, weight.device, out, stride, w, nullptr);
  };
  const DeviceInput good{x.as<>(), 256};
  EXPECT_TRUE(run(plan, good, y.as<>(), 64, workspace.as<>()).ok());
  DeviceInput bad = good;
  bad.x = nullptr;
  EXPECT_FALSE(run(plan, bad, y.as<>(), 64, workspace.as<>()).ok());
  bad = good;
  bad.x_stride = 255;
  EXPECT_FALSE(run(plan, bad, y.as<>(), 64, workspace.as<>()).ok());
  bad.x_stride = 257;  // rows that begin between vectors
  EXPECT_FALSE(run(plan, bad, y.as<>(), 64, workspace.as<>()).ok());
  bad = good;
  bad.clip = 0;
  EXPECT_FALSE(run(plan, bad, y.as<>(), 64, workspace.as<>()).ok());
  EXPECT_FALSE(run(plan, good, nullptr, 64, workspace.as<>()).ok());
  EXPECT_FALSE(run(plan, good, y.as<>(), 63, workspace.as<>()).ok());
  EXPECT_FALSE(run(plan, good, y.as<>(), 64, nullptr).ok());
  EXPECT_FALSE(run(plan, good, y.as<>(), 64, workspace.as<std::byte>() + 64).ok());
  Plan other = plan;
  other.problem.n = 128;
  EXPECT_FALSE(run(other, good, y.as<>(), 128, workspace.as<>()).ok());
  other = *plan_gemm({.m = 0, .n = 64, .k = 256, .group_size = 128}, *gpu());
  EXPECT_TRUE(run(other, {}, nullptr, 0, nullptr).ok());  // nothing to do
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
}

TEST_F(CudaGemm, OutOfMemorySaysHowMuch) {
  QuantMatrix huge =
      make_gpu_weight({.k = 128, .n = 8, .group_size = 128}, random_).host.tensors.view();
  huge.k = int64_t{1} << 30;
  huge.n = int64_t{1} << 20;
  huge.group_size = 128;
  const Result<DeviceWeights> weights = DeviceWeights::create(*gpu(), huge);
  ASSERT_FALSE(weights.ok());
  EXPECT_EQ(weights.status().code(), Code::out_of_memory) << weights.status().message();
  for (const char* word : {"bytes", "wanted", "free"}) {
    EXPECT_NE(weights.status().message().find(word), std::string::npos)
        << weights.status().message();
  }
}

// ---- small ones, for compute-sanitizer ----------------------------------------------------------

class CudaSanitizer : public CudaGemm {};

TEST_F(CudaSanitizer, SmallProducts) {
  const GpuWeight weight =
      make_gpu_weight({.k = 1152, .n = 136, .group_size = 64, .bias = true}, random_);
  for (const Granularity granularity : {Granularity::token, Granularity::group}) {
    for (const int64_t m : {1, 5, 16, 37}) {
      const Problem problem{.m = m,
                            .n = 136,
                            .k = 1152,
                            .group_size = 64,
                            .x_dtype = Dtype::bf16,
                            .y_dtype = Dtype::bf16,
                            .granularity = granularity};
      const auto x = to_rows(random_floats(m * 1152, random_), 1152, 1152, Dtype::bf16);
      for (const Variant& variant : kernels(problem)) {
        const Product run(variant.plan, weight, x, 1152);
        ASSERT_TRUE(run().ok());
        const auto first = run.result();
        ASSERT_TRUE(run().ok());
        ASSERT_EQ(run.result(), first) << variant.name;
      }
    }
  }
}

// Every tile of the rs kernels, by two workers: whole, shared, and in parts of a cluster.
TEST_F(CudaSanitizer, TilesOfRegisters) {
  const GpuWeight weight = make_gpu_weight({.k = 1152, .n = 776, .group_size = 128}, random_);
  const auto x = to_rows(random_floats(37 * 1152, random_), 1152, 1152, Dtype::bf16);
  for (const auto& [kernel, mode] : {std::pair{"w4a8_rs_sm90", Mode::w4a8},
                                     {"w4a8_fp8_rs_sm90", Mode::w4a8_fp8},
                                     {"w4a4_rs_sm90", Mode::w4a4},
                                     {"w4a16_rs_sm90", Mode::w4a16}}) {
    const Problem problem{.m = 37,
                          .n = 776,
                          .k = 1152,
                          .group_size = 128,
                          .mode = mode,
                          .x_dtype = Dtype::bf16,
                          .y_dtype = Dtype::bf16};
    Result<Plan> made = plan_gemm(problem, *gpu(), kernel);
    if (!made.ok()) GTEST_SKIP() << made.status().message();
    Plan plan = *made;
    const PackedLayout layout = packed_layout(776, 1152, 128);
    for (const RsTile& tile : rs_tiles(layout, rs_activations(plan))) {
      for (const RsConfig& config : rs_configs(layout, tile, 4 / tile.blocks)) {
        plan.rs = config;
        plan.workspace_bytes = workspace_layout(plan).total;
        const Product run(plan, weight, x, 1152);
        ASSERT_TRUE(run().ok()) << plan.describe();
        const auto first = run.result();
        ASSERT_TRUE(run().ok()) << plan.describe();
        ASSERT_EQ(run.result(), first) << plan.describe();
      }
    }
  }
}

// By two clusters, whole tiles and shared ones: pieces of the weights pass between blocks.
TEST_F(CudaSanitizer, WeightsExpandedBeside) {
  const GpuWeight weight = make_gpu_weight({.k = 1152, .n = 776, .group_size = 128}, random_);
  const auto x = to_rows(random_floats(37 * 1152, random_), 1152, 1152, Dtype::bf16);
  for (const auto& [kernel, mode] : {std::pair{"w4a8_ss_sm90", Mode::w4a8},
                                     {"w4a8_fp8_ss_sm90", Mode::w4a8_fp8},
                                     {"w4a4_ss_sm90", Mode::w4a4},
                                     {"w4a16_ss_sm90", Mode::w4a16}}) {
    const Problem problem{.m = 37,
                          .n = 776,
                          .k = 1152,
                          .group_size = 128,
                          .mode = mode,
                          .x_dtype = Dtype::bf16,
                          .y_dtype = Dtype::bf16};
    Result<Plan> made = plan_gemm(problem, *gpu(), kernel);
    if (!made.ok()) GTEST_SKIP() << made.status().message();
    Plan plan = *made;
    plan.ss.multiprocessors = 4;
    for (const bool split : {false, true}) {
      std::vector<std::byte> before;
      for (const int first_pairs : {100, 1, 0}) {
        plan.ss.split_tail = split;
        plan.ss.first_pairs = first_pairs;
        plan.workspace_bytes = workspace_layout(plan).total;
        const Product run(plan, weight, x, 1152);
        ASSERT_TRUE(run().ok());
        ASSERT_TRUE(run().ok());
        const auto result = run.result();
        ASSERT_TRUE(before.empty() || result == before) << plan.describe();
        before = result;
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cuda::testing
