#include "awq/fold.h"

#include <algorithm>
#include <cmath>

#include "base/thread_pool.h"

namespace nibble::awq {
namespace {

/// `value` as `dtype` holds it.
float stored(float value, Dtype dtype) {
  unsigned char bytes[4] = {};
  store_from_float(bytes, 0, dtype, value);
  return load_as_float(bytes, 0, dtype);
}

/// norm / scales, rounded to its type; returns by what it was really divided.
std::vector<float> divide_norm(BlockNorm& norm, std::span<const float> scales) {
  // Beyond this the norm's type is too coarse for the channel, e.g. a Gemma weight close to -1.
  constexpr float kLargestDeviation = 0.02f;
  std::vector<float> effective(scales.size(), 1.0f);
  for (size_t i = 0; i < scales.size(); ++i) {
    const float before = norm.weight[i] + norm.offset;
    const float weight = stored(before / scales[i] - norm.offset, norm.dtype);
    const float after = weight + norm.offset;
    const float scale = before / after;
    if (!(std::abs(scale / scales[i] - 1) <= kLargestDeviation)) continue;  // also for NaN
    norm.weight[i] = weight;
    effective[i] = scale;
  }
  return effective;
}

/// Row i of `linear` and its bias, divided by scales[i].
void divide_rows(BlockLinear& linear, std::span<const float> scales, int threads) {
  parallel_for(threads, linear.n, [&](int64_t row) {
    float* const weight = linear.weight.data() + row * linear.k;
    for (int64_t i = 0; i < linear.k; ++i) weight[i] /= scales[static_cast<size_t>(row)];
  });
  for (size_t i = 0; i < linear.bias.size(); ++i) {
    linear.bias[i] = stored(linear.bias[i] / scales[i], linear.bias_dtype);
  }
}

/// Channel of v_proj from which channel `channel` of o_proj's input comes.
int64_t value_channel(const ModelConfig& config, int64_t channel) {
  const int64_t head = channel / config.head_dim;
  return head / config.groups() * config.head_dim + channel % config.head_dim;
}

}  // namespace

bool may_scale(const ModelConfig& config, const Block& block, Slot slot) {
  // llm-compressor found this mapping worse than none on Gemma 3, whose q and k are normed.
  if (slot == Slot::qkv && config.architecture == Architecture::gemma3) return false;
  if (slot == Slot::o && !block.at(Part::v).quantized) return false;
  if (slot == Slot::down && !block.at(Part::up).quantized) return false;
  const auto parts = parts_of(slot);
  return std::all_of(parts.begin(), parts.end(),
                     [&](Part part) { return block.at(part).quantized; });
}

std::vector<int64_t> scale_classes(const ModelConfig& config, Slot slot) {
  std::vector<int64_t> classes;
  if (slot != Slot::o || config.groups() == 1) return classes;
  for (int64_t channel = 0; channel < config.heads * config.head_dim; ++channel) {
    classes.push_back(value_channel(config, channel));
  }
  return classes;
}

std::vector<float> fold_scales(const ModelConfig& config, Block& block, Slot slot,
                               std::span<const float> scales, int threads) {
  std::vector<float> effective(scales.begin(), scales.end());
  switch (slot) {
    case Slot::qkv: effective = divide_norm(block.input_norm, scales); break;
    case Slot::gate_up: effective = divide_norm(block.mlp_norm, scales); break;
    case Slot::down: divide_rows(block.at(Part::up), scales, threads); break;
    case Slot::o: {
      std::vector<float> of_values(static_cast<size_t>(config.kv_heads * config.head_dim));
      for (size_t i = 0; i < scales.size(); ++i) {
        of_values[static_cast<size_t>(value_channel(config, static_cast<int64_t>(i)))] = scales[i];
      }
      divide_rows(block.at(Part::v), of_values, threads);
      break;
    }
  }
  for (const Part part : parts_of(slot)) {
    BlockLinear& linear = block.at(part);
    parallel_for(threads, linear.n, [&](int64_t row) {
      float* const weight = linear.weight.data() + row * linear.k;
      for (int64_t i = 0; i < linear.k; ++i) weight[i] *= effective[static_cast<size_t>(i)];
    });
  }
  return effective;
}

}  // namespace nibble::awq
