// e4m3 products by cuBLASLt, opened at run time: one of the limits that `bench gemm --device cuda`
// prints beside the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"

namespace nibble::cli {

class CublasFp8 {
 public:
  /// For the current device. `cublas`: the path of libcublas that was asked for, or empty;
  /// cuBLASLt lies beside it. unsupported, with the loader's words, if there is none.
  static Result<std::unique_ptr<CublasFp8>> open(const std::string& cublas);
  ~CublasFp8();
  CublasFp8(const CublasFp8&) = delete;
  CublasFp8& operator=(const CublasFp8&) = delete;

  /// One shape, with the algorithm that cuBLASLt thinks best for it.
  class Product {
   public:
    virtual ~Product() = default;
    /// y (m, n) bf16 = x (m, k) * w (n, k) transposed, row-major e4m3, fast accumulation (sums as
    /// the tensor cores keep them, about 14 bits). May be captured into a graph.
    virtual Status multiply(const void* x, const void* w, void* y, cudaStream_t stream) const = 0;
  };
  /// unsupported if cuBLASLt has no algorithm. Must not outlive this object.
  Result<std::unique_ptr<Product>> plan(int64_t m, int64_t n, int64_t k);

 private:
  struct State;
  explicit CublasFp8(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace nibble::cli
