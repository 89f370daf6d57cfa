// How good a plan of a model is on a text: perplexity, and paired with a reference the measures of
// llama.cpp's KL block. The text is cut into chunks of `context` tokens, each run from an empty
// cache; as in llama.cpp the second half of each chunk is scored.
// Not here: the formulas (logit_scores.h).
#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "logit_scores.h"
#include "model/runner.h"
#include "model/tokenizer.h"

namespace nibble {

struct EvalOptions {
  int64_t context = 512;   // tokens per chunk, at least 2
  int64_t max_chunks = 0;  // 0: all whole chunks of the text
  bool score_all = false;  // score every token of a chunk but the first, not its second half
  int threads = 0;         // of the scoring; <= 0: all CPUs
};

/// A tokenized text cut into chunks. If the tokenizer adds BOS, the first token of every chunk is
/// replaced by it, as llama.cpp does: chunks then score the same tokens as there. Only whole chunks
/// are kept.
struct EvalText {
  std::string name;
  std::vector<std::vector<int32_t>> chunks;
};

/// invalid_argument if the text has less than one chunk.
Result<EvalText> make_eval_text(const Tokenizer& tokenizer, const std::string& name,
                                std::string_view text, const EvalOptions& options);
/// The same from tokens. bos < 0: none is added; otherwise tokens[0] is one already.
Result<EvalText> make_eval_text(const std::vector<int32_t>& tokens, int32_t bos,
                                const std::string& name, const EvalOptions& options);

/// Where logits come from: a model under a plan. Models with 16-bit weights ignore the plan.
struct EvalSubject {
  Runner* model = nullptr;
  ModelPlan plan;
  std::string name;  // "w4a8"
};

/// Scores every subject on the text against `reference` (null: plain perplexity) in one pass: the
/// reference runs once per chunk. Subjects and the reference may share one Runner; all have one
/// vocabulary. interrupted if `stop` says so; `progress` after each chunk. Holds logits of some
/// rows at a time, not of a chunk. Each model is left with the plan that was used last.
Result<std::vector<EvalResult>> evaluate(const EvalText& text, const EvalSubject* reference,
                                         std::span<const EvalSubject> subjects,
                                         const EvalOptions& options,
                                         const std::function<bool()>& stop = {},
                                         const std::function<void(int64_t chunk)>& progress = {});

}  // namespace nibble
