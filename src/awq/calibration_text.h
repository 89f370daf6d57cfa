// The text that AWQ's searches measure inputs on: the user's files or the bundled one, as token
// sequences. Not here: tokenizing (model/tokenizer.h).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "awq/calibration_run.h"
#include "model/tokenizer.h"

namespace nibble::awq {

/// data/calibration.txt, as it was when the library was built; see data/README.md.
std::string_view bundled_calibration_text();

struct SequenceOptions {
  int64_t sequences = 32;  // at most
  int64_t length = 512;    // tokens of each, the beginning-of-sequence token included
};

/// Sequences spread evenly over all texts; each begins with BOS if the tokenizer adds one. A text
/// too short for one sequence of the full length gives one shorter sequence. invalid_argument if
/// there is not enough text for kFewestTokens tokens.
inline constexpr int64_t kFewestTokens = 64;
Result<Sequences> make_sequences(const Tokenizer& tokenizer, std::span<const std::string> texts,
                                 const SequenceOptions& options);

}  // namespace nibble::awq
