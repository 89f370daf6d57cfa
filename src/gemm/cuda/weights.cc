// DeviceWeights: uploads the tensors of a checkpoint and packs them on the device.
#include <fmt/format.h>

#include <utility>
#include <vector>

#include "gemm/cuda/device_buffer.h"
#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/limits.h"
#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

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

/// The biases of all parts side by side, zeros where a part has none; empty if none has one.
std::vector<float> join_biases(std::span<const WeightPart> parts, int64_t n) {
  std::vector<float> values;
  int64_t column = 0;
  for (const WeightPart& part : parts) {
    if (part.bias != nullptr) values.resize(static_cast<size_t>(n));
    for (int64_t i = 0; part.bias != nullptr && i < part.matrix.n; ++i) {
      values[static_cast<size_t>(column + i)] = load_as_float(part.bias, i, part.bias_dtype);
    }
    column += part.matrix.n;
  }
  return values;
}

/// What lies side by side in one weight must agree, and begin with a tile of columns.
Status check_parts(std::span<const WeightPart> parts) {
  if (parts.empty()) return Status(Code::invalid_argument, "a weight without parts");
  const QuantMatrix& first = parts.front().matrix;
  for (const WeightPart& part : parts) {
    const QuantMatrix& m = part.matrix;
    NIBBLE_TRY(check_quant_matrix(m, "weight"));
    if (m.n % 8 != 0) {
      return Status(Code::unsupported, fmt::format("N = {} is not a multiple of 8", m.n));
    }
    NIBBLE_TRY(check_group_size(m.group_size, m.k));
    if (m.k != first.k || m.group_size != first.group_size || m.scale_dtype != first.scale_dtype) {
      return Status(Code::invalid_argument,
                    fmt::format("weights with K={} group size {} {} scales and K={} {} {} cannot "
                                "be one",
                                first.k, first.group_size, dtype_name(first.scale_dtype), m.k,
                                m.group_size, dtype_name(m.scale_dtype)));
    }
    if (&part != &parts.back() && m.n % kSlabColumns != 0) {
      return Status(Code::unsupported, fmt::format("N = {} of a weight that others follow is not "
                                                   "a multiple of {}",
                                                   m.n, kSlabColumns));
    }
  }
  return {};
}

}  // namespace

Result<DeviceWeights> DeviceWeights::create(const DeviceInfo& device, const QuantMatrix& matrix,
                                            const void* bias, Dtype bias_dtype) {
  const WeightPart part{matrix, bias, bias_dtype};
  return create(device, {&part, 1});
}

Result<DeviceWeights> DeviceWeights::create(const DeviceInfo& device,
                                            std::span<const WeightPart> parts) {
  NIBBLE_TRY(check_parts(parts));
  const CurrentDevice current(device.ordinal);
  NIBBLE_TRY(current.status());
  const QuantMatrix& first = parts.front().matrix;
  int64_t n = 0;
  for (const WeightPart& part : parts) n += part.matrix.n;
  DeviceWeights weights;
  weights.layout_ = packed_layout(n, first.k, first.group_size);
  weights.bf16_scales_ = first.scale_dtype == Dtype::bf16;
  weights.device_ = device.ordinal;
  DeviceBuffer slabs, bias_values;
  NIBBLE_TRY(slabs.allocate(static_cast<size_t>(weights.layout_.bytes()), device));
  // Tiles of columns follow each other, so weights side by side are one behind the other.
  uint8_t* to = slabs.as<uint8_t>();
  for (const WeightPart& part : parts) {
    const QuantMatrix& matrix = part.matrix;
    const PackedLayout layout = packed_layout(matrix.n, matrix.k, matrix.group_size);
    if (matrix.layout == WeightLayout::awq_gemm) {
      NIBBLE_TRY(pack(matrix, layout, device, to));
    } else {
      const AwqTensors tensors = to_awq_gemm(matrix);
      NIBBLE_TRY(pack(tensors.view(), layout, device, to));
    }
    to += layout.bytes();
  }
  const std::vector<float> biases = join_biases(parts, n);
  if (!biases.empty()) {
    NIBBLE_TRY(bias_values.upload(biases.data(), biases.size() * sizeof(float), device));
  }
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
