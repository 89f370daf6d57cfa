// Products with 16-bit weights by cuBLAS, which is opened at run time: what is not quantized, and
// what the 4-bit kernels are compared with. No header of cuBLAS is needed to build.
#pragma once

#include <memory>
#include <string>

#include "base/status.h"
#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cuda {

class Cublas {
 public:
  /// For the current device. `path`: of libcublas; empty: the usual names. unsupported, with the
  /// loader's words, if there is none. Allocates its workspace; waits.
  static Result<std::unique_ptr<Cublas>> open(const DeviceInfo& device,
                                              const std::string& path = "");
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  /// f16, bf16: y of the same type, with float sums; int8: y of int32.
  enum class Type { f16, bf16, int8 };

  /// y (m, n) = x (m, k) * w (n, k) transposed, row-major; rows of y y_stride elements apart.
  /// io_error, with the numbers, if cuBLAS refuses the shape. May be captured into a graph.
  Status multiply(Type type, const void* x, const void* w, void* y, int64_t y_stride, int64_t m,
                  int64_t n, int64_t k, Stream stream);

 private:
  struct State;
  explicit Cublas(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace nibble::cuda
