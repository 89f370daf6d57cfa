// See device_buffer.h.
#include "gemm/cuda/device_buffer.h"

#include <fmt/format.h>

#include "gemm/cuda/runtime.h"

namespace nibble::cuda {

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) (void)cudaFree(data_);
}

Status DeviceBuffer::allocate(size_t bytes, const DeviceInfo& device) {
  *this = DeviceBuffer();
  if (bytes == 0) return {};
  const cudaError_t error = cudaMalloc(&data_, bytes);
  if (error == cudaSuccess) bytes_ = bytes;
  if (error != cudaErrorMemoryAllocation) return to_status(error, "cudaMalloc");
  (void)cudaGetLastError();
  size_t free = 0, total = 0;
  (void)cudaMemGetInfo(&free, &total);
  return Status(Code::out_of_memory,
                fmt::format("{}: {} bytes of device memory are wanted, {} of {} are free",
                            device.name, bytes, free, total));
}

Status DeviceBuffer::allocate_zeroed(size_t bytes, const DeviceInfo& device) {
  NIBBLE_TRY(allocate(bytes, device));
  if (bytes == 0) return {};
  NIBBLE_TRY(to_status(cudaMemset(data_, 0, bytes), "cudaMemset"));
  return to_status(cudaStreamSynchronize(nullptr), "cudaMemset");
}

Status DeviceBuffer::upload(const void* from, size_t bytes, const DeviceInfo& device) {
  NIBBLE_TRY(allocate(bytes, device));
  if (bytes == 0) return {};
  return to_status(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}

}  // namespace nibble::cuda
