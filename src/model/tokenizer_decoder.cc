// The decoders that language models use.
#include "model/tokenizer_decoder.h"

#include <fmt/format.h>

#include "format/message.h"
#include "model/tokenizer_bytes.h"
#include "model/tokenizer_json.h"
#include "model/tokenizer_normalizer.h"
#include "model/tokenizer_unicode.h"

namespace nibble {
namespace {

using nlohmann::json;
using Tokens = std::vector<std::string>;

std::string joined_text(const Tokens& tokens, std::string_view separator) {
  std::string text;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) text += separator;
    text += tokens[i];
  }
  return text;
}

/// Every character is a byte; a token with any other character stands for itself.
class ByteLevel final : public DecoderStep {
 public:
  void apply(Tokens& tokens, BrokenText broken) const override {
    std::string out;
    std::string bytes;
    for (const std::string& token : tokens) out += to_bytes(token, bytes) ? bytes : token;
    if (broken == BrokenText::replaced) out = unicode::replace_invalid(out);
    tokens.assign(1, std::move(out));
  }

 private:
  static bool to_bytes(std::string_view token, std::string& bytes) {
    bytes.clear();
    for (size_t at = 0; at < token.size();) {
      const auto c = unicode::decode_at(token, at);
      const int byte = byte_of_character(c.value);
      if (byte < 0) return false;
      bytes += static_cast<char>(byte);
      at += c.bytes;
    }
    return true;
  }
};

/// <0xHH> is a byte. A run of them that is not UTF-8 is one U+FFFD for each.
class ByteFallback final : public DecoderStep {
 public:
  void apply(Tokens& tokens, BrokenText broken) const override {
    Tokens out;
    out.reserve(tokens.size());
    std::string run;
    const auto end_run = [&] {
      if (run.empty()) return;
      if (broken == BrokenText::kept || unicode::is_valid(run)) {
        out.push_back(run);
      } else {
        out.insert(out.end(), run.size(), "\uFFFD");
      }
      run.clear();
    };
    for (std::string& token : tokens) {
      const int byte = byte_of(token);
      if (byte >= 0) {
        run += static_cast<char>(byte);
        continue;
      }
      end_run();
      out.push_back(std::move(token));
    }
    end_run();
    tokens = std::move(out);
  }

 private:
  static int byte_of(std::string_view token) {
    if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
    int value = 0;
    // A plus sign is what the number parser of the tokenizers package lets through as well.
    for (size_t i = token[3] == '+' ? 4 : 3; i < 5; ++i) {
      const char lower = static_cast<char>(token[i] | 32);
      const bool digit = token[i] >= '0' && token[i] <= '9';
      if (!digit && (lower < 'a' || lower > 'f')) return -1;
      value = value * 16 + (digit ? token[i] - '0' : lower - 'a' + 10);
    }
    return value;
  }
};

class Fuse final : public DecoderStep {
 public:
  void apply(Tokens& tokens, BrokenText) const override {
    tokens.assign(1, joined_text(tokens, ""));
  }
};

class Replace final : public DecoderStep {
 public:
  Replace(Regex regex, std::string content)
      : regex_(std::move(regex)), content_(std::move(content)) {}
  void apply(Tokens& tokens, BrokenText) const override {
    for (std::string& token : tokens) {
      // Bytes kept by a step before this one are no text to search.
      if (unicode::is_valid(token)) token = replace_all(regex_, token, content_);
    }
  }

 private:
  Regex regex_;
  std::string content_;
};

/// Takes up to so many of one character off both ends of each token.
class Strip final : public DecoderStep {
 public:
  Strip(std::string content, uint32_t start, uint32_t stop)
      : content_(std::move(content)), start_(start), stop_(stop) {}
  void apply(Tokens& tokens, BrokenText) const override {
    for (std::string& token : tokens) {
      std::string_view left = token;
      for (uint32_t i = 0; i < start_ && left.starts_with(content_); ++i) {
        left.remove_prefix(content_.size());
      }
      for (uint32_t i = 0; i < stop_ && left.ends_with(content_); ++i) {
        left.remove_suffix(content_.size());
      }
      token = std::string(left);
    }
  }

 private:
  std::string content_;
  uint32_t start_;
  uint32_t stop_;
};

class Metaspace final : public DecoderStep {
 public:
  Metaspace(std::string replacement, bool drop_first)
      : replacement_(std::move(replacement)), drop_first_(drop_first) {}
  void apply(Tokens& tokens, BrokenText) const override {
    for (size_t i = 0; i < tokens.size(); ++i) {
      const std::string_view space = i == 0 && drop_first_ ? "" : " ";
      std::string out;
      for (size_t at = 0; at < tokens[i].size();) {
        if (std::string_view(tokens[i]).substr(at).starts_with(replacement_)) {
          out += space;
          at += replacement_.size();
        } else {
          out += tokens[i][at++];
        }
      }
      tokens[i] = std::move(out);
    }
  }

 private:
  std::string replacement_;
  bool drop_first_;
};

Status read_character(const JsonObject& object, const char* key, std::string& out) {
  NIBBLE_TRY(object.require(key));
  NIBBLE_TRY(object.read(key, out));
  if (out.empty() || unicode::decode_at(out, 0).bytes != out.size()) {
    return object.wrong(key, "one character");
  }
  return {};
}

using Step = std::shared_ptr<const DecoderStep>;

Result<Step> parse_step(const std::string& type, const JsonObject& object) {
  if (type == "ByteLevel") return Step(std::make_shared<ByteLevel>());
  if (type == "ByteFallback") return Step(std::make_shared<ByteFallback>());
  if (type == "Fuse") return Step(std::make_shared<Fuse>());
  if (type == "Replace") {
    std::string content;
    for (const char* key : {"pattern", "content"}) NIBBLE_TRY(object.require(key));
    NIBBLE_TRY(object.read("content", content));
    auto regex = parse_pattern(*object.find("pattern"), object.where());
    if (!regex.ok()) return regex.status();
    return Step(std::make_shared<Replace>(std::move(*regex), std::move(content)));
  }
  if (type == "Strip") {
    std::string content;
    uint32_t start = 0;
    uint32_t stop = 0;
    NIBBLE_TRY(read_character(object, "content", content));
    for (const char* key : {"start", "stop"}) NIBBLE_TRY(object.require(key));
    NIBBLE_TRY(object.read_id("start", start));
    NIBBLE_TRY(object.read_id("stop", stop));
    return Step(std::make_shared<Strip>(std::move(content), start, stop));
  }
  if (type == "Metaspace") {
    std::string replacement;
    std::string scheme = "always";
    bool add_prefix_space = true;
    NIBBLE_TRY(read_character(object, "replacement", replacement));
    NIBBLE_TRY(object.read("prepend_scheme", scheme));
    NIBBLE_TRY(object.read("add_prefix_space", add_prefix_space));
    return Step(
        std::make_shared<Metaspace>(std::move(replacement), scheme != "never" && add_prefix_space));
  }
  return Status(Code::unsupported, object.where());
}

}  // namespace

Result<TokenDecoder> TokenDecoder::parse(const json& value) {
  TokenDecoder decoder;
  if (value.is_null()) return decoder;
  decoder.present_ = true;
  NIBBLE_TRY(decoder.add(value));
  return decoder;
}

Status TokenDecoder::add(const json& value) {
  const auto object = JsonObject::from(value, "tokenizer.json: decoder");
  if (!object.ok()) return object.status();
  std::string type;
  NIBBLE_TRY(object->require("type"));
  NIBBLE_TRY(object->read("type", type));
  const auto named = JsonObject::from(value, "tokenizer.json: the decoder " + quote_name(type));
  if (type == "Sequence") {
    const json* list = named->find("decoders");
    if (list == nullptr || !list->is_array()) return named->wrong("decoders", "a list");
    for (const json& item : *list) NIBBLE_TRY(add(item));
    return {};
  }
  auto step = parse_step(type, *named);
  if (!step.ok()) return step.status();
  steps_.push_back(std::move(*step));
  return {};
}

std::string TokenDecoder::decode(std::vector<std::string> tokens, BrokenText broken) const {
  if (!present_) return joined_text(tokens, " ");
  for (const auto& step : steps_) step->apply(tokens, broken);
  return joined_text(tokens, "");
}

}  // namespace nibble
