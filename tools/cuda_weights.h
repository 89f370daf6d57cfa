// Weights to time products with on a GPU: random, and more copies than L2 holds.
#pragma once

#include <vector>

#include "gemm/cuda/gemm_cuda.h"
#include "synthetic.h"

namespace nibble::cli {

inline constexpr int64_t kColdBytes = int64_t{260} << 20;  // L2 of an H200: 60 MB

/// Copies of one random weight, as many as it takes to be cold.
struct ColdWeights {
  AwqTensors tensors;
  std::vector<cuda::DeviceWeights> copies;
};

/// (k, n) in groups of group_size, scales of f16; the same for the same shape.
Result<ColdWeights> make_cold_weights(const cuda::DeviceInfo& device, int64_t n, int64_t k,
                                      int64_t group_size);

}  // namespace nibble::cli
