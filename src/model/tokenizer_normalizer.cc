// The normalizers that language models use.
#include "model/tokenizer_normalizer.h"

#include <fmt/format.h>

#include <algorithm>

#include "format/message.h"
#include "model/tokenizer_bytes.h"
#include "model/tokenizer_json.h"
#include "model/tokenizer_unicode.h"

namespace nibble {
namespace {

using nlohmann::json;

class Normal final : public NormalizerStep {
 public:
  explicit Normal(unicode::NormalForm form) : form_(form) {}
  void apply(std::string& text) const override { text = unicode::normalize(text, form_); }

 private:
  unicode::NormalForm form_;
};

class Prepend final : public NormalizerStep {
 public:
  explicit Prepend(std::string prefix) : prefix_(std::move(prefix)) {}
  void apply(std::string& text) const override {
    if (!text.empty()) text.insert(0, prefix_);
  }

 private:
  std::string prefix_;
};

class Replace final : public NormalizerStep {
 public:
  Replace(Regex regex, std::string content, bool one_for_one)
      : regex_(std::move(regex)), content_(std::move(content)), one_for_one_(one_for_one) {}
  void apply(std::string& text) const override { text = replace_all(regex_, text, content_); }
  bool keeps_positions() const override { return one_for_one_; }

 private:
  Regex regex_;
  std::string content_;
  bool one_for_one_;
};

class Strip final : public NormalizerStep {
 public:
  Strip(bool left, bool right) : left_(left), right_(right) {}
  void apply(std::string& text) const override {
    size_t begin = 0;
    size_t end = text.size();
    while (left_ && begin < end) {
      const auto c = unicode::decode_at(text, begin);
      if (!unicode::is_white_space(c.value)) break;
      begin += c.bytes;
    }
    while (right_ && end > begin) {
      const auto c = unicode::decode_before(text, end);
      if (!unicode::is_white_space(c.value)) break;
      end -= c.bytes;
    }
    text = text.substr(begin, end - begin);
  }

 private:
  bool left_;
  bool right_;
};

class Lowercase final : public NormalizerStep {
 public:
  void apply(std::string& text) const override {
    std::string out;
    out.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
      const auto c = unicode::decode_at(text, at);
      unicode::append_lower_case(out, c.value);
      at += c.bytes;
    }
    text = std::move(out);
  }
};

class ByteLevel final : public NormalizerStep {
 public:
  void apply(std::string& text) const override {
    std::string out;
    append_byte_level(text, out);
    text = std::move(out);
  }
};

size_t count_characters(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  }));
}

Result<std::shared_ptr<const NormalizerStep>> parse_replace(const JsonObject& object) {
  NIBBLE_TRY(object.require("pattern"));
  NIBBLE_TRY(object.require("content"));
  std::string content;
  NIBBLE_TRY(object.read("content", content));
  const json& pattern = *object.find("pattern");
  auto regex = parse_pattern(pattern, object.where());
  if (!regex.ok()) return regex.status();
  const bool one_for_one = pattern.contains("String") &&
                           count_characters(pattern["String"].get<std::string>()) == 1 &&
                           count_characters(content) == 1;
  return std::shared_ptr<const NormalizerStep>(
      std::make_shared<Replace>(std::move(*regex), std::move(content), one_for_one));
}

}  // namespace

Result<Regex> parse_pattern(const json& value, const std::string& where) {
  const auto object = JsonObject::from(value, where + ": pattern");
  if (!object.ok()) return object.status();
  std::optional<std::string> text;
  NIBBLE_TRY(object->read("String", text));
  if (text && value.size() == 1) return Regex::compile_literal(*text, where);
  NIBBLE_TRY(object->read("Regex", text));
  if (text && value.size() == 1) return Regex::compile(*text, where);
  return Status(Code::corrupt_file, where + ": a pattern that is neither a String nor a Regex");
}

std::string replace_all(const Regex& regex, std::string_view text, std::string_view content) {
  std::vector<Span> matches;
  regex.find_all(text, matches);
  std::string out;
  out.reserve(text.size());
  size_t last = 0;
  for (const Span& match : matches) {
    out += text.substr(last, match.begin - last);
    out += content;
    last = match.end;
  }
  out += text.substr(last);
  return out;
}

void append_byte_level(std::string_view text, std::string& out) {
  for (const char c : text) {
    const uint32_t character = byte_level_character(static_cast<unsigned char>(c));
    if (character < 0x80) {
      out += static_cast<char>(character);
    } else {
      unicode::append_utf8(out, character);
    }
  }
}

bool Normalizer::keeps_positions() const {
  return std::all_of(steps_.begin(), steps_.end(),
                     [](const auto& step) { return step->keeps_positions(); });
}

Result<Normalizer> Normalizer::parse(const json& value) {
  Normalizer normalizer;
  if (value.is_null()) return normalizer;
  NIBBLE_TRY(normalizer.add(value, "normalizer"));
  return normalizer;
}

Status Normalizer::add(const json& value, const std::string& where) {
  const auto object = JsonObject::from(value, where);
  if (!object.ok()) return object.status();
  std::string type;
  NIBBLE_TRY(object->require("type"));
  NIBBLE_TRY(object->read("type", type));
  const std::string here = fmt::format("tokenizer.json: the {} {}", where, quote_name(type));
  const auto named = JsonObject::from(value, here);
  if (type == "Sequence") {
    const json* list = object->find("normalizers");
    if (list == nullptr || !list->is_array()) return named->wrong("normalizers", "a list");
    for (const json& item : *list) NIBBLE_TRY(add(item, where));
    return {};
  }
  if (type == "NFC") {
    steps_.push_back(std::make_shared<Normal>(unicode::NormalForm::nfc));
  } else if (type == "NFD") {
    steps_.push_back(std::make_shared<Normal>(unicode::NormalForm::nfd));
  } else if (type == "NFKC") {
    steps_.push_back(std::make_shared<Normal>(unicode::NormalForm::nfkc));
  } else if (type == "NFKD") {
    steps_.push_back(std::make_shared<Normal>(unicode::NormalForm::nfkd));
  } else if (type == "Lowercase") {
    steps_.push_back(std::make_shared<Lowercase>());
  } else if (type == "ByteLevel") {
    steps_.push_back(std::make_shared<ByteLevel>());
  } else if (type == "Prepend") {
    std::string prefix;
    NIBBLE_TRY(named->require("prepend"));
    NIBBLE_TRY(named->read("prepend", prefix));
    steps_.push_back(std::make_shared<Prepend>(std::move(prefix)));
  } else if (type == "Strip") {
    bool left = false;
    bool right = false;
    NIBBLE_TRY(named->require("strip_left"));
    NIBBLE_TRY(named->require("strip_right"));
    NIBBLE_TRY(named->read("strip_left", left));
    NIBBLE_TRY(named->read("strip_right", right));
    steps_.push_back(std::make_shared<Strip>(left, right));
  } else if (type == "Replace") {
    auto step = parse_replace(*named);
    if (!step.ok()) return step.status();
    steps_.push_back(std::move(*step));
  } else {
    return Status(Code::unsupported, here);
  }
  return {};
}

}  // namespace nibble
