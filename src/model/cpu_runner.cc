// See cpu_runner.h.
#include "model/cpu_runner.h"

#include <algorithm>

#include "base/memory.h"
#include "model/sampler.h"

namespace nibble {

std::unique_ptr<SequenceCache> CpuRunner::make_cache() {
  return std::make_unique<KvCache>(model_->make_cache());
}

Status CpuRunner::forward(std::span<const SequenceItem> items, HiddenRows rows, float* hidden) {
  const auto width = static_cast<size_t>(config().hidden);
  std::vector<BatchItem> batch;
  size_t total = 0;
  for (const SequenceItem& item : items) {
    batch.push_back({static_cast<KvCache*>(item.cache), item.tokens});
    total += item.tokens.size();
  }
  const bool all_are_last = rows == HiddenRows::last && total == items.size();
  if (rows == HiddenRows::all || all_are_last) return model_->forward(batch, hidden);
  hidden_.resize(total * width);
  NIBBLE_TRY(model_->forward(batch, hidden_.data()));
  if (rows == HiddenRows::none) return {};
  size_t end = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    end += items[i].tokens.size();
    if (items[i].tokens.empty()) {
      return Status(Code::invalid_argument, "an item without tokens has no last row");
    }
    std::copy_n(hidden_.data() + (end - 1) * width, width, hidden + i * width);
  }
  return {};
}

Status CpuRunner::logits(const float* hidden, int64_t rows, float* logits) {
  return model_->logits(hidden, rows, logits);
}

Status CpuRunner::choose(std::span<const SequenceItem> items, std::span<const SamplerOptions> how,
                         std::span<int32_t> next) {
  const auto vocab = static_cast<size_t>(config().vocab);
  std::vector<float> last(items.size() * static_cast<size_t>(config().hidden));
  NIBBLE_TRY(forward(items, HiddenRows::last, last.data()));
  logits_.resize(items.size() * vocab);
  NIBBLE_TRY(model_->logits(last.data(), static_cast<int64_t>(items.size()), logits_.data()));
  for (size_t i = 0; i < items.size(); ++i) {
    const std::span<const float> logits(logits_.data() + i * vocab, vocab);
    next[i] = how.empty() ? argmax(logits) : sample_token(logits, how[i], items[i].cache->length());
  }
  return {};
}

Result<std::vector<OperationTime>> CpuRunner::profile(std::span<const SequenceItem>) {
  return Status(Code::unsupported, "operations are timed on a GPU only");
}

uint64_t CpuRunner::peak_memory() const { return peak_memory_bytes(); }

std::vector<std::string> CpuRunner::kernels(const ModelPlan* plan) const {
  if (plan == nullptr) return model_->kernels();
  std::vector<Mode> modes;
  if (model_->head_name() == mode_name(Mode::w4a16)) modes.push_back(Mode::w4a16);
  for (const LinearSpec& spec : plan->specs) {
    if (!model_->quantized()) break;
    // groups of 8 and of 4 bits side by side run in the kernels for 8
    modes.push_back(spec.wide_groups.empty() ? spec.mode : Mode::w4a8);
  }
  const std::vector<KernelInfo> table = kernel_table();
  std::vector<std::string> names;
  for (const std::string& name : model_->kernels()) {
    const auto info = std::find_if(table.begin(), table.end(),
                                   [&](const KernelInfo& kernel) { return name == kernel.name; });
    if (info == table.end() ||  // of 16-bit weights: the same in every mode
        std::find(modes.begin(), modes.end(), info->mode) != modes.end()) {
      names.push_back(name);
    }
  }
  return names;
}

}  // namespace nibble
