// DeviceWeights: uploads the tensors of a checkpoint and packs them on the device.
#include <fmt/format.h>

#include <utility>
#include <vector>

#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/limits.h"
#include "gemm/cuda/runtime.h"
#include "gemm/cuda/weight_block.h"

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
  void* release() { return std::exchange(data_, nullptr); }

 private:
  void* data_ = nullptr;
};

Status pack_slabs(const QuantMatrix& matrix, const PackedLayout& layout, const DeviceInfo& device,
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

Status copy_bias(const void* bias, Dtype dtype, int64_t n, void* to) {
  std::vector<float> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[i] = load_as_float(bias, i, dtype);
  return to_status(
      cudaMemcpy(to, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice),
      "cudaMemcpy");
}

Status check_matrix(const QuantMatrix& matrix) {
  NIBBLE_TRY(check_quant_matrix(matrix, "weight"));
  if (matrix.n % 8 != 0) {
    return Status(Code::unsupported, fmt::format("N = {} is not a multiple of 8", matrix.n));
  }
  return check_group_size(matrix.group_size, matrix.k);
}

WeightBlock block_of(const QuantMatrix& matrix, bool has_bias) {
  return weight_block(packed_layout(matrix.n, matrix.k, matrix.group_size),
                      matrix.scale_dtype == Dtype::bf16, has_bias);
}

Status check_alignment(const void* memory) {
  if (reinterpret_cast<uintptr_t>(memory) % kBlockLine == 0) return {};
  return Status(Code::invalid_argument, fmt::format("packed is not {}-byte aligned", kBlockLine));
}

}  // namespace

Status DeviceWeights::pack(const DeviceInfo& device, const QuantMatrix& matrix, const void* bias,
                           Dtype bias_dtype, void* memory, size_t bytes) {
  NIBBLE_TRY(check_matrix(matrix));
  NIBBLE_TRY(check_alignment(memory));
  const WeightBlock block = block_of(matrix, bias != nullptr);
  if (bytes != block.bytes) {
    return Status(Code::invalid_argument,
                  fmt::format("packed has {} bytes, expected {}", bytes, block.bytes));
  }
  const CurrentDevice current(device.ordinal);
  NIBBLE_TRY(current.status());
  const PackedLayout layout = packed_layout(matrix.n, matrix.k, matrix.group_size);
  auto* to = static_cast<uint8_t*>(memory);
  if (matrix.layout == WeightLayout::awq_gemm) {
    NIBBLE_TRY(pack_slabs(matrix, layout, device, to));
  } else {
    const AwqTensors tensors = to_awq_gemm(matrix);
    NIBBLE_TRY(pack_slabs(tensors.view(), layout, device, to));
  }
  return bias == nullptr ? Status{} : copy_bias(bias, bias_dtype, matrix.n, to + block.bias_offset);
}

Result<DeviceWeights> DeviceWeights::view(const Problem& problem, int device, const void* memory,
                                          size_t bytes) {
  NIBBLE_TRY(check_alignment(memory));
  DeviceWeights weights;
  weights.layout_ = packed_layout(problem.n, problem.k, problem.group_size);
  for (const bool bf16_scales : {false, true}) {
    for (const bool has_bias : {false, true}) {
      const WeightBlock block = weight_block(weights.layout_, bf16_scales, has_bias);
      if (bytes != block.bytes) continue;
      weights.slabs_ = static_cast<const uint8_t*>(memory);
      if (has_bias) {
        weights.bias_ = reinterpret_cast<const float*>(weights.slabs_ + block.bias_offset);
      }
      weights.bf16_scales_ = bf16_scales;
      weights.device_ = device;
      return weights;
    }
  }
  return Status(Code::invalid_argument,
                fmt::format("packed has {} bytes: no CUDA weight of N={} K={} and group size {}",
                            bytes, problem.n, problem.k, problem.group_size));
}

Result<DeviceWeights> DeviceWeights::create(const DeviceInfo& device, const QuantMatrix& matrix,
                                            const void* bias, Dtype bias_dtype) {
  NIBBLE_TRY(check_matrix(matrix));
  const CurrentDevice current(device.ordinal);
  NIBBLE_TRY(current.status());
  const WeightBlock block = block_of(matrix, bias != nullptr);
  DeviceBuffer memory;
  NIBBLE_TRY(memory.allocate(block.bytes, device));
  NIBBLE_TRY(pack(device, matrix, bias, bias_dtype, memory.as<void>(), block.bytes));
  Problem problem;
  problem.n = matrix.n;
  problem.k = matrix.k;
  problem.group_size = matrix.group_size;
  Result<DeviceWeights> weights = view(problem, device.ordinal, memory.as<void>(), block.bytes);
  if (weights.ok()) weights->owned_ = memory.release();
  return weights;
}

DeviceWeights& DeviceWeights::operator=(DeviceWeights&& other) noexcept {
  std::swap(layout_, other.layout_);
  std::swap(slabs_, other.slabs_);
  std::swap(bias_, other.bias_);
  std::swap(owned_, other.owned_);
  std::swap(bf16_scales_, other.bf16_scales_);
  std::swap(device_, other.device_);
  return *this;
}

DeviceWeights::~DeviceWeights() {
  if (owned_ != nullptr) (void)cudaFree(owned_);  // whichever device is current
}

int64_t DeviceWeights::bytes() const {
  const int64_t bias_bytes = bias_ == nullptr ? 0 : layout_.n * static_cast<int64_t>(sizeof(float));
  return slabs_ == nullptr ? 0 : layout_.bytes() + bias_bytes;
}

}  // namespace nibble::cuda
