// From a checkpoint's linears to the packed weights of one layer on the CPU.
#include <fmt/format.h>

#include "format/message.h"
#include "gemm/cpu/packed_weights.h"
#include "model/layer.h"

namespace nibble {
namespace {

/// Packed weights as a field of a Linear, or why there are none, with the name in front.
template <class Weights>
Result<Linear> make_linear(const LinearSource& source, Result<Weights> packed,
                           std::unique_ptr<Weights> Linear::*field) {
  if (!packed.ok()) {
    return Status(packed.status().code(),
                  fmt::format("{}: {}", quote_name(source.name), packed.status().message()));
  }
  Linear linear;
  linear.name = source.name;
  linear.k = source.k;
  linear.n = source.n;
  linear.*field = std::make_unique<Weights>(std::move(*packed));
  return linear;
}

Result<Linear> pack_linear(const LinearSource& s, int threads) {
  if (s.quantized) {
    return make_linear(s, pack_weights(*s.quantized, s.bias, s.bias_dtype, threads),
                       &Linear::quantized);
  }
  return make_linear(s, pack_dense(s.n, s.k, s.dense, s.dense_dtype, s.bias, s.bias_dtype, threads),
                     &Linear::dense);
}

}  // namespace

Result<Linear> load_linear(const Checkpoint& checkpoint, const std::string& name, int64_t k,
                           int64_t n, bool bias_required, const LoadOptions& options) {
  const Result<LinearSource> source = find_linear(checkpoint, name, k, n, bias_required);
  if (!source.ok()) return source.status();
  Result<Linear> linear = pack_linear(*source, options.threads);
  if (linear.ok() && options.drop_source_pages) drop_pages(checkpoint, name);
  return linear;
}

Result<LayerWeights> load_layer(const Checkpoint& checkpoint, const ModelNames& names,
                                const ModelConfig& config, int64_t index,
                                const LoadOptions& options) {
  Result<LayerSource> source = find_layer(checkpoint, names, config, index);
  if (!source.ok()) return source.status();
  LayerWeights layer;
  for (int slot = 0; slot < kSlots; ++slot) {
    for (const LinearSource& linear : source->groups[slot]) {
      Result<Linear> packed = pack_linear(linear, options.threads);
      if (!packed.ok()) return packed.status();
      layer.groups[slot].linears.push_back(std::move(*packed));
      if (options.drop_source_pages) drop_pages(checkpoint, linear.name);
    }
  }
  layer.norms = std::move(source->norms);
  return layer;
}

}  // namespace nibble
