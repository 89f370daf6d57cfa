// Templates reduce to a list of ids with a place for the text.
#include "model/tokenizer_template.h"

#include <fmt/format.h>

#include "format/message.h"
#include "model/tokenizer_json.h"

namespace nibble {
namespace {

using nlohmann::json;

Status wrong(const std::string& where, const char* what) {
  return Status(Code::corrupt_file, fmt::format("{}: {}", where, what));
}

/// ["<s>", 1]: the form of Bert and Roberta.
Status read_pair(const JsonObject& object, const char* key, int32_t& id) {
  const json* pair = object.find(key);
  const bool right = pair != nullptr && pair->is_array() && pair->size() == 2 &&
                     (*pair)[1].is_number_unsigned() && (*pair)[1].get<uint64_t>() <= INT32_MAX;
  if (!right) return object.wrong(key, "a token and its id");
  id = (*pair)[1].get<int32_t>();
  return {};
}

/// Appends the ids of the special token that a template calls `name`.
Status append_special(const JsonObject& object, const std::string& name,
                      std::vector<int32_t>& pieces) {
  const json* all = object.find("special_tokens");
  if (all == nullptr || !all->is_object()) return object.wrong("special_tokens", "an object");
  const auto token = all->find(name);
  if (token == all->end() || !token->is_object() || !token->contains("ids") ||
      !(*token)["ids"].is_array()) {
    return wrong(object.where(), "a template with a token that special_tokens does not have");
  }
  for (const json& id : (*token)["ids"]) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
      return wrong(object.where(), "a special token whose ids are not ids");
    }
    pieces.push_back(id.get<int32_t>());
  }
  return {};
}

}  // namespace

Result<TokenTemplate> TokenTemplate::parse(const json& value) {
  TokenTemplate result;
  if (value.is_null()) return result;
  NIBBLE_TRY(result.add(value));
  return result;
}

Status TokenTemplate::add(const json& value) {
  const auto object = JsonObject::from(value, "tokenizer.json: post_processor");
  if (!object.ok()) return object.status();
  std::string type;
  NIBBLE_TRY(object->require("type"));
  NIBBLE_TRY(object->read("type", type));
  const std::string where = "tokenizer.json: the post_processor " + quote_name(type);
  const auto named = JsonObject::from(value, where);
  if (type == "ByteLevel") return {};
  if (type == "Sequence") {
    const json* list = named->find("processors");
    if (list == nullptr || !list->is_array()) return named->wrong("processors", "a list");
    for (const json& item : *list) NIBBLE_TRY(add(item));
    return {};
  }
  if (present_) return Status(Code::unsupported, where + " after another that adds tokens");
  present_ = true;
  if (type == "BertProcessing" || type == "RobertaProcessing") {
    int32_t before = 0;
    int32_t after = 0;
    NIBBLE_TRY(read_pair(*named, "cls", before));
    NIBBLE_TRY(read_pair(*named, "sep", after));
    pieces_ = {before, kText, after};
    return {};
  }
  if (type != "TemplateProcessing") return Status(Code::unsupported, where);
  const json* single = named->find("single");
  if (single == nullptr || !single->is_array()) return named->wrong("single", "a list");
  pieces_.clear();
  for (const json& piece : *single) {
    const bool one = piece.is_object() && piece.size() == 1 && piece.begin()->is_object() &&
                     piece.begin()->contains("id") && (*piece.begin())["id"].is_string();
    if (!one) return wrong(where, "a template with a piece that is none");
    const auto id = (*piece.begin())["id"].get<std::string>();
    if (piece.begin().key() == "Sequence" && id == "A") {
      pieces_.push_back(kText);
    } else if (piece.begin().key() == "SpecialToken") {
      NIBBLE_TRY(append_special(*named, id, pieces_));
    } else {
      return wrong(where, "a template for one text with a piece that is neither it nor a token");
    }
  }
  return {};
}

void TokenTemplate::set_prefix(int32_t id) {
  present_ = true;
  pieces_ = {id, kText};
}

std::vector<int32_t> TokenTemplate::apply(std::vector<int32_t> ids, bool add_special_tokens) const {
  if (pieces_.size() == 1 && pieces_[0] == kText) return ids;
  std::vector<int32_t> out;
  out.reserve(ids.size() + pieces_.size());
  for (const int32_t piece : pieces_) {
    if (piece == kText) {
      out.insert(out.end(), ids.begin(), ids.end());
    } else if (add_special_tokens) {
      out.push_back(piece);
    }
  }
  return out;
}

}  // namespace nibble
