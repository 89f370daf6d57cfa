// Regular expressions of tokenizer.json, which are written for Oniguruma, run by PCRE2.
// Not here: what is done with the matches (tokenizer_pretokenizer.h).
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace nibble {

/// Part of a text, in bytes.
struct Span {
  size_t begin = 0;
  size_t end = 0;
};

/// The PCRE2 pattern that matches what `oniguruma` matches, with PCRE2's options UTF, UCP and
/// MULTILINE. What means the same in both is copied; \s, \w, \d, \h, \b, classes, properties,
/// quantifiers and option groups are rewritten where they differ; what has no counterpart is
/// `unsupported`.
Result<std::string> translate_pattern(std::string_view oniguruma);

class Regex {
 public:
  /// `where` names the pattern in messages. unsupported if PCRE2 cannot say the same.
  static Result<Regex> compile(std::string_view oniguruma, const std::string& where);
  /// The text itself, every character of it standing for itself.
  static Result<Regex> compile_literal(std::string_view literal, const std::string& where);
  /// A pattern in PCRE2's own syntax.
  static Result<Regex> compile_pcre2(const std::string& pattern, const std::string& where);

  /// All matches in `text` (valid UTF-8), left to right, as Oniguruma's scan gives them: an empty
  /// match is skipped only where the match before it ended. A pattern that runs into PCRE2's match
  /// limit, which no pattern of a real model does, matches nothing from there on.
  void find_all(std::string_view text, std::vector<Span>& matches) const;

 private:
  struct Compiled;
  explicit Regex(std::shared_ptr<const Compiled> code) : code_(std::move(code)) {}
  std::shared_ptr<const Compiled> code_;
};

}  // namespace nibble
