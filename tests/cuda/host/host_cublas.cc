// gemm/cuda/cublas.h on the device of host_device.h.
#include "gemm/cuda/cublas.h"

#include <cmath>

#include "host_device.h"

namespace nibble::cuda {

struct Cublas::State {};

Cublas::Cublas(std::unique_ptr<State> state) : state_(std::move(state)) {}
Cublas::~Cublas() = default;

Result<std::unique_ptr<Cublas>> Cublas::open(const DeviceInfo&, const std::string&) {
  return std::unique_ptr<Cublas>(new Cublas(std::make_unique<State>()));
}

Status Cublas::multiply(Type type, const void* x, const void* w, void* y, int64_t y_stride,
                        int64_t m, int64_t n, int64_t k, Stream stream) {
  host::enqueue(static_cast<cudaStream_t>(stream), [=] {
    const Element element = type == Type::f16 ? Element::f16 : Element::bf16;
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t column = 0; column < n; ++column) {
        float sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          sum = std::fma(host::load(x, element, row * k + i),
                         host::load(w, element, column * k + i), sum);
        }
        host::store(y, element, row * y_stride + column, sum);
      }
    }
  });
  return {};
}

}  // namespace nibble::cuda
