// w4a16 on a GPU with x of any floats: the bound of docs/cuda.md, what NaN and infinity do, and
// repetition. That products of integers are exact, bit for bit, is in test_cuda_gemm.cc.
#include <cmath>

#include "cuda_testing.h"

namespace nibble::cuda::testing {
namespace {

class CudaW4a16 : public ::testing::Test {
 protected:
  void SetUp() override { NIBBLE_NEEDS_GPU(); }
  std::mt19937 random_{20260301};
};

std::vector<float> normal_floats(int64_t count, Dtype dtype, std::mt19937& random) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) {  // as x holds them
    uint16_t bits = 0;
    store_from_float(&bits, 0, dtype, std::normal_distribution<float>()(random));
    v = load_as_float(&bits, 0, dtype);
  }
  return values;
}

Buffer as_x(const std::vector<float>& values, Dtype dtype) {
  std::vector<uint16_t> x(values.size());
  for (size_t i = 0; i < x.size(); ++i) {
    store_from_float(x.data(), static_cast<int64_t>(i), dtype, values[i]);
  }
  return Buffer(x);
}

Problem problem_of(const GpuWeight& weight, int64_t m, Dtype x, Dtype y) {
  const ref::Weights& w = weight.host.reference;
  return {.m = m,
          .n = w.n,
          .k = w.k,
          .group_size = w.group_size,
          .mode = Mode::w4a16,
          .x_dtype = x,
          .y_dtype = y};
}

std::vector<float> run(const Plan& plan, const GpuWeight& weight, const Buffer& x,
                       cudaStream_t stream = nullptr) {
  const Problem& p = plan.problem;
  const Buffer y(static_cast<size_t>(p.m * p.n * dtype_bytes(p.y_dtype)));
  const Buffer workspace(plan.workspace_bytes, 0);
  const Status status =
      run_gemm(plan, {x.as<>(), p.k}, weight.device, y.as<>(), p.n, workspace.as<>(), stream);
  EXPECT_TRUE(status.ok()) << status.message();
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  EXPECT_TRUE(y.guard_is_intact());
  const auto bytes = y.download<std::byte>();
  std::vector<float> values(static_cast<size_t>(p.m * p.n));
  for (int64_t i = 0; i < p.m * p.n; ++i) values[i] = load_as_float(bytes.data(), i, p.y_dtype);
  return values;
}

/// |x| times |q - z| |s| + |bias|: what the error is relative to.
std::vector<double> magnitudes(const GpuWeight& weight, std::vector<float> x, int64_t m) {
  ref::Weights w = weight.host.reference;
  for (float& v : x) v = std::fabs(v);
  for (float& s : w.scales) s = std::fabs(s);
  for (int64_t i = 0; i < w.n * w.k; ++i) {
    const int zero = w.zeros[i / w.group_size];
    w.codes[i] = static_cast<uint8_t>(std::abs(w.codes[i] - zero));
  }
  std::fill(w.zeros.begin(), w.zeros.end(), uint8_t{0});
  std::vector<float> bias = weight.host.bias;
  for (float& b : bias) b = std::fabs(b);
  return ref::multiply_fp64(w, x.data(), m, bias.empty() ? nullptr : bias.data());
}

TEST_F(CudaW4a16, FloatsWithinTheBound) {
  struct Case {
    int64_t n, k, group_size;
    bool bias;
  };
  for (const Case& c :
       {Case{136, 1152, 128, true}, Case{72, 576, 64, false}, Case{136, 1152, 32, true},
        Case{392, 4096, 128, false}, Case{40, 200, 200, true}, Case{136, 14336, 128, false}}) {
    const GpuWeight weight =
        make_gpu_weight({.k = c.k, .n = c.n, .group_size = c.group_size, .bias = c.bias}, random_);
    for (const Dtype x_dtype : {Dtype::f16, Dtype::bf16}) {
      for (const int64_t m : {1, 3, 8, 9, 16, 17, 70, 300}) {
        const std::vector<float> x = normal_floats(m * c.k, x_dtype, random_);
        const Buffer device_x = as_x(x, x_dtype);
        const std::vector<double> exact =
            ref::multiply_fp64(weight.host.reference, x.data(), m, weight.host.bias_or_null());
        const std::vector<double> magnitude = magnitudes(weight, x, m);
        for (const Variant& v : variants(problem_of(weight, m, x_dtype, Dtype::f32))) {
          const std::vector<float> y = run(v.plan, weight, device_x);
          const auto steps = static_cast<double>(kHalfSumRoundings +
                                                 v.plan.padded_k / promoted_depth(c.group_size) +
                                                 v.plan.padded_k / kBlockDepth + 4);
          for (size_t i = 0; i < y.size(); ++i) {
            ASSERT_LE(std::fabs(y[i] - exact[i]),
                      std::expm1(steps * std::log1p(0x1p-24)) * magnitude[i])
                << v.name << " [" << v.plan.describe() << "] at " << i << ": " << y[i]
                << " instead of " << exact[i];
          }
        }
      }
    }
  }
}

TEST_F(CudaW4a16, NanAndInfinityStayInTheirRows) {
  const GpuWeight weight = make_gpu_weight({.k = 1152, .n = 64, .group_size = 128}, random_);
  for (const Dtype x_dtype : {Dtype::f16, Dtype::bf16}) {
    for (const int64_t m : {2, 3, 16, 40, 200}) {
      const std::vector<float> good = normal_floats(m * 1152, x_dtype, random_);
      std::vector<float> bad = good;
      bad[1 * 1152 + 300] = std::nanf("");
      bad[(m - 1) * 1152 + 1151] = -INFINITY;
      for (const Variant& v : kernels(problem_of(weight, m, x_dtype, Dtype::f32))) {
        const std::vector<float> clean = run(v.plan, weight, as_x(good, x_dtype));
        const std::vector<float> dirty = run(v.plan, weight, as_x(bad, x_dtype));
        for (int64_t i = 0; i < m * 64; ++i) {
          if (i / 64 == 1 || i / 64 == m - 1) {
            ASSERT_FALSE(std::isfinite(dirty[i])) << v.name << " row " << i / 64;
          } else {
            ASSERT_EQ(dirty[i], clean[i]) << v.name << " row " << i / 64;
          }
        }
      }
    }
  }
}

TEST_F(CudaW4a16, SameBitsOnEveryRepetitionAndInAGraph) {
  const GpuWeight weight = make_gpu_weight({.k = 4096, .n = 1032, .group_size = 128}, random_);
  for (const int64_t m : {1, 8, 16, 50, 300}) {
    const Buffer x = as_x(normal_floats(m * 4096, Dtype::bf16, random_), Dtype::bf16);
    for (const Variant& v : variants(problem_of(weight, m, Dtype::bf16, Dtype::bf16))) {
      const Buffer y(static_cast<size_t>(m * 1032 * 2)), workspace(v.plan.workspace_bytes, 0);
      const auto launch = [&](cudaStream_t stream) {
        const Status status = run_gemm(v.plan, {x.as<>(), 4096}, weight.device, y.as<>(), 1032,
                                       workspace.as<>(), stream);
        ASSERT_TRUE(status.ok()) << status.message();
      };
      launch(nullptr);
      NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
      const auto first = y.download<std::byte>();
      cudaStream_t stream = nullptr;
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t executable = nullptr;
      NIBBLE_CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      NIBBLE_CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      launch(stream);
      launch(stream);
      NIBBLE_CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
      NIBBLE_CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
      for (int i = 0; i < 10; ++i) {
        NIBBLE_CHECK_CUDA(cudaMemset(y.as<>(), 0xcc, static_cast<size_t>(m * 1032 * 2)));
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        NIBBLE_CHECK_CUDA(cudaGraphLaunch(executable, stream));
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        ASSERT_EQ(y.download<std::byte>(), first) << v.name << " M=" << m;
      }
      NIBBLE_CHECK_CUDA(cudaGraphExecDestroy(executable));
      NIBBLE_CHECK_CUDA(cudaGraphDestroy(graph));
      NIBBLE_CHECK_CUDA(cudaStreamDestroy(stream));
    }
  }
}

TEST_F(CudaW4a16, HasNoQuantizer) {
  const GpuWeight weight = make_gpu_weight({.k = 256, .n = 64, .group_size = 128}, random_);
  const Plan plan = *plan_gemm(problem_of(weight, 4, Dtype::f16, Dtype::f16), *gpu());
  const Buffer x(4 * 256 * 2), y(4 * 64 * 2), workspace(plan.workspace_bytes, 0);
  const Operand operand{x.as<int8_t>(), x.as<float>(), x.as<int32_t>(), x.as<uint32_t>()};
  EXPECT_EQ(quantize_activations(plan, {x.as<>(), 256}, operand, nullptr).code(),
            Code::invalid_argument);
  EXPECT_EQ(
      run_gemm_quantized(plan, operand, weight.device, y.as<>(), 64, workspace.as<>(), nullptr)
          .code(),
      Code::invalid_argument);
}

}  // namespace
}  // namespace nibble::cuda::testing
