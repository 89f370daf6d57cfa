// What Nibble is compared with: dequantize the AWQ weight to a full 16- or 32-bit matrix, then call
// a good BLAS matmul. Both steps are threaded and vectorized; the best of the available libraries
// counts. Not part of the library: nothing in src/ knows it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
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
  /// Drops the weight in file layout from the caches: what dequantize() reads.
  void flush_weight() const;
  /// Drops the full matrix from the caches: what multiply() alone reads.
  void flush_matrix() const;

 protected:
  Baseline(const AwqTensors& weight, AlignedBuffer full)
      : weight_(weight), full_(std::move(full)) {}
  const AwqTensors& weight_;
  AlignedBuffer full_;  // (k, n) row-major
};

/// All that this build and CPU have; std::bad_alloc if a full matrix does not fit. `weight` and `x`
/// (m, k) must outlive them. Empty if the build found neither OpenBLAS nor oneDNN.
std::vector<std::unique_ptr<Baseline>> make_baselines(const AwqTensors& weight, const float* x,
                                                      int64_t m, int threads);

}  // namespace nibble
