// Generating text with a model: several prompts decoded together, and where another plan of the
// same model would have gone another way. Works on tokens; text is generate.cc's.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "model/runner.h"
#include "model/sampler.h"

namespace nibble {

enum class Finish : int { running, eos, length, interrupted };
const char* finish_name(Finish finish);  // "eos", "length", "interrupted"

/// One prompt and what became of it.
struct Sequence {
  std::vector<int32_t> prompt;  // at least one token
  int64_t limit = 0;            // tokens to generate at most
  std::vector<int32_t> tokens;  // generated; a stop token is the last one
  Finish finish = Finish::running;
};

struct GenerateOptions {
  SamplerOptions sampler;            // sequence i uses seed + i
  std::vector<int32_t> stop_tokens;  // sorted
  std::function<bool()> stop;        // may be empty; asked between forward passes
  /// Every token but a stop token; false ends generation as `stop` does. May be empty.
  std::function<bool(size_t sequence, int32_t token)> on_token;
  int64_t pass_tokens = 512;  // prompt tokens that go through the layers at once, at most
  // Sequences that are decoded together, at most; the others wait until one ends. 0: all of them
  int64_t batch = 0;
};

struct GenerateTimes {
  int64_t prompt_tokens = 0, decode_tokens = 0;  // the latter without each sequence's first
  double prompt_seconds = 0;                     // reading prompts, each up to its first token
  double decode_seconds = 0;                     // of all later ones
};

/// Fills tokens and finish of every sequence. An interruption is not an error.
Status generate(Runner& model, std::span<Sequence> sequences, const GenerateOptions& options,
                GenerateTimes& times);

/// The first token that another plan chooses differently after the same tokens.
struct Divergence {
  int64_t index = 0;  // of the generated tokens, from 0
  int32_t token = 0, other_token = 0;
  float margin = 0;        // logit of `token` less that of `other_token`, under the plan that ran
  float other_margin = 0;  // logit of `other_token` less that of `token`, under the other plan
};

/// Runs `other` over a finished sequence. Rows do not depend on how a text is cut into forward
/// passes (no plan here may have Granularity::tensor), so this is what generating under `other`
/// would have chosen, at the speed of a prompt. Leaves the model with one of the two plans.
/// nothing: they agree on every token.
Result<std::optional<Divergence>> first_divergence(Runner& model, const ModelPlan& plan,
                                                   const ModelPlan& other, const Sequence& sequence,
                                                   const SamplerOptions& sampler,
                                                   const std::function<bool()>& stop);

}  // namespace nibble
