// The "decoder" of tokenizer.json: token texts back to text.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "base/status.h"

namespace nibble {

/// How bytes that are not UTF-8 come out of decoding.
enum class BrokenText {
  replaced,  // as the tokenizers package replaces them
  kept,      // as they are: what follows may complete a character
};

class DecoderStep {
 public:
  virtual ~DecoderStep() = default;
  virtual void apply(std::vector<std::string>& tokens, BrokenText broken) const = 0;
};

class TokenDecoder {
 public:
  /// ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace and Sequence; others are
  /// unsupported. Null joins tokens with spaces.
  static Result<TokenDecoder> parse(const nlohmann::json& value);

  std::string decode(std::vector<std::string> tokens, BrokenText broken) const;

 private:
  Status add(const nlohmann::json& value);
  bool present_ = false;
  std::vector<std::shared_ptr<const DecoderStep>> steps_;
};

}  // namespace nibble
