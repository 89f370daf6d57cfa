// See generation.h.
#include "generation.h"

#include <algorithm>
#include <cstdint>

#include "timing.h"

namespace nibble {
namespace {

/// Tokens that go through the layers at once when comparing.
constexpr int64_t kForwardTokens = 512;
/// Rows of logits that are looked at together when comparing.
constexpr int64_t kCompareRows = 64;

class Generator {
 public:
  Generator(Runner& model, std::span<Sequence> sequences, const GenerateOptions& options)
      : model_(model), sequences_(sequences), options_(options), caches_(sequences.size()) {}

  Status run(GenerateTimes& times) {
    while (!stopped_ && !(options_.stop && options_.stop())) {
      const double start = now_seconds();
      NIBBLE_TRY(admit(times));
      const double admitted = now_seconds();
      times.prompt_seconds += admitted - start;
      if (active_.empty()) {
        if (next_sequence_ == sequences_.size()) break;
        continue;  // all that were admitted ended with their first token
      }
      NIBBLE_TRY(decode(times));
      times.decode_seconds += now_seconds() - admitted;
    }
    for (Sequence& sequence : sequences_) {
      if (sequence.finish == Finish::running) sequence.finish = Finish::interrupted;
    }
    return {};
  }

 private:
  int64_t width() const { return model_.config().hidden; }
  size_t vocab() const { return static_cast<size_t>(model_.config().vocab); }

  /// Reads the prompts of as many sequences as there is room for beside the active ones.
  Status admit(GenerateTimes& times) {
    const size_t most = options_.batch > 0 ? static_cast<size_t>(options_.batch) : SIZE_MAX;
    const size_t first = next_sequence_;
    const size_t count = std::min(sequences_.size() - first, most - std::min(most, active_.size()));
    if (count == 0) return {};
    next_sequence_ += count;
    for (size_t i = first; i < next_sequence_; ++i) caches_[i] = model_.make_cache();
    std::vector<float> states;
    NIBBLE_TRY(read_prompts(first, count, states, times));
    if (stopped_) return {};
    logits_.resize(count * vocab());
    NIBBLE_TRY(model_.logits(states.data(), static_cast<int64_t>(count), logits_.data()));
    std::vector<size_t> admitted;
    for (size_t i = first; i < next_sequence_; ++i) admitted.push_back(i);
    next_.clear();
    for (size_t row = 0; row < count; ++row) {
      const std::span<const float> logits(logits_.data() + row * vocab(), vocab());
      const auto length = static_cast<int64_t>(sequences_[first + row].prompt.size());
      next_.push_back(sample_token(logits, sampler(first + row), length));
    }
    std::vector<size_t> still = take(admitted, next_);
    active_.insert(active_.end(), still.begin(), still.end());
    return {};
  }

  /// The prompts of sequences [first, first + count) through the layers, packed into forward passes
  /// whatever their lengths, and the last hidden state of each.
  Status read_prompts(size_t first, size_t count, std::vector<float>& states,
                      GenerateTimes& times) {
    states.resize(count * static_cast<size_t>(width()));
    std::vector<size_t> done(count);  // tokens of each prompt
    for (size_t at = 0; at < count;) {
      if (options_.stop && options_.stop()) {
        stopped_ = true;
        return {};
      }
      std::vector<SequenceItem> items;
      int64_t rows = 0;
      for (size_t i = at; i < count && rows < options_.pass_tokens; ++i) {
        const std::vector<int32_t>& prompt = sequences_[first + i].prompt;
        const size_t taken =
            std::min(prompt.size() - done[i], static_cast<size_t>(options_.pass_tokens - rows));
        items.push_back({caches_[first + i].get(), {prompt.data() + done[i], taken}});
        rows += static_cast<int64_t>(taken);
      }
      // Of an item whose prompt goes on, the row is overwritten by a later pass.
      NIBBLE_TRY(model_.forward(items, HiddenRows::last,
                                states.data() + at * static_cast<size_t>(width())));
      times.prompt_tokens += rows;
      const size_t started = at;
      for (size_t i = started; i < started + items.size(); ++i) {
        done[i] += items[i - started].tokens.size();
        if (done[i] == sequences_[first + i].prompt.size()) at = i + 1;
      }
    }
    return {};
  }

  /// One more token of every active sequence.
  Status decode(GenerateTimes& times) {
    std::vector<SequenceItem> items;
    for (const size_t i : active_) {
      items.push_back({caches_[i].get(), {&sequences_[i].tokens.back(), 1}});
    }
    times.decode_tokens += static_cast<int64_t>(active_.size());
    how_.clear();
    if (options_.sampler.temperature > 0) {
      for (const size_t i : active_) how_.push_back(sampler(i));
    }
    next_.resize(active_.size());
    NIBBLE_TRY(model_.choose(items, how_, next_));
    active_ = take(active_, next_);
    return {};
  }

  SamplerOptions sampler(size_t sequence) const {
    SamplerOptions options = options_.sampler;
    options.seed += sequence;
    return options;
  }

  /// Appends the tokens that were chosen for these sequences; those that go on.
  std::vector<size_t> take(const std::vector<size_t>& of, std::span<const int32_t> next) {
    std::vector<size_t> still;
    for (size_t row = 0; row < of.size(); ++row) {
      const size_t i = of[row];
      Sequence& sequence = sequences_[i];
      if (sequence.limit <= 0) {
        sequence.finish = Finish::length;
      } else {
        const int32_t token = next[row];
        sequence.tokens.push_back(token);
        if (std::binary_search(options_.stop_tokens.begin(), options_.stop_tokens.end(), token)) {
          sequence.finish = Finish::eos;
        } else {
          if (options_.on_token && !options_.on_token(i, token)) stopped_ = true;
          if (static_cast<int64_t>(sequence.tokens.size()) >= sequence.limit) {
            sequence.finish = Finish::length;
          } else {
            still.push_back(i);
            continue;
          }
        }
      }
      caches_[i].reset();  // its memory is for those that wait
    }
    return still;
  }

  Runner& model_;
  std::span<Sequence> sequences_;
  const GenerateOptions& options_;
  std::vector<std::unique_ptr<SequenceCache>> caches_;
  size_t next_sequence_ = 0;    // the first that has not been admitted
  std::vector<size_t> active_;  // sequences that go on
  std::vector<float> logits_;
  std::vector<SamplerOptions> how_;
  std::vector<int32_t> next_;
  bool stopped_ = false;
};

/// Hidden states of the last `rows` tokens, (rows, hidden).
Result<std::vector<float>> hidden_states(Runner& model, std::span<const int32_t> tokens,
                                         int64_t rows, const std::function<bool()>& stop) {
  const int64_t width = model.config().hidden;
  const auto length = static_cast<int64_t>(tokens.size());
  std::vector<float> hidden(static_cast<size_t>(length * width));
  const std::unique_ptr<SequenceCache> cache = model.make_cache();
  for (int64_t at = 0; at < length; at += kForwardTokens) {
    if (stop && stop()) return Status(Code::interrupted, "interrupted");
    const auto count = static_cast<size_t>(std::min(kForwardTokens, length - at));
    const SequenceItem item{cache.get(), tokens.subspan(static_cast<size_t>(at), count)};
    NIBBLE_TRY(model.forward({&item, 1}, HiddenRows::all, hidden.data() + at * width));
  }
  hidden.erase(hidden.begin(), hidden.begin() + (length - rows) * width);
  return hidden;
}

}  // namespace

const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::running: return "running";
    case Finish::eos: return "eos";
    case Finish::length: return "length";
    case Finish::interrupted: return "interrupted";
  }
  return "?";
}

Status generate(Runner& model, std::span<Sequence> sequences, const GenerateOptions& options,
                GenerateTimes& times) {
  return Generator(model, sequences, options).run(times);
}

Result<std::optional<Divergence>> first_divergence(Runner& model, const ModelPlan& plan,
                                                   const ModelPlan& other, const Sequence& sequence,
                                                   const SamplerOptions& sampler,
                                                   const std::function<bool()>& stop) {
  const auto choices = static_cast<int64_t>(sequence.tokens.size());
  if (choices == 0) return std::optional<Divergence>();
  std::vector<int32_t> text = sequence.prompt;
  text.insert(text.end(), sequence.tokens.begin(), sequence.tokens.end() - 1);
  NIBBLE_TRY(model.set_plan(other));
  Result<std::vector<float>> hidden = hidden_states(model, text, choices, stop);
  if (!hidden.ok()) return hidden.status();

  const int64_t width = model.config().hidden;
  const auto vocab = static_cast<size_t>(model.config().vocab);
  std::vector<float> logits(static_cast<size_t>(std::min(kCompareRows, choices)) * vocab);
  for (int64_t at = 0; at < choices; at += kCompareRows) {
    const int64_t rows = std::min(kCompareRows, choices - at);
    NIBBLE_TRY(model.logits(hidden->data() + at * width, rows, logits.data()));
    for (int64_t row = 0; row < rows; ++row) {
      const std::span<const float> theirs(logits.data() + static_cast<size_t>(row) * vocab, vocab);
      Divergence found;
      found.index = at + row;
      found.token = sequence.tokens[static_cast<size_t>(found.index)];
      found.other_token =
          sample_token(theirs, sampler, static_cast<int64_t>(sequence.prompt.size()) + found.index);
      if (found.token == found.other_token) continue;
      found.other_margin =
          theirs[static_cast<size_t>(found.other_token)] - theirs[static_cast<size_t>(found.token)];
      // What ran had the same tokens before it: its logits are found by reading them again.
      NIBBLE_TRY(model.set_plan(plan));
      const size_t read = sequence.prompt.size() + static_cast<size_t>(found.index);
      hidden = hidden_states(model, {text.data(), read}, 1, stop);
      if (!hidden.ok()) return hidden.status();
      NIBBLE_TRY(model.logits(hidden->data(), 1, logits.data()));
      found.margin =
          logits[static_cast<size_t>(found.token)] - logits[static_cast<size_t>(found.other_token)];
      return std::optional<Divergence>(found);
    }
  }
  return std::optional<Divergence>();
}

}  // namespace nibble
