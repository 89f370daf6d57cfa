// See weights.h.
#include "model/cuda/weights.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/half.h"
#include "base/thread_pool.h"
#include "format/message.h"

namespace nibble::cuda {
namespace {

Status named(const LinearSource& linear, const Status& status) {
  return Status(status.code(), fmt::format("{}: {}", quote_name(linear.name), status.message()));
}

/// Whether `next` can lie behind `linear` in one product.
bool can_join(const LinearSource& linear, const LinearSource& next) {
  if (linear.n % kSlabColumns != 0 || linear.k != next.k) return false;
  if (linear.quantized && next.quantized) {
    return linear.quantized->group_size == next.quantized->group_size &&
           linear.quantized->scale_dtype == next.quantized->scale_dtype;
  }
  return !linear.quantized && !next.quantized && linear.dense_dtype == next.dense_dtype;
}

Status upload_quantized(const DeviceInfo& device, std::span<const LinearSource> linears,
                        DeviceLinear& to) {
  std::vector<WeightPart> parts;
  for (const LinearSource& linear : linears) {
    parts.push_back({*linear.quantized, linear.bias, linear.bias_dtype});
  }
  Result<DeviceWeights> weights = DeviceWeights::create(device, parts);
  if (!weights.ok()) return weights.status();
  to.quantized = true;
  to.weights = std::move(*weights);
  return {};
}

/// (n, k) of bf16.
std::vector<std::byte> dequantized_rows(const QuantMatrix& matrix, int threads) {
  constexpr int64_t kColumns = 16;
  std::vector<std::byte> rows(static_cast<size_t>(matrix.n * matrix.k * 2));
  auto* to = reinterpret_cast<uint16_t*>(rows.data());
  parallel_for(threads, (matrix.n + kColumns - 1) / kColumns, [&](int64_t block) {
    const int64_t n0 = block * kColumns, count = std::min(kColumns, matrix.n - n0);
    std::vector<float> values(static_cast<size_t>(matrix.k * count));
    dequantize(matrix, n0, count, values.data());
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t k = 0; k < matrix.k; ++k) {
        to[(n0 + n) * matrix.k + k] = bf16_from_float(values[static_cast<size_t>(k * count + n)]);
      }
    }
  });
  return rows;
}

Status upload_dense(const DeviceInfo& device, std::span<const LinearSource> linears, int threads,
                    DeviceLinear& to) {
  if (!linears.front().quantized && linears.front().dense_dtype == Dtype::f32) {
    return Status(Code::unsupported, "F32 weights do not run on a GPU: 16-bit ones do");
  }
  to.dense_type = linears.front().quantized ? Dtype::bf16 : linears.front().dense_dtype;
  std::vector<std::byte> rows;
  std::vector<float> bias;
  int64_t column = 0;
  for (const LinearSource& linear : linears) {
    if (linear.quantized) {
      const std::vector<std::byte> part = dequantized_rows(*linear.quantized, threads);
      rows.insert(rows.end(), part.begin(), part.end());
    } else {
      rows.insert(rows.end(), linear.dense,
                  linear.dense + linear.n * linear.k * dtype_bytes(linear.dense_dtype));
    }
    if (linear.bias != nullptr) bias.resize(static_cast<size_t>(to.n));
    for (int64_t i = 0; linear.bias != nullptr && i < linear.n; ++i) {
      bias[static_cast<size_t>(column + i)] = load_as_float(linear.bias, i, linear.bias_dtype);
    }
    column += linear.n;
  }
  NIBBLE_TRY(to.dense.upload(rows.data(), rows.size(), device));
  return to.bias.upload(bias.data(), bias.size() * sizeof(float), device);
}

}  // namespace

uint64_t DeviceLinear::bytes() const {
  return static_cast<uint64_t>(weights.bytes()) + dense.bytes() + bias.bytes();
}

int64_t DeviceGroup::n() const {
  int64_t n = 0;
  for (const DeviceLinear& part : parts) n += part.n;
  return n;
}

Result<DeviceGroup> upload_group(const DeviceInfo& device, std::span<const LinearSource> linears,
                                 WeightForm form, int threads) {
  DeviceGroup group;
  for (size_t first = 0; first < linears.size();) {
    size_t last = first + 1;
    while (last < linears.size() && can_join(linears[last - 1], linears[last])) ++last;
    const auto part = linears.subspan(first, last - first);
    DeviceLinear linear;
    linear.name = part.front().name;
    linear.k = part.front().k;
    for (const LinearSource& source : part) linear.n += source.n;
    const bool packed = part.front().quantized && form == WeightForm::as_stored;
    const Status status = packed ? upload_quantized(device, part, linear)
                                 : upload_dense(device, part, threads, linear);
    if (!status.ok()) return named(part.front(), status);
    group.parts.push_back(std::move(linear));
    first = last;
  }
  return group;
}

Result<DeviceBuffer> upload_floats(const DeviceInfo& device, const std::vector<float>& values) {
  DeviceBuffer buffer;
  NIBBLE_TRY(buffer.upload(values.data(), values.size() * sizeof(float), device));
  return buffer;
}

Result<DeviceLayer> upload_layer(const DeviceInfo& device, const LayerSource& source,
                                 WeightForm form, int threads) {
  DeviceLayer layer;
  for (int slot = 0; slot < kSlots; ++slot) {
    Result<DeviceGroup> group = upload_group(device, source.groups[slot], form, threads);
    if (!group.ok()) return group.status();
    layer.groups[slot] = std::move(*group);
  }
  const LayerNorms& from = source.norms;
  DeviceNorms& to = layer.norms;
  const std::pair<DeviceBuffer*, const std::vector<float>*> norms[] = {
      {&to.input, &from.input},
      {&to.mlp, &from.mlp},
      {&to.post_attention, &from.post_attention},
      {&to.post_mlp, &from.post_mlp},
      {&to.q, &from.q},
      {&to.k, &from.k}};
  for (const auto& [buffer, values] : norms) {
    Result<DeviceBuffer> uploaded = upload_floats(device, *values);
    if (!uploaded.ok()) return uploaded.status();
    *buffer = std::move(*uploaded);
  }
  return layer;
}

}  // namespace nibble::cuda
