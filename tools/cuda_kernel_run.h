// One plan with all that it needs on a GPU, ready to be launched and checked: what `bench gemm
// --device cuda` times.
#pragma once

#include <string>
#include <vector>

#include "cuda_bench.h"
#include "gemm/cuda/gemm_cuda.h"
#include "gemm/ref.h"

namespace nibble::cli {

/// Some columns of a weight, on which results are compared with the oracle: 8 from each of up to 16
/// places.
struct SampledColumns {
  std::vector<int64_t> columns;
  AwqTensors tensors;
  ref::Weights weights;  // the same, unpacked
};
SampledColumns sample_columns(const AwqTensors& all);

/// x is random, the same for the same m and k; y and the workspace are its own.
struct CudaKernelRun {
  cuda::Plan plan;
  DeviceMemory x, y, workspace;

  explicit CudaKernelRun(const cuda::Plan& plan);
  /// Quantizing and the product, or (of a mode that quantizes) the product alone, of what was
  /// quantized last.
  Status whole(const cuda::DeviceWeights& weights, cudaStream_t stream) const;
  Status product(const cuda::DeviceWeights& weights, cudaStream_t stream) const;
  /// Runs it once (a product that whole() does not run by itself, too) and compares up to four
  /// rows. Empty, or how one differs from the oracle by more than rounding can do. product() has
  /// something to multiply then.
  Result<std::string> check(const cuda::DeviceWeights& weights, const SampledColumns& sample) const;
  /// x as floats, (m, k).
  std::vector<float> input() const;

 private:
  std::string compare(const SampledColumns& sample) const;
};

void check_status(const Status& status);  // throws

}  // namespace nibble::cli
