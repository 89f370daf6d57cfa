// A whole model: embedding, layers, final norm, head. The runner behind every command.
#pragma once

#include <optional>

#include "model/layer.h"

namespace nibble {

struct ModelOptions {
  int threads = 0;  // <= 0: all CPUs
  Dtype kv_dtype = Dtype::bf16;
  bool int8_head = false;  // lm_head quantized to 8 bits per output channel, on request only
  int64_t context = 0;     // longest sequence that will be asked for; 0: 4096 or the model's
  int64_t sequences = 1;   // that many of them at once: for the memory estimate
  // On a GPU, products of different numbers of rows add up in different orders. If set, a sequence
  // gets the same bits alone and beside others, up to `sequences` of them: every decoding step has
  // as many rows, and prompts are read one by one. The CPU's bits never depend on the batch.
  bool batch_invariant = false;
  // On a GPU: weights are also kept as the kernels of many rows want them, in 8 bits, so that these
  // need not expand them for every pass.
  bool expanded = false;
};

/// What a model will take, before anything is loaded.
struct MemoryEstimate {
  uint64_t weights = 0, head = 0, kv_cache = 0, workspace = 0;
  uint64_t available = 0;  // what the system says can be had (MemAvailable, cgroup limits)
  uint64_t total() const { return weights + head + kv_cache + workspace; }
};

/// One forward call's work for one sequence.
struct BatchItem {
  KvCache* cache = nullptr;
  std::span<const int32_t> tokens;  // follow what the cache holds
};

class Model {
 public:
  /// `checkpoint` must outlive the model, which reads the embedding from it.
  /// unsupported, corrupt_file: see parse_model_config and load_layer. out_of_memory, before work
  /// starts, if the estimate exceeds what is available.
  static Result<Model> load(const Checkpoint& checkpoint, const ModelOptions& options);
  static Result<MemoryEstimate> estimate(const Checkpoint& checkpoint, const ModelOptions& options);
  Model(Model&&) noexcept;
  ~Model();

  const ModelConfig& config() const;
  bool quantized() const;  // at least one 4-bit linear; otherwise plans are ignored
  const LayerWeights& layer(int64_t index) const;
  /// Takes effect with the next forward. invalid_argument if it is for another number of layers; a
  /// spec that does not fit its linears is an error of that forward, which names them.
  Status set_plan(ModelPlan plan);
  const ModelPlan& plan() const;
  KvCache make_cache() const;

  /// Appends each item's tokens to its sequence and writes the final hidden state (after the last
  /// norm) of every row to `hidden` (sum of tokens, config.hidden), in the order of items.
  Status forward(std::span<const BatchItem> items, float* hidden,
                 const std::function<void(int64_t layer, Slot, const float* x, int64_t rows,
                                          int64_t k)>& observer = {});
  /// logits (rows, config.vocab) of rows of hidden states.
  Status logits(const float* hidden, int64_t rows, float* logits);

  uint64_t weight_bytes() const;  // layers as packed
  uint64_t head_bytes() const;
  std::vector<std::string> kernels() const;  // receipt of what ran
  std::string head_name() const;             // "bf16", "int8", ...

 private:
  struct State;
  std::unique_ptr<State> state_;
  explicit Model(std::unique_ptr<State> state);
  static Status find_embedding(const ModelNames& names, State& state);
  static Status load_head(const ModelNames& names, const LoadOptions& load, State& state);
};

}  // namespace nibble
