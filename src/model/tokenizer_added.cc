// Added tokens: their ids and the search for them, rule by rule as in the tokenizers package.
#include "model/tokenizer_added.h"

#include <fmt/format.h>

#include <algorithm>

#include "format/message.h"
#include "model/tokenizer_json.h"
#include "model/tokenizer_unicode.h"

namespace nibble {
namespace {

Result<AddedToken> parse_token(const nlohmann::json& value) {
  const auto object = JsonObject::from(value, "tokenizer.json: added_tokens");
  if (!object.ok()) return object.status();
  AddedToken token;
  for (const char* key : {"id", "content"}) NIBBLE_TRY(object->require(key));
  NIBBLE_TRY(object->read_id("id", token.id));
  NIBBLE_TRY(object->read("content", token.content));
  NIBBLE_TRY(object->read("single_word", token.single_word));
  NIBBLE_TRY(object->read("lstrip", token.lstrip));
  NIBBLE_TRY(object->read("rstrip", token.rstrip));
  NIBBLE_TRY(object->read("normalized", token.normalized));
  NIBBLE_TRY(object->read("special", token.special));
  return token;
}

}  // namespace

bool AddedVocabulary::Matcher::add(std::string_view text, uint32_t token) {
  if (text.empty()) return false;
  starts_[static_cast<unsigned char>(text[0])] = true;
  uint32_t node = 0;
  for (const char c : text) {
    const uint64_t key = uint64_t{node} << 8 | static_cast<unsigned char>(c);
    const auto [child, is_new] = children_.try_emplace(key, static_cast<uint32_t>(ends_.size()));
    if (is_new) ends_.push_back(kNone);
    node = child->second;
  }
  if (ends_[node] != kNone) return false;
  ends_[node] = token;
  return true;
}

bool AddedVocabulary::Matcher::longest(std::string_view text, size_t at, size_t& bytes,
                                       uint32_t& token) const {
  uint32_t node = 0;
  bytes = 0;
  for (size_t i = at; i < text.size(); ++i) {
    const auto child = children_.find(uint64_t{node} << 8 | static_cast<unsigned char>(text[i]));
    if (child == children_.end()) break;
    node = child->second;
    if (ends_[node] == kNone) continue;
    bytes = i + 1 - at;
    token = ends_[node];
  }
  return bytes > 0;
}

Result<AddedVocabulary> AddedVocabulary::parse(const nlohmann::json& list, const Bpe& model,
                                               const Normalizer& normalizer) {
  AddedVocabulary added;
  added.id_limit_ = model.id_limit();
  if (list.is_null()) return added;
  const std::string where = "tokenizer.json: added_tokens";
  if (!list.is_array()) {
    return Status(Code::corrupt_file,
                  fmt::format("{}: expected a list, found {}", where, list.type_name()));
  }
  auto next_id = static_cast<uint32_t>(model.vocab_size());
  for (const nlohmann::json& item : list) {
    auto token = parse_token(item);
    if (!token.ok()) return token.status();
    if (token->content.empty()) continue;
    auto id = added.id_of(token->content);
    if (!id) id = model.id_of(token->content);
    if (!id) id = next_id++;
    if (*id != token->id) {
      return Status(Code::corrupt_file,
                    fmt::format("{}: {} says id {}, but its place makes it {}", where,
                                quote_name(token->content), token->id, *id));
    }
    token->decoded = token->content;
    if (token->normalized) normalizer.apply(token->decoded);
    added.id_limit_ = std::max<size_t>(added.id_limit_, size_t{*id} + 1);
    if (token->special) added.special_.insert(token->content);
    // A token given twice has the properties that are given last.
    const auto [known, is_new] =
        added.by_content_.try_emplace(token->content, added.tokens_.size());
    if (is_new) {
      added.by_id_[*id] = added.tokens_.size();
      added.tokens_.push_back(std::move(*token));
    } else {
      added.tokens_[known->second] = std::move(*token);
    }
  }
  bool words = false;
  for (size_t i = 0; i < added.tokens_.size(); ++i) {
    const AddedToken& token = added.tokens_[i];
    words = words || token.single_word;
    if (!added.matchers_[token.normalized ? 1 : 0].add(token.decoded, static_cast<uint32_t>(i))) {
      return Status(Code::unsupported,
                    fmt::format("{}: {} is empty, or like another token, once normalized", where,
                                quote_name(token.content)));
    }
  }
  if (words) {
    auto word = Regex::compile_pcre2(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}])", where);
    if (!word.ok()) return word.status();
    added.word_ = std::move(*word);
  }
  return added;
}

const AddedToken* AddedVocabulary::find(uint32_t id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &tokens_[found->second];
}

std::optional<uint32_t> AddedVocabulary::id_of(std::string_view content) const {
  const auto found = by_content_.find(std::string(content));
  if (found == by_content_.end()) return std::nullopt;
  return tokens_[found->second].id;
}

/// Whether `match` is no part of a longer word, if the token asks.
bool AddedVocabulary::accepts(const AddedToken& token, std::string_view text,
                              const Span& match) const {
  if (!token.single_word) return true;
  std::vector<Span> found;
  const auto is_word = [&](size_t at, size_t bytes) {
    word_->find_all(text.substr(at, bytes), found);
    return !found.empty();
  };
  if (match.begin > 0) {
    const size_t bytes = unicode::decode_before(text, match.begin).bytes;
    if (is_word(match.begin - bytes, bytes)) return false;
  }
  return match.end == text.size() || !is_word(match.end, unicode::decode_at(text, match.end).bytes);
}

void AddedVocabulary::split(std::string_view text, bool normalized, bool with_special,
                            std::vector<Part>& parts) const {
  parts.clear();
  const Matcher& matcher = matchers_[normalized ? 1 : 0];
  size_t done = 0;  // where the part after the last token begins
  for (size_t at = 0; at < text.size() && !matcher.empty();) {
    size_t bytes = 0;
    uint32_t index = 0;
    if (!matcher.starts(text[at]) || !matcher.longest(text, at, bytes, index)) {
      ++at;
      continue;
    }
    Span match{at, at + bytes};
    at = match.end;
    const AddedToken& token = tokens_[index];
    if (!with_special && special_.contains(token.content)) continue;
    if (!accepts(token, text, match)) continue;
    while (token.lstrip && match.begin > done) {
      const auto c = unicode::decode_before(text, match.begin);
      if (!unicode::is_white_space(c.value)) break;
      match.begin -= c.bytes;
    }
    while (token.rstrip && match.end < text.size()) {
      const auto c = unicode::decode_at(text, match.end);
      if (!unicode::is_white_space(c.value)) break;
      match.end += c.bytes;
    }
    if (done < match.begin) parts.push_back({{done, match.begin}, -1});
    parts.push_back({match, static_cast<int32_t>(token.id)});
    done = match.end;
  }
  if (done < text.size()) parts.push_back({{done, text.size()}, -1});
}

}  // namespace nibble
