// Device memory that is freed with its owner, unless released.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "base/status.h"
#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cuda {

class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = static_cast<DeviceBuffer&&>(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer();

  /// Memory of the current device, which is `device`; what was there before is freed first.
  /// out_of_memory says how much was wanted and how much is free.
  Status allocate(size_t bytes, const DeviceInfo& device);
  /// allocate() and zeros.
  Status allocate_zeroed(size_t bytes, const DeviceInfo& device);
  /// allocate() and a copy of host memory; waits for it.
  Status upload(const void* from, size_t bytes, const DeviceInfo& device);

  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* release() {
    bytes_ = 0;
    return static_cast<T*>(std::exchange(data_, nullptr));
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace nibble::cuda
