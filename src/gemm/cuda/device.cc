// Devices as plans see them, and the errors of the CUDA runtime.
#include <fmt/format.h>

#include <map>
#include <mutex>

#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

Code code_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return Code::ok;
    case cudaErrorMemoryAllocation: return Code::out_of_memory;
    case cudaErrorInvalidDevice:
    case cudaErrorInvalidValue: return Code::invalid_argument;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice: return Code::unsupported;
    default: return Code::io_error;
  }
}

/// One attribute, 0 if the driver does not know it.
int64_t attribute(cudaDeviceAttr name, int ordinal) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, ordinal) == cudaSuccess ? value : 0;
}

Result<DeviceInfo> ask_device(int ordinal) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, ordinal);
      error != cudaSuccess) {
    return to_status(error, fmt::format("CUDA device {}", ordinal).c_str());
  }
  DeviceInfo info;
  info.ordinal = ordinal;
  info.name = properties.name;
  info.capability = 10 * properties.major + properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.l2_bytes = properties.l2CacheSize;
  info.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  info.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  return info;
}

}  // namespace

Status to_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return Status(code_of(error), fmt::format("{}: {} ({})", what, cudaGetErrorString(error),
                                            cudaGetErrorName(error)));
}

CurrentDevice::CurrentDevice(int device) {
  int current = 0;
  status_ = to_status(cudaGetDevice(&current), "cudaGetDevice");
  if (!status_.ok() || current == device) return;
  status_ = to_status(cudaSetDevice(device), "cudaSetDevice");
  if (status_.ok()) before_ = current;
}

CurrentDevice::~CurrentDevice() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

Result<int> device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  (void)cudaGetLastError();  // is not the business of the next call
  // Whatever the reason, nothing can run here.
  return Status(Code::unsupported, to_status(error, "no CUDA device").message());
}

Result<DeviceInfo> device_info(int ordinal) {
  const Result<int> count = device_count();
  if (!count.ok()) return count.status();
  if (ordinal < 0 || ordinal >= *count) {
    return Status(Code::invalid_argument,
                  fmt::format("CUDA device {}: there are {}, from 0", ordinal, *count));
  }
  // Asking takes longer than planning, and the answer never changes.
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(ordinal); found != known.end()) return found->second;
  Result<DeviceInfo> info = ask_device(ordinal);
  if (info.ok()) known[ordinal] = *info;
  return info;
}

}  // namespace nibble::cuda
