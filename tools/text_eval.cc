// See text_eval.h.
#include "text_eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "base/cpu_features.h"

namespace nibble {
namespace {

/// Tokens that go through the layers at once: enough for full speed, little scratch memory.
constexpr int64_t kForwardTokens = 512;
/// Of logits at once, of the reference and of the subject that is scored; at least one row.
constexpr int64_t kLogitBytes = int64_t{64} << 20;

/// A subject (or the reference) and what one chunk of it needs.
struct Subject {
  const EvalSubject* subject = nullptr;
  SequenceCache* cache = nullptr;
  std::vector<float> hidden;       // (context, hidden)
  std::vector<TokenScore> scores;  // of all chunks so far
};

/// Logits of some rows of one runner.
struct Block {
  std::vector<float> logits;  // (rows, vocab)
  std::vector<RowNorm> norms;

  Block(int64_t rows, int64_t vocab)
      : logits(static_cast<size_t>(rows * vocab)), norms(static_cast<size_t>(rows)) {}
  LogitRows view() const { return {logits.data(), norms.data()}; }
};

Status interrupted_status() { return Status(Code::interrupted, "interrupted"); }

/// Hidden states of a whole chunk, from an empty cache.
Status run_chunk(Subject& runner, const std::vector<int32_t>& tokens,
                 const std::function<bool()>& stop) {
  Runner& model = *runner.subject->model;
  if (model.quantized()) NIBBLE_TRY(model.set_plan(runner.subject->plan));
  runner.cache->set_length(0);
  const int64_t hidden = model.config().hidden;
  const auto length = static_cast<int64_t>(tokens.size());
  for (int64_t at = 0; at < length; at += kForwardTokens) {
    if (stop && stop()) return interrupted_status();
    const auto count = static_cast<size_t>(std::min(kForwardTokens, length - at));
    const SequenceItem item{runner.cache, {tokens.data() + at, count}};
    NIBBLE_TRY(model.forward({&item, 1}, HiddenRows::all, runner.hidden.data() + at * hidden));
  }
  return {};
}

/// Logits and norms of rows [row, row + rows) of the chunk.
Status run_head(Subject& runner, int64_t row, int64_t rows, int threads, Block& block) {
  Runner& model = *runner.subject->model;
  const ModelConfig& config = model.config();
  NIBBLE_TRY(model.logits(runner.hidden.data() + row * config.hidden, rows, block.logits.data()));
  const Status status =
      normalize_rows(block.logits.data(), rows, config.vocab, threads, block.norms.data());
  if (status.ok()) return {};
  return Status(status.code(), fmt::format("{}: {} (rows count from position {})",
                                           runner.subject->name, status.message(), row));
}

/// Scores a chunk whose hidden states are there, some rows at a time.
class Scorer {
 public:
  Scorer(const EvalOptions& options, int64_t vocab, bool paired)
      : first_(options.score_all ? 0 : options.context / 2),
        vocab_(vocab),
        threads_(options.threads > 0 ? options.threads : available_cpus()),
        rows_(std::clamp<int64_t>(kLogitBytes / (vocab * int64_t{sizeof(float)}), 1,
                                  options.context)),
        block_(rows_, vocab),
        base_(paired ? rows_ : 0, vocab) {}

  Status score(const std::vector<int32_t>& tokens, Subject* reference,
               std::vector<Subject>& runners) {
    const auto length = static_cast<int64_t>(tokens.size());
    // The last row predicts a token beyond the chunk.
    for (int64_t row = first_; row < length - 1; row += rows_) {
      const int64_t rows = std::min(rows_, length - 1 - row);
      if (reference != nullptr) NIBBLE_TRY(run_head(*reference, row, rows, threads_, base_));
      const LogitRows base = base_.view();
      for (Subject& runner : runners) {
        NIBBLE_TRY(run_head(runner, row, rows, threads_, block_));
        const size_t before = runner.scores.size();
        runner.scores.resize(before + static_cast<size_t>(rows));
        score_rows(block_.view(), reference != nullptr ? &base : nullptr, tokens.data() + row + 1,
                   rows, vocab_, threads_, runner.scores.data() + before);
      }
    }
    return {};
  }

 private:
  int64_t first_, vocab_;
  int threads_;
  int64_t rows_;
  Block block_, base_;
};

Status check_vocabularies(const EvalText& text, const EvalSubject* reference,
                          std::span<const EvalSubject> subjects, int64_t vocab) {
  bool same = reference == nullptr || reference->model->config().vocab == vocab;
  for (const EvalSubject& subject : subjects) same &= subject.model->config().vocab == vocab;
  if (!same) {
    return Status(Code::unsupported, "models with different vocabularies cannot be compared");
  }
  for (const auto& chunk : text.chunks) {
    for (const int32_t token : chunk) {
      if (token < 0 || token >= vocab) {
        return Status(Code::corrupt_file, fmt::format("the tokenizer gives token {}, the model has "
                                                      "{} of them",
                                                      token, vocab));
      }
    }
  }
  return {};
}

}  // namespace

Result<EvalText> make_eval_text(const std::vector<int32_t>& tokens, int32_t bos,
                                const std::string& name, const EvalOptions& options) {
  EvalText text;
  text.name = name;
  const auto count = static_cast<int64_t>(tokens.size());
  int64_t chunks = count / options.context;
  if (chunks == 0) {
    return Status(Code::invalid_argument, fmt::format("{}: {} tokens are less than one chunk of {}",
                                                      name, count, options.context));
  }
  if (options.max_chunks > 0) chunks = std::min(chunks, options.max_chunks);
  for (int64_t i = 0; i < chunks; ++i) {
    const auto from = tokens.begin() + i * options.context;
    text.chunks.emplace_back(from, from + options.context);
    if (bos >= 0) text.chunks.back().front() = bos;
  }
  return text;
}

Result<EvalText> make_eval_text(const Tokenizer& tokenizer, const std::string& name,
                                std::string_view text, const EvalOptions& options) {
  // What is added to no text at all: BOS, and from some tokenizers an EOS that is not wanted here.
  const std::vector<int32_t> added = tokenizer.encode("", true);
  const bool adds_bos =
      !added.empty() && tokenizer.bos_id().has_value() && added.front() == *tokenizer.bos_id();
  std::vector<int32_t> tokens;
  if (adds_bos) tokens.push_back(added.front());
  const std::vector<int32_t> plain = tokenizer.encode(text, false);
  tokens.insert(tokens.end(), plain.begin(), plain.end());
  return make_eval_text(tokens, adds_bos ? added.front() : -1, name, options);
}

Result<std::vector<EvalResult>> evaluate(const EvalText& text, const EvalSubject* reference,
                                         std::span<const EvalSubject> subjects,
                                         const EvalOptions& options,
                                         const std::function<bool()>& stop,
                                         const std::function<void(int64_t chunk)>& progress) {
  if (subjects.empty()) return std::vector<EvalResult>{};
  const int64_t vocab = subjects.front().model->config().vocab;
  NIBBLE_TRY(check_vocabularies(text, reference, subjects, vocab));

  // runs follow each other: one per model is enough
  std::map<Runner*, std::unique_ptr<SequenceCache>> caches;
  const auto make_runner = [&](const EvalSubject& subject) {
    Subject runner;
    runner.subject = &subject;
    std::unique_ptr<SequenceCache>& cache = caches[subject.model];
    if (cache == nullptr) cache = subject.model->make_cache();
    runner.cache = cache.get();
    runner.hidden.resize(static_cast<size_t>(options.context * subject.model->config().hidden));
    return runner;
  };
  std::vector<Subject> runners;
  for (const EvalSubject& subject : subjects) runners.push_back(make_runner(subject));
  std::optional<Subject> base;
  if (reference != nullptr) base = make_runner(*reference);

  Scorer scorer(options, vocab, reference != nullptr);
  for (size_t i = 0; i < text.chunks.size(); ++i) {
    const std::vector<int32_t>& tokens = text.chunks[i];
    if (base.has_value()) NIBBLE_TRY(run_chunk(*base, tokens, stop));
    for (Subject& runner : runners) NIBBLE_TRY(run_chunk(runner, tokens, stop));
    if (stop && stop()) return interrupted_status();
    NIBBLE_TRY(scorer.score(tokens, base.has_value() ? &*base : nullptr, runners));
    if (progress) progress(static_cast<int64_t>(i));
  }
  std::vector<EvalResult> results;
  for (Subject& runner : runners) {
    results.push_back(summarize(std::move(runner.scores), reference != nullptr));
  }
  return results;
}

}  // namespace nibble
