// A model's weights on a GPU: linears that share an input side by side as one product where that is
// possible, norms, and lm_head.
#pragma once

#include <string>
#include <vector>

#include "gemm/cuda/device_buffer.h"
#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/kernels.h"
#include "model/cuda/runner.h"
#include "model/layer_source.h"

namespace nibble::cuda {

/// One product, of one linear or of several side by side.
struct DeviceLinear {
  std::string name;  // of the first
  int64_t k = 0, n = 0;
  bool quantized = false;
  DeviceWeights weights;  // if quantized
  DeviceBuffer dense;     // if not: (n, k) of dense_type
  Dtype dense_type = Dtype::bf16;
  DeviceBuffer bias;  // of dense ones: (n) float, or nothing

  uint64_t bytes() const;
};

/// The linears of a slot; their outputs lie side by side in this order.
struct DeviceGroup {
  std::vector<DeviceLinear> parts;
  int64_t n() const;
};

struct DeviceNorms {
  DeviceBuffer input, mlp, post_attention, post_mlp, q, k;  // float; empty as in LayerNorms
};

struct DeviceLayer {
  DeviceGroup groups[kSlots];
  DeviceNorms norms;
};

/// Uploads linears that share an input; neighbours that can be one product become one.
/// unsupported: 16-bit weights that are F32; and what DeviceWeights refuses, named.
Result<DeviceGroup> upload_group(const DeviceInfo& device, std::span<const LinearSource> linears,
                                 WeightForm form, int threads);
Result<DeviceLayer> upload_layer(const DeviceInfo& device, const LayerSource& source,
                                 WeightForm form, int threads);

/// Floats in device memory.
Result<DeviceBuffer> upload_floats(const DeviceInfo& device, const std::vector<float>& values);

}  // namespace nibble::cuda
