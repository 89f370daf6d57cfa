// A calibration text on its way through a model, one decoder block at a time: only the block that
// runs is in memory, and the hidden states of all tokens between blocks.
// Every block gets what the 16-bit blocks before it give, as in AutoAWQ.
// Not here: where the tokens come from (awq/calibration_text.h), what is done with the statistics
// (awq/block_quantizer.h).
#pragma once

#include <array>
#include <functional>
#include <vector>

#include "awq/moments.h"
#include "model/layer.h"

namespace nibble::awq {

using Sequences = std::vector<std::vector<int32_t>>;
using SlotStats = std::array<InputStats, kSlots>;

class CalibrationRun {
 public:
  /// Looks the tokens up in the embedding. `checkpoint` must outlive the run. corrupt_file if a
  /// token is outside the vocabulary or the embedding is not what `config` says.
  static Result<CalibrationRun> create(const Checkpoint& checkpoint, const ModelNames& names,
                                       const ModelConfig& config, const Sequences& sequences,
                                       int threads);

  /// Bytes: hidden states of `tokens` tokens, and what running and measuring one block takes.
  static uint64_t hidden_bytes(const ModelConfig& config, int64_t tokens);
  static uint64_t block_bytes(const ModelConfig& config);

  /// Runs the next block and returns what its linears saw. `stop` is asked between batches.
  Result<SlotStats> measure_block(const std::function<bool()>& stop);
  /// Runs the next block only.
  Status skip_block(const std::function<bool()>& stop);

 private:
  Status run_block(const SlotObserver& observer, const std::function<bool()>& stop);

  const Checkpoint* checkpoint_ = nullptr;
  ModelNames names_;
  ModelConfig config_;
  int threads_ = 1;
  int64_t next_ = 0;
  std::vector<int64_t> lengths_;  // of the sequences, in tokens
  std::vector<float> hidden_;     // (all tokens, hidden)
};

}  // namespace nibble::awq
