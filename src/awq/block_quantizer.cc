#include "awq/block_quantizer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "awq/fold.h"
#include "awq/scale_search.h"
#include "base/thread_pool.h"

namespace nibble::awq {
namespace {

double decibels(double signal, double noise) {
  return noise > 0 ? 10 * std::log10(signal / noise) : std::numeric_limits<double>::infinity();
}

/// The statistics of inputs that are divided by `scales`.
void divide_inputs(InputStats& stats, const std::vector<float>& scales, int threads) {
  const int64_t k = stats.k();
  std::vector<float> inverse(scales.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    inverse[i] = 1.0f / scales[i];
    stats.mean_abs[i] *= inverse[i];
  }
  parallel_for(threads, stats.moment.panels(), [&](int64_t panel) {
    const int64_t first = panel * kPanelColumns, last = std::min(k, first + kPanelColumns);
    for (int64_t row = 0; row < k; ++row) {
      for (int64_t column = first; column < last; ++column) {
        stats.moment.at(row, column) *=
            inverse[static_cast<size_t>(row)] * inverse[static_cast<size_t>(column)];
      }
    }
  });
}

std::vector<SearchLinear> search_linears(const Block& block, Slot slot) {
  std::vector<SearchLinear> linears;
  for (const Part part : parts_of(slot)) {
    linears.push_back({block.at(part).weight.data(), block.at(part).n});
  }
  return linears;
}

/// Searches the scales of `slot`, folds them in and adapts the statistics.
void scale_slot(const ModelConfig& config, Block& block, Slot slot, InputStats& stats,
                const QuantizeOptions& options) {
  const std::vector<int64_t> classes = scale_classes(config, slot);
  ScaleSearchOptions search;
  search.grid = options.grid_for(stats.k());
  search.ratios = options.ratios;
  search.sample_rows = options.sample_rows;
  search.classes = classes;
  search.threads = options.threads;
  const ScaleChoice choice = search_scales(search_linears(block, slot), stats, search);
  if (choice.ratio < 0) return;
  divide_inputs(stats, fold_scales(config, block, slot, choice.scales, options.threads),
                options.threads);
}

}  // namespace

GridOptions QuantizeOptions::grid_for(int64_t k) const {
  GridOptions result = grid;
  if (result.group_size == -1) result.group_size = k;
  return result;
}

Result<QuantizedBlock> quantize_block(const ModelConfig& config, Block block, SlotStats stats,
                                      const QuantizeOptions& options,
                                      const std::function<bool()>& stop) {
  const auto stopped = [&] { return stop && stop(); };
  const Status interrupted(Code::interrupted, "interrupted");
  constexpr Slot kOrder[] = {Slot::qkv, Slot::o, Slot::gate_up, Slot::down};
  double plain_noise[kParts] = {}, plain_signal[kParts] = {};
  for (const Slot slot : kOrder) {
    const InputStats& inputs = stats[static_cast<size_t>(slot)];
    const GridOptions grid = options.grid_for(inputs.k());
    const std::vector<float> ones(static_cast<size_t>(inputs.k()), 1.0f);
    for (const Part part : parts_of(slot)) {
      if (!block.at(part).quantized) continue;
      if (stopped()) return interrupted;
      const SearchLinear linear{block.at(part).weight.data(), block.at(part).n};
      plain_noise[static_cast<int>(part)] =
          rounding_error({&linear, 1}, inputs, ones, grid, 0, 1, options.threads);
      plain_signal[static_cast<int>(part)] = output_energy(linear, inputs, options.threads);
    }
  }
  for (const Slot slot : kOrder) {
    if (!options.scale || !may_scale(config, block, slot)) continue;
    if (stopped()) return interrupted;
    scale_slot(config, block, slot, stats[static_cast<size_t>(slot)], options);
  }

  QuantizedBlock result;
  for (const Slot slot : kOrder) {
    InputStats& inputs = stats[static_cast<size_t>(slot)];
    const auto parts = parts_of(slot);
    const bool any = std::any_of(parts.begin(), parts.end(),
                                 [&](Part part) { return block.at(part).quantized; });
    if (!any) continue;
    if (stopped()) return interrupted;
    const RoundingOptions rounding{options.grid_for(inputs.k()), options.clip, options.rounding,
                                   options.threads};
    const Result<RoundingContext> context = RoundingContext::create(inputs.moment, rounding);
    if (!context.ok()) return context.status();
    for (const Part part : parts) {
      BlockLinear& linear = block.at(part);
      if (!linear.quantized) continue;
      if (stopped()) return interrupted;
      Result<RoundedLinear> rounded =
          round_linear(linear.name, linear.weight.data(), linear.n, *context);
      if (!rounded.ok()) return rounded.status();
      QuantizedLinearResult& out = result.linears.emplace_back();
      out.name = linear.name;
      out.tensors = std::move(rounded->tensors);
      out.bias = linear.bias;
      out.bias_dtype = linear.bias_dtype;
      out.snr_db = decibels(rounded->signal, rounded->noise);
      out.plain_snr_db =
          decibels(plain_signal[static_cast<int>(part)], plain_noise[static_cast<int>(part)]);
      std::vector<float>().swap(linear.weight);  // not needed any more
    }
    inputs = InputStats();
  }
  result.norms = {std::move(block.input_norm), std::move(block.mlp_norm)};
  return result;
}

uint64_t quantize_block_bytes(const ModelConfig& config, const QuantizeOptions& options) {
  const int64_t q = config.heads * config.head_dim;
  uint64_t largest = 0;
  for (const int64_t k : {config.hidden, q, config.intermediate}) {
    const RoundingOptions rounding{options.grid_for(k), options.clip, options.rounding, 1};
    const int64_t n = k == config.hidden ? std::max(q, config.intermediate) : config.hidden;
    // The codes of one linear as bytes, and rows of weights in work.
    const auto codes = static_cast<uint64_t>(k * n);
    const auto rows = static_cast<uint64_t>(3 * kErrorRows * k) * sizeof(float);
    largest = std::max(largest, RoundingContext::bytes_for(k, rounding) + codes +
                                    rows * static_cast<uint64_t>(options.threads));
  }
  return largest;
}

}  // namespace nibble::awq
