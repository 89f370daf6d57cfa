// What Nibble is compared with: dequantize the AWQ weight to a full 16- or 32-bit matrix, then call
// a good BLAS matmul. Both steps are threaded and vectorized; the best of the available libraries
// counts. Not part of the library: nothing in src/ knows it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "format/linear_format.h"

namespace nibble {

class Baseline {
 public:
  virtual ~Baseline() = default;
  virtual const char* name() const = 0;  // "openblas-f32", "onednn-f32", "onednn-bf16"
  /// Unpacks the weight given at construction into the full matrix.
  virtual void dequantize() = 0;
  /// y = x * W with the x given at construction; dequantize() first.
  virtual void multiply() = 0;
  /// y (m, n), of the last multiply().
  virtual std::vector<float> result() const = 0;
  /// Pushes the product's inputs out of the caches: the full matrix is an intermediate, so that is
  /// left to dequantize(); this flushes the weight in file layout.
  void flush_weight() const;

 protected:
  explicit Baseline(const AwqTensors& weight) : weight_(weight) {}
  const AwqTensors& weight_;
};

/// All that this build and CPU have. `weight` and `x` (m, k) must outlive them. Empty if the build
/// found neither OpenBLAS nor oneDNN.
std::vector<std::unique_ptr<Baseline>> make_baselines(const AwqTensors& weight, const float* x,
                                                      int64_t m, int threads);

}  // namespace nibble
