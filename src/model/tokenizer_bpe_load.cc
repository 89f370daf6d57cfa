// Reading the model: start-up time of a tokenizer is spent here, so the vocabulary and the merges
// go straight from the text into their tables.
#include <fmt/format.h>

#include <algorithm>

#include "format/checkpoint.h"
#include "format/message.h"
#include "model/tokenizer_bpe.h"
#include "model/tokenizer_bytes.h"
#include "model/tokenizer_json.h"
#include "model/tokenizer_unicode.h"

namespace nibble {
namespace {

/// Ids index an array; real files leave few of them out.
constexpr uint64_t kMaxId = 16'777'216;
constexpr uint64_t kMaxMerges = 16'777'216;

Status corrupt(const std::string& message) { return Status(Code::corrupt_file, message); }

}  // namespace

Result<Bpe> Bpe::parse(std::string_view model_json, const std::string& where) {
  nlohmann::json options = nlohmann::json::object();
  std::string_view vocab;
  std::string_view merges;
  JsonCursor cursor(model_json, where);
  std::string scratch;
  std::string_view key;
  cursor.enter_object();
  for (bool first = true; cursor.next_key(first, key, scratch);) {
    std::string_view value;
    if (!cursor.skip(value)) break;
    if (key == "vocab") {
      vocab = value;
    } else if (key == "merges") {
      merges = value;
    } else {
      auto option = parse_json(value, where);
      if (!option.ok()) return option.status();
      options[std::string(key)] = std::move(*option);
    }
  }
  NIBBLE_TRY(cursor.status());
  Bpe model;
  NIBBLE_TRY(model.parse_options(options, where));
  if (vocab.empty() || merges.empty()) {
    return corrupt(fmt::format("{}: no {}", where, vocab.empty() ? "vocab" : "merges"));
  }
  NIBBLE_TRY(model.parse_vocab(vocab, where));
  NIBBLE_TRY(model.parse_merges(merges, where));
  NIBBLE_TRY(model.check_unknowns(where));
  return model;
}

Status Bpe::parse_options(const nlohmann::json& document, const std::string& where) {
  const auto options = JsonObject::from(document, where);
  if (!options.ok()) return options.status();
  // The oldest files do not say the type; only BPE has merges.
  std::string type = "BPE";
  NIBBLE_TRY(options->read("type", type));
  if (type != "BPE") {
    return Status(Code::unsupported, fmt::format("{}: the model type {} (only BPE is supported)",
                                                 where, quote_name(type)));
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    std::string affix;
    NIBBLE_TRY(options->read(key, affix));
    if (!affix.empty()) {
      return Status(Code::unsupported, fmt::format("{}: BPE with a {}", where, key));
    }
  }
  if (const auto* dropout = options->find("dropout")) {
    if (!dropout->is_number()) return options->wrong("dropout", "a number");
    if (dropout->get<double>() != 0.0) {
      return Status(Code::unsupported, where + ": BPE with dropout");
    }
  }
  NIBBLE_TRY(options->read("unk_token", unk_token_));
  NIBBLE_TRY(options->read("fuse_unk", fuse_unk_));
  NIBBLE_TRY(options->read("byte_fallback", byte_fallback_));
  return options->read("ignore_merges", ignore_merges_);
}

Status Bpe::parse_vocab(std::string_view json, const std::string& where) {
  JsonCursor cursor(json, where + ": vocab");
  arena_.reserve(json.size() / 2);
  uint64_t end_id = 0;
  std::vector<std::pair<uint32_t, Text>> tokens;
  tokens.reserve(json.size() / 16);
  std::string scratch;
  std::string_view token;
  cursor.enter_object();
  for (bool first = true; cursor.next_key(first, token, scratch);) {
    uint32_t id = 0;
    if (!cursor.unsigned_integer(id)) break;
    tokens.push_back(
        {id, {static_cast<uint32_t>(arena_.size()), static_cast<uint32_t>(token.size())}});
    arena_ += token;
    end_id = std::max(end_id, uint64_t{id} + 1);
    if (end_id > kMaxId || arena_.size() > UINT32_MAX) {
      return corrupt(fmt::format("{}: vocab: the token id {} is out of range", where, id));
    }
  }
  NIBBLE_TRY(cursor.status());
  small_ids_.fill(-1);
  byte_ids_.fill(-1);
  size_ = tokens.size();
  texts_.assign(end_id, {});
  ids_.reserve(size_);
  const auto text_of_id = [this](uint32_t id) { return text_of(id); };
  for (const auto& [id, text] : tokens) {
    if (texts_[id].size != kAbsent) {
      return corrupt(fmt::format("{}: vocab: the id {} is given twice", where, id));
    }
    texts_[id] = text;
    index_small_token(text_of(id), id);
    if (!ids_.insert(text_of(id), id, text_of_id)) {
      return corrupt(
          fmt::format("{}: vocab: the token {} is given twice", where, quote_name(text_of(id))));
    }
  }
  return {};
}

/// Notes tokens of one small character, and <0x00> ... <0xFF>.
void Bpe::index_small_token(std::string_view token, uint32_t id) {
  const auto number = static_cast<int32_t>(id);
  if (token.empty()) return;
  if (const auto c = unicode::decode_at(token, 0);
      c.bytes == token.size() && c.value < small_ids_.size()) {
    small_ids_[c.value] = number;
  }
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return;
  const size_t high = kDigits.find(token[3]);
  const size_t low = kDigits.find(token[4]);
  if (high != std::string_view::npos && low != std::string_view::npos) {
    byte_ids_[high * 16 + low] = number;
  }
}

Status Bpe::parse_merges(std::string_view json, const std::string& where) {
  // Two quotation marks at least for each merge bound their number before anything is allocated.
  const auto quotes = static_cast<uint64_t>(std::count(json.begin(), json.end(), '"'));
  JsonCursor cursor(json, where + ": merges");
  cursor.enter_array();
  bool first = true;
  if (!cursor.next_element(first)) return cursor.status();
  const bool pairs = cursor.peek_is('[');
  const uint64_t most = quotes / (pairs ? 4 : 2);
  if (most > kMaxMerges) return corrupt(where + ": too many merges");
  merges_.reserve(most);
  std::string scratch_left;
  std::string scratch_right;
  std::string_view left;
  std::string_view right;
  uint32_t rank = 0;
  do {
    if (pairs) {
      bool first_half = true;
      const bool complete = cursor.enter_array() && cursor.next_element(first_half) &&
                            cursor.string(left, scratch_left) && cursor.next_element(first_half) &&
                            cursor.string(right, scratch_right);
      if (!complete || cursor.next_element(first_half)) cursor.fail("expected two strings");
    } else if (cursor.string(left, scratch_left)) {
      // "#version" lines come from merges.txt and take no rank.
      if (left.starts_with("#version")) continue;
      const size_t space = left.find(' ');
      if (space == std::string_view::npos || left.find(' ', space + 1) != std::string_view::npos) {
        cursor.fail("expected two tokens with a space between them");
      } else {
        right = left.substr(space + 1);
        left = left.substr(0, space);
      }
    }
    NIBBLE_TRY(cursor.status());
    NIBBLE_TRY(add_merge(left, right, rank++, where));
  } while (cursor.next_element(first));
  return cursor.status();
}

Status Bpe::add_merge(std::string_view left, std::string_view right, uint32_t rank,
                      const std::string& where) {
  const auto left_id = id_of(left);
  const auto right_id = id_of(right);
  merged_.assign(left);
  merged_ += right;
  // Tokens are mostly numbered in the order of their merges: worth a look before searching.
  const uint32_t guess = merged_id_ + 1;
  const bool guessed = !merged_.empty() && text_of(guess) == merged_;
  const auto id = guessed ? std::optional(guess) : id_of(merged_);
  if (!left_id || !right_id || !id) {
    return corrupt(fmt::format("{}: merges: the token {} is not in the vocabulary", where,
                               quote_name(!left_id    ? left
                                          : !right_id ? right
                                                      : merged_)));
  }
  merged_id_ = *id;
  // Of merges given twice the later one counts.
  merges_[uint64_t{*left_id} << 32 | *right_id] = {rank, *id};
  return {};
}

/// An unknown token that is not in the vocabulary fails in the tokenizers package when it is first
/// needed. Here it is refused, unless it never is: byte-level vocabularies know every byte.
Status Bpe::check_unknowns(const std::string& where) {
  if (!unk_token_) return {};
  if (const auto id = id_of(*unk_token_)) {
    unk_id_ = static_cast<int32_t>(*id);
    return {};
  }
  for (unsigned byte = 0; byte < 256; ++byte) {
    if (small_ids_[byte_level_character(static_cast<unsigned char>(byte))] < 0) {
      return corrupt(fmt::format("{}: the unk_token {} is not in the vocabulary", where,
                                 quote_name(*unk_token_)));
    }
  }
  return {};
}

}  // namespace nibble
