// DeviceWeights: uploads the tensors of a checkpoint and packs them on the device.
#include <fmt/format.h>

#include <utility>
#include <vector>

#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/limits.h"
#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

/// Device memory that is freed with its owner, unless released.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer() {
    if (data_ != nullptr) (void)cudaFree(data_);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  Status allocate(size_t bytes, const DeviceInfo& device) {
    const cudaError_t error = cudaMalloc(&data_, bytes);
    if (error != cudaErrorMemoryAllocation) return to_status(error, "cudaMalloc");
    (void)cudaGetLastError();
    size_t free = 0, total = 0;
    (void)cudaMemGetInfo(&free, &total);
    return Status(Code::out_of_memory,
                  fmt::format("{}: {} bytes of device memory are wanted, {} of {} are free",
                              device.name, bytes, free, total));
  }

  /// allocate() and a copy of host memory.
  Status upload(const void* from, size_t bytes, const DeviceInfo& device) {
    NIBBLE_TRY(allocate(bytes, device));
    return to_status(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  template <class T>
  T* release() {
    return static_cast<T*>(std::exchange(data_, nullptr));
  }

 private:
  void* data_ = nullptr;
};

Status pack(const QuantMatrix& matrix, const PackedLayout& layout, const DeviceInfo& device,
            uint8_t* slabs) {
  const auto words = static_cast<size_t>(matrix.n / 8) * sizeof(uint32_t);  // of a row
  const auto groups = static_cast<size_t>(matrix.groups());
  DeviceBuffer q, zeros, scales;
  NIBBLE_TRY(q.upload(matrix.q, static_cast<size_t>(matrix.k) * words, device));
  if (matrix.zeros != nullptr) NIBBLE_TRY(zeros.upload(matrix.zeros, groups * words, device));
  NIBBLE_TRY(scales.upload(matrix.scales, groups * static_cast<size_t>(matrix.n) * 2, device));
  const PackArgs args{.q = q.as<uint32_t>(),
                      .zeros = zeros.as<uint32_t>(),
                      .scales = scales.as<uint16_t>(),
                      .layout = layout,
                      .slabs = slabs};
  NIBBLE_TRY(to_status(launch_pack(args, nullptr), "packing weights"));
  return to_status(cudaStreamSynchronize(nullptr), "packing weights");
}

Status upload_bias(const void* bias, Dtype dtype, int64_t n, const DeviceInfo& device,
                   DeviceBuffer& to) {
  std::vector<float> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[i] = load_as_float(bias, i, dtype);
  return to.upload(values.data(), values.size() * sizeof(float), device);
}

}  // namespace

Result<DeviceWeights> DeviceWeights::create(const DeviceInfo& device, const QuantMatrix& matrix,
                                            const void* bias, Dtype bias_dtype) {
  NIBBLE_TRY(check_quant_matrix(matrix, "weight"));
  if (matrix.n % 8 != 0) {
    return Status(Code::unsupported, fmt::format("N = {} is not a multiple of 8", matrix.n));
  }
  NIBBLE_TRY(check_group_size(matrix.group_size, matrix.k));
  const CurrentDevice current(device.ordinal);
  NIBBLE_TRY(current.status());
  DeviceWeights weights;
  weights.layout_ = packed_layout(matrix.n, matrix.k, matrix.group_size);
  weights.bf16_scales_ = matrix.scale_dtype == Dtype::bf16;
  weights.device_ = device.ordinal;
  DeviceBuffer slabs, bias_values;
  NIBBLE_TRY(slabs.allocate(static_cast<size_t>(weights.layout_.bytes()), device));
  if (matrix.layout == WeightLayout::awq_gemm) {
    NIBBLE_TRY(pack(matrix, weights.layout_, device, slabs.as<uint8_t>()));
  } else {
    const AwqTensors tensors = to_awq_gemm(matrix);
    NIBBLE_TRY(pack(tensors.view(), weights.layout_, device, slabs.as<uint8_t>()));
  }
  if (bias != nullptr) NIBBLE_TRY(upload_bias(bias, bias_dtype, matrix.n, device, bias_values));
  weights.slabs_ = slabs.release<uint8_t>();
  weights.bias_ = bias_values.release<float>();
  return weights;
}

DeviceWeights& DeviceWeights::operator=(DeviceWeights&& other) noexcept {
  std::swap(layout_, other.layout_);
  std::swap(slabs_, other.slabs_);
  std::swap(bias_, other.bias_);
  std::swap(bf16_scales_, other.bf16_scales_);
  std::swap(device_, other.device_);
  return *this;
}

DeviceWeights::~DeviceWeights() {
  // whichever device is current: addresses are unique
  if (slabs_ != nullptr) (void)cudaFree(slabs_);
  if (bias_ != nullptr) (void)cudaFree(bias_);
}

int64_t DeviceWeights::bytes() const {
  const int64_t bias_bytes = bias_ == nullptr ? 0 : layout_.n * static_cast<int64_t>(sizeof(float));
  return slabs_ == nullptr ? 0 : layout_.bytes() + bias_bytes;
}

}  // namespace nibble::cuda
