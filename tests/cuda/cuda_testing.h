// Shared by the tests that run on a GPU: device memory, weights on host and device, and a product
// whose result is compared with the oracle of gemm/ref.h.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <optional>
#include <random>
#include <string>
#include <vector>

#include "gemm/cuda/plan.h"
#include "gemm_testing.h"

namespace nibble::cuda::testing {

using nibble::testing::ScaleKind;
using nibble::testing::TestWeight;
using nibble::testing::WeightSpec;

/// Device 0, or why there is none.
const Result<DeviceInfo>& gpu();

#define NIBBLE_NEEDS_GPU()                  \
  if (!::nibble::cuda::testing::gpu().ok()) \
  GTEST_SKIP() << ::nibble::cuda::testing::gpu().status().message()

void check_cuda(cudaError_t error, const char* what);
#define NIBBLE_CHECK_CUDA(call) ::nibble::cuda::testing::check_cuda((call), #call)

/// Device memory that is freed with its owner, with guard bytes behind it.
class Buffer {
 public:
  explicit Buffer(size_t bytes, int fill = 0xcc);
  template <class T>
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size() * sizeof(T)) {
    upload(values.data());
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {
    bytes_ = other.bytes_;
  }
  ~Buffer();

  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void upload(const void* from);
  void fill(int byte);
  template <class T>
  std::vector<T> download() const {
    std::vector<T> values(bytes_ / sizeof(T));
    copy_to(values.data());
    return values;
  }
  /// The bytes behind the buffer are what they were.
  bool guard_is_intact() const;

 private:
  void copy_to(void* to) const;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

/// A plan and the variations of its kernel that a test wants to force.
struct Variant {
  std::string name;
  Plan plan;
};

/// Every way in which every kernel runs `problem` on the device: the plan of each kernel, for slab
/// also the form of deep K, for rs all tiles, and for rs and ss with and without a split tail.
std::vector<Variant> variants(const Problem& problem);
/// The plans alone, one for each kernel.
std::vector<Variant> kernels(const Problem& problem);

/// Whether results must equal the CPU's, promoted group by promoted group: K is not split.
bool keeps_the_order(const Plan& plan);

/// One weight in both places.
struct GpuWeight {
  TestWeight host;
  DeviceWeights device;
  ref::Weights blocks;  // groups no longer than what is promoted at once, K padded to whole ones
};
GpuWeight make_gpu_weight(const WeightSpec& spec, std::mt19937& random);
/// After host.tensors was changed.
void refresh(GpuWeight& weight);

/// Quantized activations: codes (m, k), scales (m) or (m, groups).
struct Quantized {
  std::vector<int8_t> codes;
  std::vector<float> scales;
};
Quantized random_quantized(const Problem& problem, std::mt19937& random);

/// What y should be: float results in the fixed order, and fp64 ones with a bound on the error.
struct Expected {
  std::vector<float> y;
  std::vector<double> exact, magnitude;  // magnitude: t * sum |S s| + |bias|
  int64_t terms = 0;                     // promoted groups of K
};
Expected expected_of(const Problem& problem, const GpuWeight& weight, const Quantized& input);

/// y (m, n), rows `stride` elements apart: the expected bits where the plan keeps the order, else
/// within the bound of docs/cuda.md. Empty, or what is wrong.
std::string compare(const Plan& plan, const Expected& expected, const std::vector<std::byte>& y,
                    int64_t stride);

/// Runs `plan` on `input`, several times in one workspace; y has rows 8 elements longer than n.
/// Empty, or what is wrong.
std::string run_and_compare(const Plan& plan, const GpuWeight& weight, const Quantized& input,
                            const Expected& expected, int times = 1);

/// Random input through every variant of every kernel; with int8 activations and a scale per token,
/// also through those of w4a16, with x of integers.
void expect_all_variants_right(const Problem& problem, const GpuWeight& weight,
                               std::mt19937& random);

/// Natural position (row-major) of what lies at `index` of a row in the plan's order.
int64_t natural_index(OperandOrder order, int64_t index);

/// An integer code as the plan's operand has it: as it is, or as an e4m3 byte.
int8_t stored_code(const Plan& plan, int8_t code);

/// `input` as `plan` wants it in device memory, zero past K, with the sums.
struct DeviceOperand {
  Buffer codes, scales, sums, range;
  Operand operand() const {
    return {codes.as<int8_t>(), scales.as<float>(), sums.as<int32_t>(), range.as<uint32_t>()};
  }
};
DeviceOperand upload(const Plan& plan, const Quantized& input);

}  // namespace nibble::cuda::testing
