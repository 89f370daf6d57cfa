// The pre-tokenizers that language models use.
#include "model/tokenizer_pretokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "format/message.h"
#include "model/tokenizer_json.h"
#include "model/tokenizer_normalizer.h"
#include "model/tokenizer_split.h"
#include "model/tokenizer_unicode.h"
#include "model/tokenizer_unicode_tables.h"

namespace nibble {
namespace {

using nlohmann::json;
using Step = std::shared_ptr<const PreTokenizerStep>;

constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// Builds the text anew, piece by piece; what is between pieces is gone.
template <class Rewrite>
void rewrite_pieces(Pieces& pieces, const Rewrite& rewrite) {
  std::string text;
  text.reserve(pieces.text.size() + pieces.text.size() / 2 + 16);
  for (Span& span : pieces.spans) {
    const size_t begin = text.size();
    rewrite(span, pieces.piece(span), text);
    span = {begin, text.size()};
  }
  pieces.text = std::move(text);
}

class Split final : public PreTokenizerStep {
 public:
  Split(Regex regex, SplitBehavior behavior, bool invert)
      : regex_(std::move(regex)), behavior_(behavior), invert_(invert) {}
  void apply(Pieces& pieces) const override { split_pieces(pieces, regex_, behavior_, invert_); }

 private:
  Regex regex_;
  SplitBehavior behavior_;
  bool invert_;
};

class ByteLevel final : public PreTokenizerStep {
 public:
  ByteLevel(std::optional<Regex> regex, bool add_prefix_space)
      : regex_(std::move(regex)), add_prefix_space_(add_prefix_space) {}

  void apply(Pieces& pieces) const override {
    if (add_prefix_space_) {
      rewrite_pieces(pieces, [](const Span&, std::string_view piece, std::string& out) {
        if (!piece.starts_with(' ')) out += ' ';
        out += piece;
      });
    }
    if (regex_) split_pieces(pieces, *regex_, SplitBehavior::isolated, false);
    rewrite_pieces(pieces, [](const Span&, std::string_view piece, std::string& out) {
      append_byte_level(piece, out);
    });
  }
  bool only_cuts() const override { return false; }

 private:
  std::optional<Regex> regex_;
  bool add_prefix_space_;
};

class Metaspace final : public PreTokenizerStep {
 public:
  enum class Prepend { always, first, never };
  Metaspace(std::string replacement, Regex regex, Prepend prepend, bool split)
      : replacement_(std::move(replacement)),
        regex_(std::move(regex)),
        prepend_(prepend),
        split_(split) {}

  void apply(Pieces& pieces) const override {
    rewrite_pieces(pieces, [&](const Span& span, std::string_view piece, std::string& out) {
      const bool starts = piece.starts_with(' ') || piece.starts_with(replacement_);
      const bool first = pieces.at_start && span.begin == 0;
      if (!starts && (prepend_ == Prepend::always || (prepend_ == Prepend::first && first))) {
        out += replacement_;
      }
      for (const char c : piece) {
        if (c == ' ') {
          out += replacement_;
        } else {
          out += c;
        }
      }
    });
    if (split_) split_pieces(pieces, regex_, SplitBehavior::merged_with_next, false);
  }
  bool only_cuts() const override { return false; }
  bool needs_start() const override { return prepend_ == Prepend::first; }

 private:
  std::string replacement_;
  Regex regex_;  // matches replacement_
  Prepend prepend_;
  bool split_;
};

Result<Step> make_split(Result<Regex> regex, SplitBehavior behavior, bool invert) {
  if (!regex.ok()) return regex.status();
  return Step(std::make_shared<Split>(std::move(*regex), behavior, invert));
}

Result<Step> parse_split(const JsonObject& object) {
  constexpr std::array<std::pair<std::string_view, SplitBehavior>, 5> kBehaviors = {{
      {"Removed", SplitBehavior::removed},
      {"Isolated", SplitBehavior::isolated},
      {"MergedWithPrevious", SplitBehavior::merged_with_previous},
      {"MergedWithNext", SplitBehavior::merged_with_next},
      {"Contiguous", SplitBehavior::contiguous},
  }};
  for (const char* key : {"pattern", "behavior", "invert"}) NIBBLE_TRY(object.require(key));
  std::string behavior;
  bool invert = false;
  NIBBLE_TRY(object.read("behavior", behavior));
  NIBBLE_TRY(object.read("invert", invert));
  const auto* found = std::find_if(kBehaviors.begin(), kBehaviors.end(),
                                   [&](const auto& known) { return known.first == behavior; });
  if (found == kBehaviors.end()) return object.wrong("behavior", "a split behavior");
  return make_split(parse_pattern(*object.find("pattern"), object.where()), found->second, invert);
}

Result<Step> parse_byte_level(const JsonObject& object) {
  bool add_prefix_space = false;
  bool use_regex = true;
  NIBBLE_TRY(object.require("add_prefix_space"));
  NIBBLE_TRY(object.read("add_prefix_space", add_prefix_space));
  NIBBLE_TRY(object.read("use_regex", use_regex));
  std::optional<Regex> regex;
  if (use_regex) {
    auto compiled = Regex::compile(kGpt2Pattern, object.where());
    if (!compiled.ok()) return compiled.status();
    regex = std::move(*compiled);
  }
  return Step(std::make_shared<ByteLevel>(std::move(regex), add_prefix_space));
}

Status read_character(const JsonObject& object, const char* key, std::string& out) {
  NIBBLE_TRY(object.require(key));
  NIBBLE_TRY(object.read(key, out));
  if (out.empty() || unicode::decode_at(out, 0).bytes != out.size()) {
    return object.wrong(key, "one character");
  }
  return {};
}

Result<Step> parse_metaspace(const JsonObject& object) {
  std::string replacement;
  std::string scheme = "always";
  bool split = true;
  bool add_prefix_space = true;
  NIBBLE_TRY(read_character(object, "replacement", replacement));
  NIBBLE_TRY(object.read("prepend_scheme", scheme));
  NIBBLE_TRY(object.read("split", split));
  NIBBLE_TRY(object.read("add_prefix_space", add_prefix_space));
  auto prepend = Metaspace::Prepend::never;
  if (scheme == "always") {
    prepend = Metaspace::Prepend::always;
  } else if (scheme == "first") {
    prepend = Metaspace::Prepend::first;
  } else if (scheme != "never") {
    return object.wrong("prepend_scheme", "always, first or never");
  }
  // The older key may only repeat what the newer one says.
  if (!add_prefix_space && prepend != Metaspace::Prepend::never) {
    return object.wrong("add_prefix_space", "what prepend_scheme says");
  }
  auto regex = Regex::compile_literal(replacement, object.where());
  if (!regex.ok()) return regex.status();
  return Step(std::make_shared<Metaspace>(replacement, std::move(*regex), prepend, split));
}

/// The steps that are a fixed pattern, or one of a character.
Result<Step> parse_simple(const std::string& type, const JsonObject& object) {
  if (type == "Digits") {
    bool individual = false;
    NIBBLE_TRY(object.require("individual_digits"));
    NIBBLE_TRY(object.read("individual_digits", individual));
    return make_split(Regex::compile_pcre2(unicode::kNumberPattern, object.where()),
                      individual ? SplitBehavior::isolated : SplitBehavior::contiguous, false);
  }
  if (type == "Whitespace") {
    // This pattern is for Rust's regex crate, whose \w is a little more and a little less than
    // Oniguruma's.
    return make_split(Regex::compile_pcre2(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+)"
                                           R"(|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control})"
                                           R"(\p{White_Space}]+)",
                                           object.where()),
                      SplitBehavior::removed, true);
  }
  if (type == "WhitespaceSplit") {
    return make_split(Regex::compile(R"(\s)", object.where()), SplitBehavior::removed, false);
  }
  std::string delimiter;
  NIBBLE_TRY(read_character(object, "delimiter", delimiter));
  return make_split(Regex::compile_literal(delimiter, object.where()), SplitBehavior::removed,
                    false);
}

}  // namespace

bool PreTokenizer::needs_start() const {
  return std::any_of(steps_.begin(), steps_.end(),
                     [](const Step& step) { return step->needs_start(); });
}

Result<PreTokenizer> PreTokenizer::parse(const json& value) {
  PreTokenizer pre_tokenizer;
  if (value.is_null()) return pre_tokenizer;
  NIBBLE_TRY(pre_tokenizer.add(value));
  return pre_tokenizer;
}

Status PreTokenizer::add(const json& value) {
  const auto object = JsonObject::from(value, "pre_tokenizer");
  if (!object.ok()) return object.status();
  std::string type;
  NIBBLE_TRY(object->require("type"));
  NIBBLE_TRY(object->read("type", type));
  const auto named =
      JsonObject::from(value, "tokenizer.json: the pre_tokenizer " + quote_name(type));
  if (type == "Sequence") {
    const json* list = named->find("pretokenizers");
    if (list == nullptr || !list->is_array()) return named->wrong("pretokenizers", "a list");
    for (const json& item : *list) NIBBLE_TRY(add(item));
    return {};
  }
  Result<Step> step = Status(Code::unsupported, named->where());
  if (type == "Split") {
    step = parse_split(*named);
  } else if (type == "ByteLevel") {
    step = parse_byte_level(*named);
  } else if (type == "Metaspace") {
    step = parse_metaspace(*named);
  } else if (type == "Digits" || type == "Whitespace" || type == "WhitespaceSplit" ||
             type == "CharDelimiterSplit") {
    step = parse_simple(type, *named);
  }
  if (!step.ok()) return step.status();
  if ((*step)->needs_start() && !std::all_of(steps_.begin(), steps_.end(), [](const Step& before) {
        return before->only_cuts();
      })) {
    return Status(Code::unsupported,
                  named->where() + " with prepend_scheme first after a step that changes text");
  }
  steps_.push_back(std::move(*step));
  return {};
}

}  // namespace nibble
