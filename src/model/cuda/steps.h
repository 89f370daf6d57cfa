// Decoding steps of a model on a GPU: one token of every sequence through the layers by a CUDA
// graph, the tokens that follow chosen on the device, where the next step reads them.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "model/cuda/forward.h"
#include "model/cuda/graph.h"
#include "model/cuda/kv_pool.h"
#include "model/cuda/pass_inputs.h"
#include "model/runner.h"

namespace nibble::cuda {

class DecodeSteps {
 public:
  /// What comes of a step: states, the likeliest tokens, or tokens drawn by rules.
  enum class Choice { none, greedy, sample };

  /// All of these outlive it; `stream` is where everything runs.
  static Result<std::unique_ptr<DecodeSteps>> create(const DeviceModel& model, KvPool& pool,
                                                     Forward& forward, PassStaging& staging,
                                                     cudaStream_t stream);
  ~DecodeSteps();

  /// Whether a step of these items reads what the last one has left on the device.
  bool follows(std::span<const SequenceItem> items, std::span<const SamplerOptions> how) const;
  /// Forgets what the last step has left, and the one that was begun behind it: before anything but
  /// a step that follows.
  Status settle();
  /// Before other plans, or when memory that the layers use has moved.
  void drop_graphs();

  /// Enqueues a step of `rows` rows, each item's one and padding; sequences grow by a token. No
  /// tokens are chosen. Not if a step was begun ahead.
  Status run(std::span<const SequenceItem> items, int64_t rows);
  /// The same, and tokens into `next` (items); -1: NaN or infinity in a row of logits. The step
  /// behind that of a single sequence is begun before its token has come.
  Status run_and_choose(std::span<const SequenceItem> items, int64_t rows, Choice choice,
                        std::span<const SamplerOptions> how, std::span<int32_t> next);

  /// Tokens after rows gather[0..count) of the pass that was run (null: 0, 1, ..., as sampling
  /// wants it), and their way to the host.
  Status enqueue_choice(const int32_t* gather, int64_t count, Choice choice);
  Status fetch_faults() { return fetch_faults(turn_); }
  // Of what was enqueued last, once it has been waited for.
  const int32_t* chosen() const { return staging_.host_chosen(turn_); }
  Status check_faults(std::span<const SequenceItem> items) { return check_faults(items, turn_); }

  /// Rows of a step: item i is row i.
  static std::vector<PassSpan> pass_of(std::span<const SequenceItem> items);

 private:
  DecodeSteps(const DeviceModel& model, KvPool& pool, Forward& forward, PassStaging& staging,
              cudaStream_t stream)
      : model_(model), pool_(pool), forward_(forward), staging_(staging), stream_(stream) {}

  Status stage(std::span<const SequenceItem> items, int64_t rows);
  /// From what has been staged or the step before has left.
  Status launch(int64_t rows, Choice choice);
  /// The step behind the one that has just been launched: the host's way from one to the next is
  /// then hidden.
  Status go_ahead(std::span<const SequenceItem> items, int64_t rows, Choice choice);
  /// Logits of rows [first, first + rows). step: their positions move on.
  LogitRows logit_rows(int64_t first, int64_t rows, bool step) const;
  Status fetch_faults(int turn);
  Status check_faults(std::span<const SequenceItem> items, int turn);

  const DeviceModel& model_;
  KvPool& pool_;
  Forward& forward_;
  PassStaging& staging_;
  cudaStream_t stream_;

  struct Step {
    int64_t rows = 0;
    Choice choice = Choice::none;
    int turn = 0;  // where its results go
    auto operator<=>(const Step&) const = default;
  };
  std::set<Step> seen_;  // steps that have been run
  std::map<Step, Graph> graphs_;
  // What the last step left on the device: its sequences, each one token longer, the tokens that
  // it chose for them, and how.
  std::vector<const SequenceCache*> last_;
  std::vector<int32_t> last_tokens_;
  std::vector<int64_t> last_lengths_;
  std::vector<SamplerOptions> last_how_;
  // Results lie in two places in turn, so that one can be read while the next is made.
  int turn_ = 0;
  // The step after last_ is under way, of the sequence in this row of the page table; its results
  // go to turn_.
  bool ahead_ = false;
  int32_t ahead_slot_ = 0;
  cudaEvent_t done_[PassStaging::kTurns] = {};  // behind a step that chooses
};

}  // namespace nibble::cuda
