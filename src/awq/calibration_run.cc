#include "awq/calibration_run.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/thread_pool.h"
#include "format/message.h"

namespace nibble::awq {
namespace {

constexpr int64_t kBatchRows = 2048;  // tokens run at once: bounds the scratch memory

/// `config` with layer `index` as its only layer: its KV cache holds that layer alone.
ModelConfig only_layer(const ModelConfig& config, int64_t index) {
  ModelConfig single = config;
  single.layers = 1;
  single.window = {config.window[static_cast<size_t>(index)]};
  return single;
}

Status check_stop(const std::function<bool()>& stop) {
  return stop && stop() ? Status(Code::interrupted, "interrupted") : Status{};
}

}  // namespace

Result<CalibrationRun> CalibrationRun::create(const Checkpoint& checkpoint, const ModelNames& names,
                                              const ModelConfig& config, const Sequences& sequences,
                                              int threads) {
  const std::string name = names.decoder + "embed_tokens.weight";
  const TensorView* embedding = checkpoint.find(name);
  if (embedding == nullptr) {
    return Status(Code::corrupt_file, "the checkpoint has no tensor " + quote_name(name));
  }
  const auto dtype = float_dtype(embedding->dtype);
  if (!dtype || embedding->shape.size() != 2 || embedding->shape[1] != config.hidden) {
    return Status(Code::corrupt_file,
                  fmt::format("{}: expected [{}, {}] of F32, F16 or BF16, found {} {}",
                              quote_name(name), config.vocab, config.hidden,
                              tensor_dtype_name(embedding->dtype), embedding->shape_text()));
  }
  CalibrationRun run;
  run.checkpoint_ = &checkpoint;
  run.names_ = names;
  run.config_ = config;
  run.threads_ = threads;
  const auto scale = static_cast<float>(config.embedding_scale);
  size_t tokens = 0;
  for (const std::vector<int32_t>& sequence : sequences) tokens += sequence.size();
  run.hidden_.reserve(tokens * static_cast<size_t>(config.hidden));
  for (const std::vector<int32_t>& sequence : sequences) {
    run.lengths_.push_back(static_cast<int64_t>(sequence.size()));
    for (const int32_t token : sequence) {
      if (token < 0 || token >= embedding->shape[0]) {
        return Status(Code::corrupt_file,
                      fmt::format("{}: the tokenizer gives token {}, the embedding has {}",
                                  quote_name(name), token, embedding->shape[0]));
      }
      for (int64_t i = 0; i < config.hidden; ++i) {
        run.hidden_.push_back(scale *
                              load_as_float(embedding->data, token * config.hidden + i, *dtype));
      }
    }
  }
  return run;
}

uint64_t CalibrationRun::hidden_bytes(const ModelConfig& config, int64_t tokens) {
  return static_cast<uint64_t>(tokens * config.hidden) * sizeof(float);
}

uint64_t CalibrationRun::block_bytes(const ModelConfig& config) {
  const int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  const int64_t weights = config.hidden * (2 * q + 2 * kv + 3 * config.intermediate);
  const int64_t scratch =
      kBatchRows * (3 * q + 4 * kv + 4 * config.hidden + 4 * config.intermediate);
  return static_cast<uint64_t>(2 * weights + 4 * scratch) +
         2 * MomentAccumulator::bytes_for(config.hidden) + MomentAccumulator::bytes_for(q) +
         MomentAccumulator::bytes_for(config.intermediate);
}

Status CalibrationRun::run_block(const SlotObserver& observer, const std::function<bool()>& stop) {
  NIBBLE_TRY(check_stop(stop));
  const auto weights = load_layer(*checkpoint_, names_, config_, next_, {.threads = threads_});
  if (!weights.ok()) return weights.status();
  const ModelConfig single = only_layer(config_, next_);
  LayerRunner runner(single, threads_);
  const std::vector<LinearSpec> specs(kSlots);
  int64_t row = 0;
  for (size_t first = 0; first < lengths_.size();) {
    NIBBLE_TRY(check_stop(stop));
    std::vector<KvCache> caches;
    std::vector<BatchSpan> batch;
    int64_t rows = 0;
    size_t last = first;
    while (last < lengths_.size() && (rows == 0 || rows + lengths_[last] <= kBatchRows)) {
      rows += lengths_[last++];
    }
    caches.reserve(last - first);  // spans point into it
    for (int64_t at = 0; first < last; ++first) {
      KvCache& cache = caches.emplace_back(single, Dtype::f32);
      NIBBLE_TRY(cache.reserve(lengths_[first]));
      batch.push_back({&cache, at, lengths_[first]});
      at += lengths_[first];
    }
    NIBBLE_TRY(runner.run(*weights, 0, specs, batch, rows, hidden_.data() + row * config_.hidden,
                          observer));
    row += rows;
  }
  ++next_;
  return {};
}

Result<SlotStats> CalibrationRun::measure_block(const std::function<bool()>& stop) {
  std::vector<MomentAccumulator> accumulators;
  const int64_t widths[kSlots] = {config_.hidden, config_.heads * config_.head_dim, config_.hidden,
                                  config_.intermediate};
  for (const int64_t width : widths) {
    Result<MomentAccumulator> accumulator = MomentAccumulator::create(width);
    if (!accumulator.ok()) return accumulator.status();
    accumulators.push_back(std::move(*accumulator));
  }
  Status status;
  const int64_t layer = next_;
  NIBBLE_TRY(run_block(
      [&](Slot slot, const float* x, int64_t rows, int64_t) {
        const Status added = accumulators[static_cast<size_t>(slot)].add(x, rows, threads_);
        if (status.ok()) status = added;
      },
      stop));
  NIBBLE_TRY(status);
  SlotStats stats;
  for (int slot = 0; slot < kSlots; ++slot) {
    Result<InputStats> result = accumulators[static_cast<size_t>(slot)].finish(threads_);
    if (!result.ok()) {
      return Status(result.status().code(),
                    fmt::format("layer {}, {}: {}", layer, slot_name(static_cast<Slot>(slot)),
                                result.status().message()));
    }
    stats[static_cast<size_t>(slot)] = std::move(*result);
  }
  return stats;
}

Status CalibrationRun::skip_block(const std::function<bool()>& stop) { return run_block({}, stop); }

}  // namespace nibble::awq
