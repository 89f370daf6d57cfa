// One decoder layer: its weights, and running it on a batch of rows. A batch is a list of spans,
// each some consecutive tokens of one sequence; all their rows go through the linears together
// (BatchSpan, model/attention.h). Every row's result is the same bits whatever else is in the
// batch, however a prompt is cut into spans and however many threads run, unless a spec has
// Granularity::tensor, whose scale is the batch's. Not here: embedding, head
// and the loop over layers (model/model.h).
#pragma once

#include <functional>
#include <span>

#include "base/aligned_buffer.h"
#include "model/attention.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/layer_source.h"
#include "model/linear.h"

namespace nibble {

struct LayerWeights {
  LinearGroup groups[kSlots];  // q,k,v; o; gate,up; down in this order
  LayerNorms norms;
};

struct LoadOptions {
  int threads = 0;                // <= 0: all
  bool drop_source_pages = true;  // tell the system that mapped bytes which were packed can go
};

/// Loads layer `index`, quantized or not (each linear as the file has it), and checks every shape
/// against `config`: corrupt_file names the tensor, the expected and the found.
Result<LayerWeights> load_layer(const Checkpoint& checkpoint, const ModelNames& names,
                                const ModelConfig& config, int64_t index,
                                const LoadOptions& options);

/// One linear by its name without suffix, quantized or not.
Result<Linear> load_linear(const Checkpoint& checkpoint, const std::string& name, int64_t k,
                           int64_t n, bool bias_required, const LoadOptions& options);

/// Called with the input of each slot's linears, before any of them is run: x (rows, k) row-major.
using SlotObserver = std::function<void(Slot slot, const float* x, int64_t rows, int64_t k)>;

/// Scratch memory of a forward pass, kept between calls.
class LayerRunner {
 public:
  LayerRunner(const ModelConfig& config, int threads);
  ~LayerRunner();
  LayerRunner(LayerRunner&&) noexcept;

  /// hidden (rows, config.hidden) float, in: input of the layer, out: its output. Runs the linears
  /// as `specs` says (kSlots of them). `observer` may be empty; with one, slot inputs are written
  /// out first, which is slower, with the same results.
  Status run(const LayerWeights& weights, int64_t layer_index, std::span<const LinearSpec> specs,
             std::span<const BatchSpan> batch, int64_t rows, float* hidden,
             const SlotObserver& observer = {});

  /// Names of the kernels that ran so far, in order of first use: the receipt.
  const std::vector<std::string>& kernels() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace nibble
