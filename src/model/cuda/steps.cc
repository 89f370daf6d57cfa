// See steps.h.
#include "model/cuda/steps.h"

#include <fmt/format.h>

#include <algorithm>

#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

/// Rows of a step that are decoded by a graph; more are launched kernel by kernel.
constexpr int64_t kGraphRows = 64;

}  // namespace

Result<std::unique_ptr<DecodeSteps>> DecodeSteps::create(const DeviceModel& model, KvPool& pool,
                                                         Forward& forward, PassStaging& staging,
                                                         cudaStream_t stream) {
  std::unique_ptr<DecodeSteps> steps(new DecodeSteps(model, pool, forward, staging, stream));
  for (cudaEvent_t& event : steps->done_) {
    NIBBLE_TRY(to_status(cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
                         "cudaEventCreateWithFlags"));
  }
  return steps;
}

DecodeSteps::~DecodeSteps() {
  for (cudaEvent_t event : done_) {
    if (event != nullptr) (void)cudaEventDestroy(event);
  }
}

bool DecodeSteps::follows(std::span<const SequenceItem> items,
                          std::span<const SamplerOptions> how) const {
  if (items.size() != last_.size() || !std::ranges::equal(how, last_how_)) return false;
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].cache != last_[i] || items[i].cache->length() != last_lengths_[i] ||
        items[i].tokens[0] != last_tokens_[i]) {
      return false;
    }
  }
  return true;
}

Status DecodeSteps::settle() {
  last_.clear();
  if (!ahead_) return {};
  ahead_ = false;
  // What it has written to pages lies behind the end of its sequence (after an error in the logits,
  // at its last position: such a sequence is not to be continued). Its sequence's fault is its own:
  // that of the step before it has been looked at.
  NIBBLE_TRY(to_status(cudaStreamSynchronize(stream_), "a step that was begun ahead"));
  return to_status(cudaMemsetAsync(forward_.faults() + ahead_slot_, 0, sizeof(int32_t), stream_),
                   "clearing a fault");
}

void DecodeSteps::drop_graphs() {
  seen_.clear();
  graphs_.clear();
}

std::vector<PassSpan> DecodeSteps::pass_of(std::span<const SequenceItem> items) {
  std::vector<PassSpan> pass;
  for (size_t i = 0; i < items.size(); ++i) pass.push_back({i, 0, 1, static_cast<int64_t>(i)});
  return pass;
}

Status DecodeSteps::stage(std::span<const SequenceItem> items, int64_t rows) {
  NIBBLE_TRY(to_status(cudaStreamSynchronize(stream_), "the step before"));
  return staging_.stage(items, pass_of(items), rows, stream_).status();
}

Status DecodeSteps::launch(int64_t rows, Choice choice) {
  const bool chooses = choice != Choice::none;
  const auto enqueue = [&]() -> Status {
    NIBBLE_TRY(forward_.layers(staging_.decode_inputs(), rows, stream_));
    if (chooses) return enqueue_choice(nullptr, rows, choice);
    return forward_.finish(nullptr, rows, stream_);
  };
  const Step step{rows, choice, chooses ? turn_ : 0};
  if (rows > kGraphRows || seen_.insert(step).second) {
    // The first time, the driver and cuBLAS may load code, which they do not while capturing.
    NIBBLE_TRY(enqueue());
  } else {
    auto found = graphs_.find(step);
    if (found == graphs_.end()) {
      Graph graph;
      NIBBLE_TRY(graph.capture(stream_, enqueue));
      found = graphs_.emplace(step, std::move(graph)).first;
    }
    NIBBLE_TRY(found->second.launch(stream_));
  }
  if (!chooses) return {};
  return to_status(cudaEventRecord(done_[turn_], stream_), "cudaEventRecord");
}

Status DecodeSteps::run(std::span<const SequenceItem> items, int64_t rows) {
  NIBBLE_TRY(pool_.sync_table(stream_));
  NIBBLE_TRY(stage(items, rows));
  NIBBLE_TRY(launch(rows, Choice::none));
  for (const SequenceItem& item : items) item.cache->set_length(item.cache->length() + 1);
  return {};
}

Status DecodeSteps::run_and_choose(std::span<const SequenceItem> items, int64_t rows, Choice choice,
                                   std::span<const SamplerOptions> how, std::span<int32_t> next) {
  const bool begun = ahead_;
  ahead_ = false;
  if (!begun) {
    NIBBLE_TRY(pool_.sync_table(stream_));
    if (!follows(items, how)) {
      NIBBLE_TRY(stage(items, rows));
      if (choice == Choice::sample) NIBBLE_TRY(staging_.stage_rules(how, rows, stream_));
    }
    NIBBLE_TRY(launch(rows, choice));
  }
  for (const SequenceItem& item : items) item.cache->set_length(item.cache->length() + 1);
  const int turn = turn_;
  NIBBLE_TRY(go_ahead(items, rows, choice));
  NIBBLE_TRY(to_status(cudaEventSynchronize(done_[turn]), "decoding"));
  std::copy_n(staging_.host_chosen(turn), items.size(), next.begin());
  last_.clear();
  NIBBLE_TRY(check_faults(items, turn));
  const auto tokens = next.first(items.size());
  if (std::ranges::any_of(tokens, [](int32_t token) { return token < 0; })) return {};
  last_tokens_.assign(tokens.begin(), tokens.end());
  last_lengths_.clear();
  last_how_.assign(how.begin(), how.end());
  for (const SequenceItem& item : items) {
    last_.push_back(item.cache);
    last_lengths_.push_back(item.cache->length());
  }
  return {};
}

Status DecodeSteps::go_ahead(std::span<const SequenceItem> items, int64_t rows, Choice choice) {
  // One that ends costs a step that nobody wants; of several, one ends too often.
  if (items.size() != 1) return {};
  auto& sequence = static_cast<PagedSequence&>(*items[0].cache);
  const int64_t length = sequence.length() + 1;
  if (length > std::min(model_.config.max_positions, pool_.shape().context)) return {};
  NIBBLE_TRY(pool_.reserve(sequence, length));
  ahead_slot_ = sequence.slot();
  NIBBLE_TRY(pool_.sync_table(stream_));
  turn_ ^= 1;
  const Status launched = launch(rows, choice);
  ahead_ = launched.ok();
  return launched;
}

LogitRows DecodeSteps::logit_rows(int64_t first, int64_t rows, bool step) const {
  LogitRows of;
  of.logits = forward_.logits();
  of.stride = forward_.logits_stride();
  of.rows = rows;
  of.vocab = model_.config.vocab;
  of.tokens = staging_.chosen() + first;
  of.position = step ? staging_.position() + first : nullptr;
  of.programmatic = model_.device.programmatic();
  return of;
}

Status DecodeSteps::enqueue_choice(const int32_t* gather, int64_t count, Choice choice) {
  NIBBLE_TRY(forward_.finish(gather, count, stream_));
  NIBBLE_TRY(forward_.mark("last norm", stream_));
  for (int64_t first = 0; first < count; first += kHeadRows) {
    const int64_t rows = std::min<int64_t>(kHeadRows, count - first);
    NIBBLE_TRY(forward_.head(first, rows, stream_));
    NIBBLE_TRY(forward_.mark("head", stream_));
    const LogitRows of = logit_rows(first, rows, gather == nullptr);
    if (choice == Choice::sample) {
      NIBBLE_TRY(to_status(launch_sample({of, staging_.rules() + first}, stream_), "sample"));
      NIBBLE_TRY(forward_.mark("sampling", stream_));
      continue;
    }
    NIBBLE_TRY(to_status(launch_argmax({of, staging_.argmax_scratch()}, stream_), "argmax"));
    NIBBLE_TRY(forward_.mark("argmax", stream_));
  }
  NIBBLE_TRY(fetch_faults(turn_));
  return staging_.fetch_chosen(count, turn_, stream_);
}

Status DecodeSteps::fetch_faults(int turn) {
  return staging_.fetch_faults(forward_.faults(), pool_.shape().sequences, turn, stream_);
}

Status DecodeSteps::check_faults(std::span<const SequenceItem> items, int turn) {
  const int32_t* faults = staging_.faults(turn);
  for (size_t i = 0; i < items.size(); ++i) {
    const auto slot = static_cast<PagedSequence*>(items[i].cache)->slot();
    if (slot < 0 || faults[slot] == 0) continue;
    (void)cudaMemset(forward_.faults(), 0,
                     static_cast<size_t>(pool_.shape().sequences) * sizeof(int32_t));
    return Status(Code::non_finite,
                  fmt::format("sequence {}: a query, key or value is NaN, infinite or beyond the "
                              "range of {}",
                              i, dtype_name(static_cast<Dtype>(pool_.shape().type))));
  }
  return {};
}

}  // namespace nibble::cuda
