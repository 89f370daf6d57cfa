// model/model.h as a Runner.
#pragma once

#include "model/model.h"
#include "model/runner.h"

namespace nibble {

class CpuRunner : public Runner {
 public:
  explicit CpuRunner(Model& model) : model_(&model) {}  // which must outlive it

  const ModelConfig& config() const override { return model_->config(); }
  bool quantized() const override { return model_->quantized(); }
  Status set_plan(const ModelPlan& plan) override { return model_->set_plan(plan); }
  void set_batch_invariant(bool) override {}
  std::unique_ptr<SequenceCache> make_cache() override;
  Status forward(std::span<const SequenceItem> items, HiddenRows rows, float* hidden) override;
  Status logits(const float* hidden, int64_t rows, float* logits) override;
  Status choose(std::span<const SequenceItem> items, std::span<const SamplerOptions> how,
                std::span<int32_t> next) override;
  Result<std::vector<OperationTime>> profile(std::span<const SequenceItem> items) override;
  uint64_t weight_bytes() const override { return model_->weight_bytes(); }
  uint64_t head_bytes() const override { return model_->head_bytes(); }
  std::string head_name() const override { return model_->head_name(); }
  std::vector<std::string> kernels(const ModelPlan* plan) const override;
  std::string device_name() const override { return "CPU"; }
  uint64_t peak_memory() const override;

 private:
  Model* model_;
  std::vector<float> hidden_, logits_;  // scratch
};

}  // namespace nibble
