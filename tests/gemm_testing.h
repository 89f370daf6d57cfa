// Shared by the GEMM tests: random weights in file layout, and one call that runs a kernel and
// compares every integer partial sum and every output bit with the oracle.
#pragma once

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "format/linear_format.h"
#include "gemm/cpu/packed_weights.h"
#include "gemm/gemm.h"
#include "gemm/ref.h"

namespace nibble::testing {

enum class ScaleKind { ordinary, negative, subnormal, mixed };

/// Weights of (k, n): random codes and zero points, or all at an extreme.
struct WeightSpec {
  int64_t k = 0, n = 0, group_size = 0;
  Dtype scale_dtype = Dtype::f16;
  ScaleKind scales = ScaleKind::ordinary;
  int fixed_code = -1, fixed_zero = -1;  // 0..15 for all, or random
  bool bias = false;
};

struct TestWeight {
  AwqTensors tensors;
  std::vector<float> bias;
  ref::Weights reference;
  PackedWeights packed;

  const float* bias_or_null() const { return bias.empty() ? nullptr : bias.data(); }
};

TestWeight make_weight(const WeightSpec& spec, std::mt19937& random);

/// Names of the kernels of `mode` that this CPU runs. The ones it lacks are printed, once a
/// process.
std::vector<std::string> runnable_kernels(Mode mode);

/// Activation codes over the whole range of the mode: -128..127, or -15..15 for w4a4.
std::vector<int8_t> random_codes(Mode mode, int64_t count, std::mt19937& random);

/// Runs `kernel` on quantized input and checks all partial sums and, bit for bit, all outputs.
/// Returns false, with an explanation in `why`, at the first difference.
bool kernel_equals_oracle(const std::string& kernel, const Problem& problem,
                          const TestWeight& weight, const std::vector<int8_t>& codes,
                          const std::vector<float>& scales, std::string* why);

/// kernel_equals_oracle on random codes and scales; a gtest assertion.
void expect_kernel_equals_oracle(const std::string& kernel, Problem problem,
                                 const TestWeight& weight, std::mt19937& random);

/// Runs a plan with a workspace of its own.
Status run(const Plan& plan, const GemmInput& input, std::span<const GemmTarget> targets);

}  // namespace nibble::testing
