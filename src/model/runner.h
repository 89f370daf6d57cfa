// A model on some device, as the commands see it: tokens in, hidden states, logits or chosen tokens
// out. CpuRunner (model/cpu_runner.h) is model/model.h; make_cuda_runner()
// (model/cuda/cuda_runner.h) is a GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/config.h"
#include "model/linear.h"
#include "model/sampler.h"
#include "model/sequence_cache.h"

namespace nibble {

/// One forward call's work for one sequence.
struct SequenceItem {
  SequenceCache* cache = nullptr;   // of this runner; each at most once in a call
  std::span<const int32_t> tokens;  // follow what the cache holds
};

/// Which rows of hidden states a forward call gives back: none; the last one of every item; all, in
/// the order of items.
enum class HiddenRows { none, last, all };

/// What the launches of one kind took of a call.
struct OperationTime {
  std::string name;  // "gate_up product", "attention", ...
  double microseconds = 0;
  int64_t launches = 0;
};

class Runner {
 public:
  virtual ~Runner() = default;

  virtual const ModelConfig& config() const = 0;
  virtual bool quantized() const = 0;  // at least one 4-bit linear; otherwise plans are ignored
  /// Takes effect with the next forward. invalid_argument if it is for another number of layers,
  /// unsupported what this device does not run.
  virtual Status set_plan(const ModelPlan& plan) = 0;

  /// Whether a sequence gets the same bits alone and beside others (ModelOptions::batch_invariant
  /// until this is called). A CPU gives them whatever is asked for.
  virtual void set_batch_invariant(bool wanted) = 0;

  virtual std::unique_ptr<SequenceCache> make_cache() = 0;

  /// Appends each item's tokens to its sequence. hidden (rows, config().hidden) float in host
  /// memory: states after the last norm, of the rows that were asked for.
  virtual Status forward(std::span<const SequenceItem> items, HiddenRows rows, float* hidden) = 0;
  /// logits (rows, config().vocab) of rows of hidden states. non_finite names a row.
  virtual Status logits(const float* hidden, int64_t rows, float* logits) = 0;
  /// forward(), logits() of the last row of every item, and a token for each into next (items):
  /// what sample_token() draws by `how` (items) at the position behind the item's; the most
  /// probable one (the lowest of several) if `how` is empty. Only tokens need leave the device.
  virtual Status choose(std::span<const SequenceItem> items, std::span<const SamplerOptions> how,
                        std::span<int32_t> next) = 0;
  Status greedy(std::span<const SequenceItem> items, std::span<int32_t> next) {
    return choose(items, {}, next);
  }
  /// Waits for, and forgets, what was begun before anybody asked for it: then it is in nobody's
  /// time.
  virtual Status settle() { return {}; }

  /// greedy(), with the time of every operation: they add up to the call's time on the device,
  /// and are together a little longer than without being timed. unsupported on a CPU.
  virtual Result<std::vector<OperationTime>> profile(std::span<const SequenceItem> items) = 0;

  virtual uint64_t weight_bytes() const = 0;  // layers as packed
  virtual uint64_t head_bytes() const = 0;
  virtual std::string head_name() const = 0;  // "bf16", "int8", ...
  /// Names of the kernels that have run: the receipt. With a plan, only those that it can have run:
  /// for when the model ran several.
  virtual std::vector<std::string> kernels(const ModelPlan* plan = nullptr) const = 0;
  virtual std::string device_name() const = 0;  // "CPU", "NVIDIA H200"
  /// The most that was taken of the device's memory; on a CPU, by the whole process.
  virtual uint64_t peak_memory() const = 0;
};

}  // namespace nibble
