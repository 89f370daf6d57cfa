// The "normalizer" of tokenizer.json: what is done to text before it is split.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/tokenizer_regex.h"

namespace nibble {

/// One step. Valid UTF-8 in and out; safe to use from several threads.
class NormalizerStep {
 public:
  virtual ~NormalizerStep() = default;
  virtual void apply(std::string& text) const = 0;
  /// Whether what starts a part of the result also starts that part of the text: true for steps
  /// that replace one character by one.
  virtual bool keeps_positions() const { return false; }
};

class Normalizer {
 public:
  /// NFC, NFD, NFKC, NFKD, Prepend, Replace, Strip, Lowercase, ByteLevel and Sequence; others
  /// are unsupported. Null is no normalizer.
  static Result<Normalizer> parse(const nlohmann::json& value);

  void apply(std::string& text) const {
    for (const auto& step : steps_) step->apply(text);
  }
  bool empty() const { return steps_.empty(); }
  bool keeps_positions() const;

 private:
  Status add(const nlohmann::json& value, const std::string& where);
  std::vector<std::shared_ptr<const NormalizerStep>> steps_;
};

/// The pattern of Replace and Split: {"String": ...} or {"Regex": ...}.
Result<Regex> parse_pattern(const nlohmann::json& value, const std::string& where);

/// Replaces every match.
std::string replace_all(const Regex& regex, std::string_view text, std::string_view content);

/// Appends the characters of byte-level tokenizers for the bytes of `text`.
void append_byte_level(std::string_view text, std::string& out);

}  // namespace nibble
