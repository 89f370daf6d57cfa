// The "added_tokens" of tokenizer.json: texts that are found before anything else is done to the
// input and become one id each, special (control) tokens among them.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/status.h"
#include "model/tokenizer_bpe.h"
#include "model/tokenizer_normalizer.h"
#include "model/tokenizer_regex.h"

namespace nibble {

struct AddedToken {
  std::string content;
  uint32_t id = 0;
  bool single_word = false;  // not within a word
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // and after it
  bool normalized = true;    // searched for in normalized text, itself normalized
  bool special = false;      // left out of decoded text on request
  std::string decoded;       // its text when decoding: normalized if it was found so
};

class AddedVocabulary {
 public:
  /// Ids are those of the tokenizers package: the model's own for a token that it has, otherwise
  /// the next free one. corrupt_file if the file says another id.
  static Result<AddedVocabulary> parse(const nlohmann::json& list, const Bpe& model,
                                       const Normalizer& normalizer);

  /// A part of the text: an added token, or text to encode (id -1).
  struct Part {
    Span span;
    int32_t id = -1;
  };
  /// Cuts `text` at tokens that are searched for before (normalized = false) or after normalizing:
  /// leftmost, of several the longest. Without `with_special`, special tokens are plain text.
  void split(std::string_view text, bool normalized, bool with_special,
             std::vector<Part>& parts) const;

  const AddedToken* find(uint32_t id) const;
  std::optional<uint32_t> id_of(std::string_view content) const;
  bool is_special(std::string_view content) const {
    return special_.contains(std::string(content));
  }
  const std::vector<AddedToken>& tokens() const { return tokens_; }
  size_t id_limit() const { return id_limit_; }

 private:
  /// The tokens of one kind as a tree over bytes.
  class Matcher {
   public:
    bool add(std::string_view text, uint32_t token);  // false if it is there or empty
    bool empty() const { return ends_.size() == 1; }
    /// Whether any token starts with `byte`, and the longest that starts at `at`.
    bool starts(char byte) const { return starts_[static_cast<unsigned char>(byte)]; }
    bool longest(std::string_view text, size_t at, size_t& bytes, uint32_t& token) const;

   private:
    static constexpr uint32_t kNone = UINT32_MAX;
    std::array<bool, 256> starts_{};
    std::vector<uint32_t> ends_ = {kNone};             // by node: the token that ends there
    std::unordered_map<uint64_t, uint32_t> children_;  // node and byte to node
  };

  bool accepts(const AddedToken& token, std::string_view text, const Span& match) const;

  std::vector<AddedToken> tokens_;
  std::unordered_map<std::string, size_t> by_content_;  // to an index of tokens_
  std::unordered_map<uint32_t, size_t> by_id_;
  std::unordered_set<std::string> special_;
  std::array<Matcher, 2> matchers_;  // not normalized, normalized
  std::optional<Regex> word_;        // one character of a word
  size_t id_limit_ = 0;
};

}  // namespace nibble
