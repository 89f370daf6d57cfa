#include "awq/calibration_text.h"

#include <fmt/format.h>

#include <algorithm>

namespace nibble::awq {
namespace {

/// What the tokenizer puts before every text.
std::vector<int32_t> beginning(const Tokenizer& tokenizer) {
  const std::vector<int32_t> bare = tokenizer.encode("a", false),
                             whole = tokenizer.encode("a", true);
  const auto at = std::search(whole.begin(), whole.end(), bare.begin(), bare.end());
  return {whole.begin(), at == whole.end() ? whole.begin() : at};
}

}  // namespace

Result<Sequences> make_sequences(const Tokenizer& tokenizer, std::span<const std::string> texts,
                                 const SequenceOptions& options) {
  const std::vector<int32_t> prefix = beginning(tokenizer);
  const auto piece = std::max<int64_t>(1, options.length - static_cast<int64_t>(prefix.size()));
  Sequences all;
  int64_t tokens = 0;
  for (const std::string& text : texts) {
    const std::vector<int32_t> ids = tokenizer.encode(text, false);
    const auto count = static_cast<int64_t>(ids.size());
    // Whole pieces only, but for a text that is shorter than one.
    for (int64_t at = 0; at == 0 || at + piece <= count; at += piece) {
      const int64_t end = std::min(count, at + piece);
      std::vector<int32_t> sequence = prefix;
      sequence.insert(sequence.end(), ids.begin() + at, ids.begin() + end);
      tokens += static_cast<int64_t>(sequence.size());
      if (end > at) all.push_back(std::move(sequence));
    }
  }
  if (tokens < kFewestTokens) {
    return Status(
        Code::invalid_argument,
        fmt::format("the calibration text has {} tokens, {} are needed", tokens, kFewestTokens));
  }
  const auto found = static_cast<int64_t>(all.size());
  if (found <= options.sequences) return all;
  Sequences chosen;
  for (int64_t i = 0; i < options.sequences; ++i) {
    chosen.push_back(std::move(all[static_cast<size_t>(i * found / options.sequences)]));
  }
  return chosen;
}

}  // namespace nibble::awq
