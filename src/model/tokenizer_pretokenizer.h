// The "pre_tokenizer" of tokenizer.json: how text is cut into the pieces that are encoded one by
// one.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/tokenizer_regex.h"

namespace nibble {

/// A text and the pieces of it that are left: in order, none empty, none overlapping.
struct Pieces {
  std::string text;
  std::vector<Span> spans;
  /// Whether text[0] is the first character of what the user wrote, which Metaspace asks.
  bool at_start = false;

  std::string_view piece(const Span& span) const {
    return std::string_view(text).substr(span.begin, span.end - span.begin);
  }
};

class PreTokenizerStep {
 public:
  virtual ~PreTokenizerStep() = default;
  virtual void apply(Pieces& pieces) const = 0;
  /// Whether it only cuts: what starts a piece also starts that part of the text.
  virtual bool only_cuts() const { return true; }
  virtual bool needs_start() const { return false; }  // reads Pieces::at_start
};

class PreTokenizer {
 public:
  /// ByteLevel, Split, Digits, Whitespace, WhitespaceSplit, CharDelimiterSplit, Metaspace and
  /// Sequence; others are unsupported. Null is no pre-tokenizer.
  static Result<PreTokenizer> parse(const nlohmann::json& value);

  void apply(Pieces& pieces) const {
    for (const auto& step : steps_) step->apply(pieces);
  }
  /// Whether at_start must be right for the text before the first step.
  bool needs_start() const;

 private:
  Status add(const nlohmann::json& value);
  std::vector<std::shared_ptr<const PreTokenizerStep>> steps_;
};

}  // namespace nibble
