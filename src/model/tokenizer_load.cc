// Reading the files of a tokenizer.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "format/checkpoint.h"
#include "format/message.h"
#include "format/safetensors.h"
#include "model/tokenizer_json.h"
#include "model/tokenizer_state.h"
#include "model/tokenizer_unicode.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kMaxTokenizerBytes = 500'000'000;

/// A file of the directory that need not be there.
Result<std::optional<MappedFile>> open_optional(const fs::path& path) {
  std::error_code ignored;
  if (!fs::exists(path, ignored)) return std::optional<MappedFile>();
  auto file = MappedFile::open(path.string());
  if (!file.ok()) return file.status();
  return std::optional<MappedFile>(std::move(*file));
}

std::string_view text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

/// An absent file reads as an empty object.
Result<json> parse_optional(std::string_view text, const char* name) {
  if (text.empty()) return json::object();
  auto document = parse_json(text, name);
  if (document.ok() && !document->is_object()) {
    return Status(Code::corrupt_file, fmt::format("{}: expected an object", name));
  }
  return document;
}

/// The id of a token that a config names as a string or as an object with its content. A name that
/// is no token of the vocabulary counts as none: configs name tokens that were never added.
Status find_named(const json& config, const char* file, const char* key, const Tokenizer& tokenizer,
                  std::optional<int32_t>& id) {
  const auto object = JsonObject::from(config, file);
  const json* value = object->find(key);
  if (value == nullptr || id) return {};
  if (value->is_object()) {
    const auto content = value->find("content");
    if (content == value->end()) return object->wrong(key, "a token");
    value = &*content;
  }
  if (!value->is_string()) return object->wrong(key, "a token");
  id = tokenizer.token_id(value->get<std::string>());
  return {};
}

/// eos_token_id and the like: an id or a list of them. Negative ones mean none.
Status read_ids(const json& config, const char* file, const char* key, std::vector<int32_t>& ids) {
  const auto object = JsonObject::from(config, file);
  const json* value = object->find(key);
  if (value == nullptr) return {};
  const json list = value->is_array() ? *value : json::array({*value});
  for (const json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() > INT32_MAX) {
      return object->wrong(key, "a token id, or a list of them");
    }
    const auto number = id.get<int64_t>();
    if (number >= 0 && std::find(ids.begin(), ids.end(), number) == ids.end()) {
      ids.push_back(static_cast<int32_t>(number));
    }
  }
  return {};
}

/// The sections of tokenizer.json; the model stays text.
struct Sections {
  std::string_view model;
  json rest = json::object();
};

Result<Sections> read_sections(std::string_view text) {
  const char* name = "tokenizer.json";
  if (text.size() > kMaxTokenizerBytes) {
    return Status(Code::corrupt_file, fmt::format("{}: {} bytes", name, text.size()));
  }
  if (const size_t valid = unicode::valid_prefix(text); valid != text.size()) {
    return Status(Code::corrupt_file, fmt::format("{}: byte {} is not UTF-8", name, valid));
  }
  Sections sections;
  JsonCursor cursor(text, name);
  std::string scratch;
  std::string_view key;
  cursor.enter_object();
  for (bool first = true; cursor.next_key(first, key, scratch);) {
    std::string_view value;
    if (!cursor.skip(value)) break;
    if (key == "model") {
      sections.model = value;
      continue;
    }
    auto section = parse_json(value, name);
    if (!section.ok()) return section.status();
    sections.rest[std::string(key)] = std::move(*section);
  }
  if (!cursor.at_end()) cursor.fail("text after the document");
  NIBBLE_TRY(cursor.status());
  if (sections.model.empty()) return Status(Code::corrupt_file, "tokenizer.json: no model");
  if (const auto version = sections.rest.find("version");
      version != sections.rest.end() && *version != "1.0") {
    return Status(Code::unsupported, "tokenizer.json: a version other than 1.0");
  }
  return sections;
}

/// A copy of the member, or null.
const json& section(const Sections& sections, const char* key) {
  static const json kNull;
  const auto found = sections.rest.find(key);
  return found == sections.rest.end() ? kNull : *found;
}

}  // namespace

Result<Tokenizer> Tokenizer::parse(const TokenizerFiles& files) {
  auto sections = read_sections(files.tokenizer);
  if (!sections.ok()) return sections.status();
  const auto state = std::make_shared<State>();
  // Small parts first: what is not supported is said before the vocabulary is read.
  const auto set = [](auto parsed, auto& out) -> Status {
    if (!parsed.ok()) return parsed.status();
    out = std::move(*parsed);
    return {};
  };
  NIBBLE_TRY(set(Normalizer::parse(section(*sections, "normalizer")), state->normalizer));
  NIBBLE_TRY(set(PreTokenizer::parse(section(*sections, "pre_tokenizer")), state->pre_tokenizer));
  NIBBLE_TRY(
      set(TokenTemplate::parse(section(*sections, "post_processor")), state->post_processor));
  NIBBLE_TRY(set(TokenDecoder::parse(section(*sections, "decoder")), state->decoder));
  if (state->pre_tokenizer.needs_start() && !state->normalizer.keeps_positions()) {
    return Status(Code::unsupported,
                  "tokenizer.json: a Metaspace with prepend_scheme first after a normalizer that "
                  "moves text");
  }
  NIBBLE_TRY(set(Bpe::parse(sections->model, "tokenizer.json: model"), state->model));
  NIBBLE_TRY(set(
      AddedVocabulary::parse(section(*sections, "added_tokens"), state->model, state->normalizer),
      state->added));

  auto tokenizer_config = parse_optional(files.tokenizer_config, "tokenizer_config.json");
  if (!tokenizer_config.ok()) return tokenizer_config.status();
  auto special_tokens = parse_optional(files.special_tokens_map, "special_tokens_map.json");
  if (!special_tokens.ok()) return special_tokens.status();
  auto generation = parse_optional(files.generation_config, "generation_config.json");
  if (!generation.ok()) return generation.status();
  auto config = parse_optional(files.config, "config.json");
  if (!config.ok()) return config.status();

  const Tokenizer tokenizer{std::shared_ptr<const State>(state)};
  std::optional<int32_t> eos;
  for (const auto& [document, file] : {std::pair(&*tokenizer_config, "tokenizer_config.json"),
                                       std::pair(&*special_tokens, "special_tokens_map.json")}) {
    NIBBLE_TRY(find_named(*document, file, "bos_token", tokenizer, state->bos_id));
    NIBBLE_TRY(find_named(*document, file, "eos_token", tokenizer, eos));
  }
  NIBBLE_TRY(read_ids(*generation, "generation_config.json", "eos_token_id", state->eos_ids));
  if (state->eos_ids.empty()) {
    NIBBLE_TRY(read_ids(*config, "config.json", "eos_token_id", state->eos_ids));
  }
  if (eos && !tokenizer.is_eos(*eos)) state->eos_ids.push_back(*eos);

  bool add_bos = false;
  NIBBLE_TRY(
      JsonObject::from(*tokenizer_config, "tokenizer_config.json")->read("add_bos_token", add_bos));
  if (add_bos && state->bos_id && !state->post_processor.present()) {
    state->post_processor.set_prefix(*state->bos_id);
  }
  return tokenizer;
}

Result<Tokenizer> Tokenizer::load(const std::string& directory) {
  const fs::path root(directory);
  std::error_code ignored;
  if (!fs::exists(root / "tokenizer.json", ignored)) {
    for (const char* other : {"tokenizer.model", "vocab.json", "tekken.json"}) {
      if (!fs::exists(root / other, ignored)) continue;
      return Status(Code::unsupported,
                    fmt::format("{}: a tokenizer only as {}: convert it to tokenizer.json with "
                                "transformers",
                                directory, other));
    }
    return Status(Code::io_error, fmt::format("{}: no tokenizer.json", directory));
  }
  std::vector<std::optional<MappedFile>> kept;
  kept.reserve(5);
  TokenizerFiles files;
  const std::pair<const char*, std::string_view*> names[] = {
      {"tokenizer.json", &files.tokenizer},
      {"tokenizer_config.json", &files.tokenizer_config},
      {"special_tokens_map.json", &files.special_tokens_map},
      {"generation_config.json", &files.generation_config},
      {"config.json", &files.config}};
  for (const auto& [name, text] : names) {
    auto file = open_optional(root / name);
    if (!file.ok()) return file.status();
    kept.push_back(std::move(*file));
    if (kept.back()) *text = text_of(*kept.back());
  }
  return parse(files);
}

}  // namespace nibble
