// The Runner of a GPU: what of a call goes into which pass, and the sequences' pages. Decoding
// steps are in steps.h.
#include "model/cuda/runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "gemm/cuda/runtime.h"
#include "model/cuda/forward.h"
#include "model/cuda/load.h"
#include "model/cuda/pass_inputs.h"
#include "model/cuda/steps.h"

namespace nibble::cuda {
namespace {

using Choice = DecodeSteps::Choice;

class CudaRunner : public Runner {
 public:
  static Result<std::unique_ptr<Runner>> create(const Checkpoint& checkpoint,
                                                const ModelOptions& options, WeightForm form) {
    std::unique_ptr<CudaRunner> runner(new CudaRunner);
    NIBBLE_TRY(runner->load(checkpoint, options, form));
    return std::unique_ptr<Runner>(std::move(runner));
  }
  ~CudaRunner() override {
    const CurrentDevice current(model_.device.ordinal);
    if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_);
    steps_.reset();
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }

  const ModelConfig& config() const override { return model_.config; }
  bool quantized() const override { return quantized_; }
  std::unique_ptr<SequenceCache> make_cache() override { return pool_->open(); }
  Status set_plan(const ModelPlan& plan) override;
  void set_batch_invariant(bool wanted) override {
    invariant_rows_ = wanted ? pool_->shape().sequences : 0;
    if (steps_ != nullptr) (void)settle();  // the next step may have other rows
  }
  Status forward(std::span<const SequenceItem> items, HiddenRows rows, float* hidden) override;
  Status logits(const float* hidden, int64_t rows, float* logits) override;
  Status settle() override {
    const CurrentDevice current(model_.device.ordinal);
    NIBBLE_TRY(current.status());
    return steps_->settle();
  }
  Status choose(std::span<const SequenceItem> items, std::span<const SamplerOptions> how,
                std::span<int32_t> next) override;

  Result<std::vector<OperationTime>> profile(std::span<const SequenceItem> items) override;

  uint64_t weight_bytes() const override;
  uint64_t head_bytes() const override;
  std::string head_name() const override {
    return model_.head_rows() == nullptr ? "w4a16" : dtype_name(model_.head_type());
  }
  std::vector<std::string> kernels(const ModelPlan* plan) const override;
  std::string device_name() const override { return model_.device.name; }
  uint64_t peak_memory() const override;

 private:
  CudaRunner() = default;
  Status load(const Checkpoint& checkpoint, const ModelOptions& options, WeightForm form);

  /// Part of a call: whole items, or pieces of them.
  using Pass = std::vector<PassSpan>;
  Status check_items(std::span<const SequenceItem> items) const;
  std::vector<Pass> cut(std::span<const SequenceItem> items) const;
  /// Everything of a pass of prompts up to the layers' end.
  Status run_pass(std::span<const SequenceItem> items, const Pass& pass);
  /// By the host, from states and logits that it asks for.
  Status choose_on_host(std::span<const SequenceItem> items, std::span<const SamplerOptions> how,
                        std::span<int32_t> next);
  Status prepare(int64_t rows);
  Status wait(const char* what);
  Status copy_states(float* hidden, int64_t rows);
  bool is_step(std::span<const SequenceItem> items) const;
  int64_t step_rows(std::span<const SequenceItem> items) const {
    return std::max(static_cast<int64_t>(items.size()), invariant_rows_);
  }
  DeviceModel model_;
  bool quantized_ = false;
  int64_t pass_rows_ = 0;
  uint64_t free_at_first_ = 0;
  int64_t invariant_rows_ = 0;  // of every decoding step; 0: as many as it has sequences
  std::unique_ptr<KvPool> pool_;
  std::unique_ptr<Forward> forward_;
  std::unique_ptr<PassStaging> staging_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<DecodeSteps> steps_;
};

Status CudaRunner::load(const Checkpoint& checkpoint, const ModelOptions& options,
                        WeightForm form) {
  Result<LoadPlan> plan = plan_load(checkpoint, options, form);
  if (!plan.ok()) return plan.status();
  NIBBLE_TRY(check_fits(*plan));
  const CurrentDevice current(plan->device.ordinal);
  NIBBLE_TRY(current.status());
  NIBBLE_TRY(load_model(checkpoint, *plan, model_));
  for (const DeviceLayer& layer : model_.layers) {
    for (const DeviceGroup& group : layer.groups) {
      for (const DeviceLinear& part : group.parts) quantized_ = quantized_ || part.quantized;
    }
  }
  Result<KvPool> pool = KvPool::create(model_.device, plan->kv);
  if (!pool.ok()) return pool.status();
  pool_ = std::make_unique<KvPool>(std::move(*pool));
  pass_rows_ = plan->pass_rows;
  free_at_first_ = plan->memory.available;
  set_batch_invariant(options.batch_invariant);
  Result<std::unique_ptr<Forward>> forward =
      Forward::create(model_, *pool_, pass_rows_, options.expanded);
  if (!forward.ok()) return forward.status();
  forward_ = std::move(*forward);
  Result<std::unique_ptr<PassStaging>> staging = PassStaging::create(model_.device, pass_rows_);
  if (!staging.ok()) return staging.status();
  staging_ = std::move(*staging);
  NIBBLE_TRY(
      to_status(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"));
  Result<std::unique_ptr<DecodeSteps>> steps =
      DecodeSteps::create(model_, *pool_, *forward_, *staging_, stream_);
  if (!steps.ok()) return steps.status();
  steps_ = std::move(*steps);
  return {};
}

Status CudaRunner::set_plan(const ModelPlan& plan) {
  const CurrentDevice current(model_.device.ordinal);
  NIBBLE_TRY(current.status());
  NIBBLE_TRY(steps_->settle());
  NIBBLE_TRY(wait("before another plan"));
  steps_->drop_graphs();
  return forward_->set_plan(plan);
}

Status CudaRunner::wait(const char* what) {
  return to_status(cudaStreamSynchronize(stream_), what);
}

Status CudaRunner::check_items(std::span<const SequenceItem> items) const {
  for (size_t i = 0; i < items.size(); ++i) {
    const SequenceItem& item = items[i];
    const auto same = [&](const SequenceItem& other) { return other.cache == item.cache; };
    if (item.cache == nullptr || std::any_of(items.begin(), items.begin() + i, same)) {
      return Status(Code::invalid_argument,
                    fmt::format("item {} of the batch has no sequence of its own", i));
    }
    for (const int32_t token : item.tokens) {
      if (token >= 0 && token < model_.config.vocab) continue;
      return Status(Code::invalid_argument, fmt::format("token {} is outside the vocabulary of {}",
                                                        token, model_.config.vocab));
    }
    const int64_t length = item.cache->length() + static_cast<int64_t>(item.tokens.size());
    if (length > model_.config.max_positions) {
      return Status(Code::invalid_argument,
                    fmt::format("{} tokens are more than the model's context of {}", length,
                                model_.config.max_positions));
    }
    NIBBLE_TRY(pool_->reserve(static_cast<PagedSequence&>(*item.cache), length));
  }
  return {};
}

std::vector<CudaRunner::Pass> CudaRunner::cut(std::span<const SequenceItem> items) const {
  std::vector<Pass> passes;
  int64_t room = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const auto count = static_cast<int64_t>(items[i].tokens.size());
    if (invariant_rows_ > 0) room = 0;  // every prompt by itself
    for (int64_t at = 0; at < count;) {
      if (room == 0) {
        passes.emplace_back();
        room = pass_rows_;
      }
      const int64_t taken = std::min(room, count - at);
      passes.back().push_back({i, at, taken, pass_rows_ - room});
      room -= taken;
      at += taken;
    }
  }
  return passes;
}

Status CudaRunner::prepare(int64_t rows) {
  bool moved = false;
  NIBBLE_TRY(forward_->prepare(rows, &moved));
  if (moved) steps_->drop_graphs();
  return {};
}

Status CudaRunner::run_pass(std::span<const SequenceItem> items, const Pass& pass) {
  const int64_t rows = pass.back().row + pass.back().count;
  NIBBLE_TRY(prepare(rows));
  NIBBLE_TRY(wait("the pass before"));  // it may still read what is staged now
  NIBBLE_TRY(pool_->sync_table(stream_));
  Result<PassInputs> inputs = staging_->stage(items, pass, 0, stream_);
  if (!inputs.ok()) return inputs.status();
  NIBBLE_TRY(forward_->layers(*inputs, rows, stream_));
  for (const PassSpan& span : pass) {
    SequenceCache& cache = *items[span.item].cache;
    cache.set_length(cache.length() + span.count);
  }
  return {};
}

Status CudaRunner::copy_states(float* hidden, int64_t rows) {
  return to_status(cudaMemcpyAsync(hidden, forward_->states(),
                                   static_cast<size_t>(rows * model_.config.hidden) * sizeof(float),
                                   cudaMemcpyDeviceToHost, stream_),
                   "copying hidden states");
}

Status CudaRunner::forward(std::span<const SequenceItem> items, HiddenRows rows, float* hidden) {
  const CurrentDevice current(model_.device.ordinal);
  NIBBLE_TRY(current.status());
  NIBBLE_TRY(steps_->settle());
  NIBBLE_TRY(check_items(items));
  if (rows == HiddenRows::last && is_step(items)) {
    const int64_t count = step_rows(items);
    NIBBLE_TRY(prepare(count));
    NIBBLE_TRY(steps_->run(items, count));
    NIBBLE_TRY(copy_states(hidden, static_cast<int64_t>(items.size())));
    NIBBLE_TRY(steps_->fetch_faults());
    NIBBLE_TRY(wait("decoding"));
    return steps_->check_faults(items);
  }
  int64_t rows_before = 0;
  for (const Pass& pass : cut(items)) {
    NIBBLE_TRY(run_pass(items, pass));
    const int64_t count = pass.back().row + pass.back().count;
    if (rows == HiddenRows::all) {
      NIBBLE_TRY(forward_->finish(nullptr, count, stream_));
      NIBBLE_TRY(copy_states(hidden + rows_before * model_.config.hidden, count));
    } else if (rows == HiddenRows::last) {
      // Of an item that goes on in the next pass too: overwritten there.
      const auto taken = static_cast<int64_t>(pass.size());
      NIBBLE_TRY(forward_->finish(staging_->gather(), taken, stream_));
      NIBBLE_TRY(copy_states(
          hidden + static_cast<int64_t>(pass.front().item) * model_.config.hidden, taken));
    }
    rows_before += count;
  }
  if (rows == HiddenRows::none) return {};
  NIBBLE_TRY(steps_->fetch_faults());
  NIBBLE_TRY(wait("forward"));
  return steps_->check_faults(items);
}

Status CudaRunner::logits(const float* hidden, int64_t rows, float* logits) {
  const CurrentDevice current(model_.device.ordinal);
  NIBBLE_TRY(current.status());
  NIBBLE_TRY(steps_->settle());
  const ModelConfig& c = model_.config;
  for (int64_t first = 0; first < rows; first += kHeadRows) {
    const int64_t count = std::min<int64_t>(kHeadRows, rows - first);
    NIBBLE_TRY(prepare(count));
    NIBBLE_TRY(to_status(cudaMemcpyAsync(forward_->states(), hidden + first * c.hidden,
                                         static_cast<size_t>(count * c.hidden) * sizeof(float),
                                         cudaMemcpyHostToDevice, stream_),
                         "copying hidden states"));
    NIBBLE_TRY(forward_->split_states(count, stream_));
    NIBBLE_TRY(forward_->head(0, count, stream_));
    NIBBLE_TRY(to_status(
        cudaMemcpy2DAsync(logits + first * c.vocab, static_cast<size_t>(c.vocab) * sizeof(float),
                          forward_->logits(),
                          static_cast<size_t>(forward_->logits_stride()) * sizeof(float),
                          static_cast<size_t>(c.vocab) * sizeof(float), static_cast<size_t>(count),
                          cudaMemcpyDeviceToHost, stream_),
        "copying logits"));
    NIBBLE_TRY(wait("logits"));
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = logits + row * c.vocab;
    if (std::all_of(from, from + c.vocab, [](float v) { return std::isfinite(v); })) continue;
    return Status(Code::non_finite, fmt::format("NaN or infinity in the logits of row {}", row));
  }
  return {};
}

/// One token of every item.
bool CudaRunner::is_step(std::span<const SequenceItem> items) const {
  return static_cast<int64_t>(items.size()) <= pass_rows_ &&
         std::all_of(items.begin(), items.end(),
                     [](const SequenceItem& item) { return item.tokens.size() == 1; });
}

Status CudaRunner::choose(std::span<const SequenceItem> items, std::span<const SamplerOptions> how,
                          std::span<int32_t> next) {
  const CurrentDevice current(model_.device.ordinal);
  NIBBLE_TRY(current.status());
  const bool step = is_step(items);
  const bool sampled = !how.empty();
  if (sampled && (!step || model_.config.vocab >= sampling::kMostTokens)) {
    return choose_on_host(items, how, next);
  }
  if (!step || !steps_->follows(items, how)) NIBBLE_TRY(steps_->settle());
  NIBBLE_TRY(check_items(items));
  if (step) {
    const int64_t rows = step_rows(items);
    NIBBLE_TRY(prepare(rows));
    NIBBLE_TRY(
        steps_->run_and_choose(items, rows, sampled ? Choice::sample : Choice::greedy, how, next));
  } else {
    for (const Pass& pass : cut(items)) {
      NIBBLE_TRY(run_pass(items, pass));
      const auto count = static_cast<int64_t>(pass.size());
      NIBBLE_TRY(steps_->enqueue_choice(staging_->gather(), count, Choice::greedy));
      NIBBLE_TRY(wait("reading a prompt"));
      std::copy_n(steps_->chosen(), count, next.begin() + static_cast<int64_t>(pass.front().item));
    }
    NIBBLE_TRY(steps_->check_faults(items));
  }
  for (size_t i = 0; i < items.size(); ++i) {
    if (next[i] >= 0) continue;
    return Status(Code::non_finite, fmt::format("NaN or infinity in the logits of row {}", i));
  }
  return {};
}

Status CudaRunner::choose_on_host(std::span<const SequenceItem> items,
                                  std::span<const SamplerOptions> how, std::span<int32_t> next) {
  const auto vocab = static_cast<size_t>(model_.config.vocab);
  const auto rows = static_cast<int64_t>(items.size());
  std::vector<float> hidden(items.size() * static_cast<size_t>(model_.config.hidden));
  std::vector<float> of_rows(items.size() * vocab);
  NIBBLE_TRY(forward(items, HiddenRows::last, hidden.data()));
  NIBBLE_TRY(logits(hidden.data(), rows, of_rows.data()));
  for (size_t i = 0; i < items.size(); ++i) {
    next[i] = sample_token({of_rows.data() + i * vocab, vocab}, how[i], items[i].cache->length());
  }
  return {};
}

Result<std::vector<OperationTime>> CudaRunner::profile(std::span<const SequenceItem> items) {
  const CurrentDevice current(model_.device.ordinal);
  NIBBLE_TRY(current.status());
  NIBBLE_TRY(steps_->settle());
  NIBBLE_TRY(check_items(items));
  const bool decode = is_step(items);
  std::vector<Pass> passes = decode ? std::vector<Pass>{DecodeSteps::pass_of(items)} : cut(items);
  if (passes.size() != 1) {
    return Status(Code::invalid_argument,
                  fmt::format("operations are timed in one pass of 1 to {} rows", pass_rows_));
  }
  const Pass& pass = passes.front();
  const int64_t rows = decode ? step_rows(items) : pass.back().row + pass.back().count;
  NIBBLE_TRY(prepare(rows));
  NIBBLE_TRY(wait("the pass before"));
  NIBBLE_TRY(pool_->sync_table(stream_));
  Result<PassInputs> inputs = staging_->stage(items, pass, decode ? rows : 0, stream_);
  if (!inputs.ok()) return inputs.status();
  Profile profile;
  Graph graph;
  forward_->set_profile(&profile);
  const Status captured = graph.capture(stream_, [&]() -> Status {
    NIBBLE_TRY(forward_->layers(*inputs, rows, stream_));
    if (decode) return steps_->enqueue_choice(nullptr, rows, Choice::greedy);
    return steps_->enqueue_choice(staging_->gather(), static_cast<int64_t>(pass.size()),
                                  Choice::greedy);
  });
  forward_->set_profile(nullptr);
  NIBBLE_TRY(captured);
  NIBBLE_TRY(graph.launch(stream_));
  NIBBLE_TRY(wait("timing operations"));
  for (const PassSpan& span : pass) {
    SequenceCache& cache = *items[span.item].cache;
    cache.set_length(cache.length() + span.count);
  }
  return profile.times();
}

uint64_t CudaRunner::peak_memory() const {
  const CurrentDevice current(model_.device.ordinal);
  size_t free = 0, total = 0;
  // Nothing is freed before the end, so now is the peak.
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return 0;
  return free_at_first_ > free ? free_at_first_ - free : 0;
}

uint64_t CudaRunner::weight_bytes() const {
  uint64_t bytes = 0;
  for (const DeviceLayer& layer : model_.layers) {
    for (const DeviceGroup& group : layer.groups) {
      for (const DeviceLinear& part : group.parts) bytes += part.bytes();
    }
  }
  return bytes;
}

uint64_t CudaRunner::head_bytes() const {
  return model_.tied() ? static_cast<uint64_t>(model_.config.vocab * model_.config.hidden) * 2
                       : model_.head.bytes();
}

std::vector<std::string> CudaRunner::kernels(const ModelPlan* plan) const {
  std::vector<std::string> names;
  for (const auto& [name, mode] : forward_->kernels()) {
    const auto has_mode = [&mode](const LinearSpec& spec) { return mode == mode_name(spec.mode); };
    const bool any = plan == nullptr || mode.empty() ||
                     std::any_of(plan->specs.begin(), plan->specs.end(), has_mode);
    if (any) names.push_back(name);
  }
  return names;
}

}  // namespace

Result<MemoryEstimate> estimate_runner(const Checkpoint& checkpoint, const ModelOptions& options,
                                       WeightForm form) {
  const Result<LoadPlan> plan = plan_load(checkpoint, options, form);
  if (!plan.ok()) return plan.status();
  return plan->memory;
}

Result<std::unique_ptr<Runner>> make_runner(const Checkpoint& checkpoint,
                                            const ModelOptions& options, WeightForm form) {
  return CudaRunner::create(checkpoint, options, form);
}

}  // namespace nibble::cuda
