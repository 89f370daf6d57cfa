// The "post_processor" of tokenizer.json: which special tokens go around one encoded text.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "base/status.h"

namespace nibble {

class TokenTemplate {
 public:
  /// TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel (which changes no ids) and
  /// Sequence with at most one that adds tokens. Null adds nothing.
  static Result<TokenTemplate> parse(const nlohmann::json& value);

  /// `ids` with the special tokens of the template, or without them.
  std::vector<int32_t> apply(std::vector<int32_t> ids, bool add_special_tokens) const;

  bool present() const { return present_; }  // whether the file says what to add, if only nothing
  void set_prefix(int32_t id);               // instead of nothing: one token before the text

 private:
  static constexpr int32_t kText = -1;
  Status add(const nlohmann::json& value);

  bool present_ = false;
  std::vector<int32_t> pieces_ = {kText};
};

}  // namespace nibble
