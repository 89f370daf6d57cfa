// What goes to and fro between host and device around a pass: tokens, positions and tiles there,
// chosen tokens and faults back. Pinned memory here, its mirror there.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "gemm/cuda/device_buffer.h"
#include "model/cuda/forward.h"
#include "model/runner.h"

namespace nibble::cuda {

/// Consecutive tokens of an item that are rows [row, row + count) of a pass.
struct PassSpan {
  size_t item = 0;
  int64_t first = 0;  // token of the item
  int64_t count = 0;
  int64_t row = 0;
};

class PassStaging {
 public:
  static constexpr int kTurns = 2;  // places for results

  static Result<std::unique_ptr<PassStaging>> create(const DeviceInfo& device, int64_t rows);
  ~PassStaging();

  /// Copies what a pass reads, on `stream`; spans are in the order of rows. The last row of every
  /// span goes into gather(). step_rows > 0: a decoding step of that many rows, of which every span
  /// is one and those behind them have no position, so nothing comes of them; no tiles. The stream
  /// must be past the pass before.
  Result<PassInputs> stage(std::span<const SequenceItem> items, std::span<const PassSpan> spans,
                           int64_t step_rows, cudaStream_t stream);
  /// What stage() of a decoding step has put: chosen tokens become the next step's.
  PassInputs decode_inputs() { return {tokens(), sequence(), position(), nullptr, 0}; }
  int32_t* position() { return device_.as<int32_t>() + 2 * capacity_; }
  const int32_t* gather() const { return device_.as<int32_t>() + 3 * capacity_; }

  /// Where argmax puts its tokens: where the next decoding step reads them.
  int32_t* chosen() { return tokens(); }
  void* argmax_scratch() { return argmax_scratch_.as<>(); }
  /// How to draw the tokens of `rows` rows; those that `how` is too short for take the largest
  /// logit. As stage().
  Status stage_rules(std::span<const SamplerOptions> how, int64_t rows, cudaStream_t stream);
  const sampling::Rule* rules() const { return rules_.as<sampling::Rule>(); }
  Status fetch_chosen(int64_t count, int turn, cudaStream_t stream);
  Status fetch_faults(const int32_t* faults, int64_t sequences, int turn, cudaStream_t stream);
  // Once what was fetched for that turn has been waited for:
  const int32_t* host_chosen(int turn) const { return results_ + 2 * turn * capacity_; }
  const int32_t* faults(int turn) const { return host_chosen(turn) + capacity_; }

 private:
  PassStaging() = default;
  int32_t* tokens() { return device_.as<int32_t>(); }
  const int32_t* sequence() { return device_.as<int32_t>() + capacity_; }

  int64_t capacity_ = 0;  // rows, a multiple of 4
  // tokens, sequence, position, gather, capacity_ ints each; then tiles
  DeviceBuffer device_, rules_, argmax_scratch_;
  int32_t* host_ = nullptr;               // pinned, as device_
  sampling::Rule* host_rules_ = nullptr;  // pinned
  int32_t* results_ = nullptr;            // pinned, of each turn: chosen tokens; faults
};

}  // namespace nibble::cuda
