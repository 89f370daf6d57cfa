// DeviceWeights: uploads the tensors of a checkpoint and packs them on the device.
#include <fmt/format.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "gemm/cuda/device_buffer.h"
#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/limits.h"
#include "gemm/cuda/runtime.h"
#include "gemm/cuda/ss_image.h"
#include "gemm/cuda/weight_block.h"

namespace nibble::cuda {
namespace {

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

/// The parts as one matrix, but for its tensors.
QuantMatrix joined(std::span<const WeightPart> parts) {
  QuantMatrix matrix = parts.front().matrix;
  matrix.n = 0;
  for (const WeightPart& part : parts) matrix.n += part.matrix.n;
  return matrix;
}

WeightBlock block_of(std::span<const WeightPart> parts) {
  const QuantMatrix matrix = joined(parts);
  const bool has_bias = std::any_of(parts.begin(), parts.end(),
                                    [](const WeightPart& part) { return part.bias != nullptr; });
  return weight_block(packed_layout(matrix.n, matrix.k, matrix.group_size),
                      matrix.scale_dtype == Dtype::bf16, has_bias);
}

Status check_alignment(const void* memory) {
  if (reinterpret_cast<uintptr_t>(memory) % kBlockLine == 0) return {};
  return Status(Code::invalid_argument, fmt::format("packed is not {}-byte aligned", kBlockLine));
}

/// Parts that have been checked to memory of block_of(parts).bytes on the current device.
Status pack_parts(const DeviceInfo& device, std::span<const WeightPart> parts, void* memory) {
  // Tiles of columns follow each other, so weights side by side are one behind the other.
  auto* to = static_cast<uint8_t*>(memory);
  for (const WeightPart& part : parts) {
    const QuantMatrix& matrix = part.matrix;
    const PackedLayout layout = packed_layout(matrix.n, matrix.k, matrix.group_size);
    if (matrix.layout == WeightLayout::awq_gemm) {
      NIBBLE_TRY(pack_slabs(matrix, layout, device, to));
    } else {
      const AwqTensors tensors = to_awq_gemm(matrix);
      NIBBLE_TRY(pack_slabs(tensors.view(), layout, device, to));
    }
    to += layout.bytes();
  }
  const std::vector<float> biases = join_biases(parts, joined(parts).n);
  if (biases.empty()) return {};
  return to_status(cudaMemcpy(static_cast<uint8_t*>(memory) + block_of(parts).bias_offset,
                              biases.data(), biases.size() * sizeof(float), cudaMemcpyHostToDevice),
                   "cudaMemcpy");
}

}  // namespace

Status DeviceWeights::pack(const DeviceInfo& device, const QuantMatrix& matrix, const void* bias,
                           Dtype bias_dtype, void* memory, size_t bytes) {
  const WeightPart part{matrix, bias, bias_dtype};
  NIBBLE_TRY(check_parts({&part, 1}));
  NIBBLE_TRY(check_alignment(memory));
  const WeightBlock block = block_of({&part, 1});
  if (bytes != block.bytes) {
    return Status(Code::invalid_argument,
                  fmt::format("packed has {} bytes, expected {}", bytes, block.bytes));
  }
  const CurrentDevice current(device.ordinal);
  NIBBLE_TRY(current.status());
  return pack_parts(device, {&part, 1}, memory);
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
  const WeightPart part{matrix, bias, bias_dtype};
  return create(device, {&part, 1});
}

Result<DeviceWeights> DeviceWeights::create(const DeviceInfo& device,
                                            std::span<const WeightPart> parts) {
  NIBBLE_TRY(check_parts(parts));
  const CurrentDevice current(device.ordinal);
  NIBBLE_TRY(current.status());
  const WeightBlock block = block_of(parts);
  DeviceBuffer memory;
  NIBBLE_TRY(memory.allocate(block.bytes, device));
  NIBBLE_TRY(pack_parts(device, parts, memory.as<>()));
  const QuantMatrix matrix = joined(parts);
  Problem problem;
  problem.n = matrix.n;
  problem.k = matrix.k;
  problem.group_size = matrix.group_size;
  Result<DeviceWeights> weights = view(problem, device.ordinal, memory.as<>(), block.bytes);
  if (weights.ok()) weights->owned_ = memory.release<void>();
  return weights;
}

DeviceWeights& DeviceWeights::operator=(DeviceWeights&& other) noexcept {
  std::swap(layout_, other.layout_);
  std::swap(slabs_, other.slabs_);
  std::swap(bias_, other.bias_);
  std::swap(owned_, other.owned_);
  std::swap(image_, other.image_);
  std::swap(image_e4m3_, other.image_e4m3_);
  std::swap(bf16_scales_, other.bf16_scales_);
  std::swap(device_, other.device_);
  return *this;
}

DeviceWeights::~DeviceWeights() {
  // whichever device is current
  if (owned_ != nullptr) (void)cudaFree(owned_);
  if (image_ != nullptr) (void)cudaFree(image_);
}

Status DeviceWeights::expand(const DeviceInfo& device, bool e4m3) {
  if (layout_.promoted != kBlockDepth) {
    return Status(Code::unsupported,
                  fmt::format("group size {}: weights are expanded in groups of at least {}",
                              layout_.group_size, kBlockDepth));
  }
  const CurrentDevice current(device.ordinal);
  NIBBLE_TRY(current.status());
  if (image_ != nullptr) (void)cudaFree(std::exchange(image_, nullptr));
  DeviceBuffer image;
  NIBBLE_TRY(image.allocate(kKeptImage.bytes(layout_), device));
  GemmArgs args;
  args.slabs = slabs_;
  args.layout = layout_;
  args.bf16_scales = bf16_scales_;
  NIBBLE_TRY(to_status(launch_expand_weights(args, e4m3, image.as<uint8_t>(), nullptr),
                       "expanding weights"));
  NIBBLE_TRY(to_status(cudaStreamSynchronize(nullptr), "expanding weights"));
  image_ = image.release<void>();
  image_e4m3_ = e4m3;
  return {};
}

int64_t DeviceWeights::bytes() const {
  const int64_t bias_bytes = bias_ == nullptr ? 0 : layout_.n * static_cast<int64_t>(sizeof(float));
  return slabs_ == nullptr ? 0 : layout_.bytes() + bias_bytes;
}

}  // namespace nibble::cuda
