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
  for (const std::string& text : texts) {
    const std::vector<int32_t> ids = tokenizer.encode(text, false);
    const auto count = static_cast<int64_t>(ids.size());
    // Whole pieces only, but for a text that is shorter than one.
    for (int64_t at = 0; at == 0 || at + piece <= count; at += piece) {
      const int64_t end = std::min(count, at + piece);
      std::vector<int32_t> sequence = prefix;
      sequence.insert(sequence.end(), ids.begin() + at, ids.begin() + end);
      if (end > at) all.push_back(std::move(sequence));
    }
  }
  const auto found = static_cast<int64_t>(all.size());
  const int64_t taken = std::min(found, options.sequences);
  Sequences chosen;
  int64_t tokens = 0;
  for (int64_t i = 0; i < taken; ++i) {
    chosen.push_back(std::move(all[static_cast<size_t>(i * found / taken)]));
    tokens += static_cast<int64_t>(chosen.back().size() - prefix.size());
  }
  if (tokens < kFewestTokens) {
    return Status(Code::invalid_argument,
                  fmt::format("calibration would use {} tokens of the text, {} are needed", tokens,
                              kFewestTokens));
  }
  return chosen;
}

}  // namespace nibble::awq
