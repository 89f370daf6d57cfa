// The JSON grammar, by hand for the large parts and by nlohmann's document for the small ones.
#include "model/tokenizer_json.h"

#include <fmt/format.h>

#include "format/message.h"
#include "model/tokenizer_unicode.h"

namespace nibble {

using nlohmann::json;

// ---- JsonCursor ---------------------------------------------------------------------------------

Status JsonCursor::status() const { return ok() ? Status{} : Status(Code::corrupt_file, problem_); }

bool JsonCursor::fail(const std::string& problem) {
  if (ok()) problem_ = fmt::format("{}: byte {}: {}", where_, at_, problem);
  return false;
}

void JsonCursor::skip_space() {
  while (at_ < text_.size() &&
         (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
    ++at_;
  }
}

bool JsonCursor::peek_is(char c) {
  skip_space();
  return ok() && at_ < text_.size() && text_[at_] == c;
}

bool JsonCursor::expect(char c) {
  if (!ok()) return false;
  if (!peek_is(c)) return fail(fmt::format("expected {}", quote_name({&c, 1})));
  ++at_;
  return true;
}

bool JsonCursor::at_end() {
  skip_space();
  return ok() && at_ == text_.size();
}

bool JsonCursor::separator(bool& first, char close) {
  if (!ok()) return false;
  const bool was_first = first;
  first = false;
  if (peek_is(close)) {
    ++at_;
    return false;
  }
  return was_first || expect(',');
}

bool JsonCursor::next_element(bool& first) { return separator(first, ']'); }

bool JsonCursor::next_key(bool& first, std::string_view& key, std::string& scratch) {
  return separator(first, '}') && string(key, scratch) && expect(':');
}

bool JsonCursor::string(std::string_view& out, std::string& scratch) {
  if (!expect('"')) return false;
  const size_t begin = at_;
  bool escaped = false;
  for (; at_ < text_.size(); ++at_) {
    const char c = text_[at_];
    if (c == '"') {
      out = escaped ? std::string_view(scratch) : text_.substr(begin, at_ - begin);
      ++at_;
      return true;
    }
    if (static_cast<unsigned char>(c) < 0x20) return fail("a control character in a string");
    if (c == '\\') {
      if (!escaped) scratch.assign(text_.substr(begin, at_ - begin));
      escaped = true;
      ++at_;
      if (!escape(scratch)) return false;
      --at_;
    } else if (escaped) {
      scratch += c;
    }
  }
  return fail("a string that does not end");
}

bool JsonCursor::hex4(uint32_t& out) {
  out = 0;
  for (int i = 0; i < 4; ++i, ++at_) {
    if (at_ == text_.size()) return fail("a string that does not end");
    const char c = text_[at_];
    const char lower = static_cast<char>(c | 32);
    if (c >= '0' && c <= '9') {
      out = out * 16 + static_cast<uint32_t>(c - '0');
    } else if (lower >= 'a' && lower <= 'f') {
      out = out * 16 + static_cast<uint32_t>(lower - 'a' + 10);
    } else {
      return fail("\\u without four hexadecimal digits");
    }
  }
  return true;
}

/// at_ is after the backslash; afterwards it is after the escape.
bool JsonCursor::escape(std::string& out) {
  if (at_ == text_.size()) return fail("a string that does not end");
  const char c = text_[at_++];
  switch (c) {
    case '"':
    case '\\':
    case '/': out += c; return true;
    case 'b': out += '\b'; return true;
    case 'f': out += '\f'; return true;
    case 'n': out += '\n'; return true;
    case 'r': out += '\r'; return true;
    case 't': out += '\t'; return true;
    case 'u': break;
    default: return fail("an escape that JSON does not have");
  }
  uint32_t value = 0;
  if (!hex4(value)) return false;
  if (value >= 0xd800 && value < 0xdc00) {
    uint32_t low = 0;
    if (text_.substr(at_, 2) != "\\u") return fail("half of a surrogate pair");
    at_ += 2;
    if (!hex4(low)) return false;
    if (low < 0xdc00 || low > 0xdfff) return fail("half of a surrogate pair");
    value = 0x10000 + ((value - 0xd800) << 10) + (low - 0xdc00);
  } else if (value >= 0xdc00 && value < 0xe000) {
    return fail("half of a surrogate pair");
  }
  unicode::append_utf8(out, value);
  return true;
}

bool JsonCursor::unsigned_integer(uint32_t& out) {
  if (!ok()) return false;
  skip_space();
  const size_t begin = at_;
  uint64_t value = 0;
  while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9' && at_ - begin < 11) {
    value = value * 10 + static_cast<uint64_t>(text_[at_++] - '0');
  }
  const bool leading_zero = at_ - begin > 1 && text_[begin] == '0';
  if (at_ == begin || value > UINT32_MAX || leading_zero) return fail("expected a token id");
  out = static_cast<uint32_t>(value);
  return true;
}

bool JsonCursor::skip_string() {
  ++at_;
  while (at_ < text_.size()) {
    const char c = text_[at_++];
    if (c == '"') return true;
    if (c == '\\') ++at_;
  }
  return fail("a string that does not end");
}

bool JsonCursor::skip(std::string_view& value) {
  if (!ok()) return false;
  skip_space();
  const size_t begin = at_;
  size_t depth = 0;
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c == '"') {
      if (!skip_string()) return false;
    } else if (c == '{' || c == '[') {
      ++depth;
      ++at_;
    } else if (c == '}' || c == ']') {
      if (depth == 0) break;
      --depth;
      ++at_;
    } else if (c == ',' && depth == 0) {
      break;
    } else {
      ++at_;
      continue;
    }
    if (depth == 0) break;
  }
  if (at_ > text_.size()) at_ = text_.size();
  value = text_.substr(begin, at_ - begin);
  if (value.empty() || depth != 0) return fail("expected a value");
  return true;
}

// ---- JsonObject ---------------------------------------------------------------------------------

Result<JsonObject> JsonObject::from(const json& value, std::string where) {
  if (!value.is_object()) {
    return Status(Code::corrupt_file,
                  fmt::format("{}: expected an object, found {}", where, value.type_name()));
  }
  return JsonObject(value, std::move(where));
}

const json* JsonObject::find(const char* key) const {
  const auto found = value_->find(key);
  return found == value_->end() || found->is_null() ? nullptr : &*found;
}

Status JsonObject::wrong(const char* key, const char* expected) const {
  const json* found = find(key);
  return Status(Code::corrupt_file,
                fmt::format("{}: key {}: expected {}, found {}", where_, quote_name(key), expected,
                            found == nullptr ? "nothing" : found->type_name()));
}

Status JsonObject::require(const char* key) const {
  return find(key) == nullptr ? wrong(key, "a value") : Status{};
}

Status JsonObject::read(const char* key, bool& out) const {
  const json* value = find(key);
  if (value == nullptr) return {};
  if (!value->is_boolean()) return wrong(key, "true or false");
  out = value->get<bool>();
  return {};
}

Status JsonObject::read(const char* key, std::string& out) const {
  const json* value = find(key);
  if (value == nullptr) return {};
  if (!value->is_string()) return wrong(key, "a string");
  out = value->get<std::string>();
  return {};
}

Status JsonObject::read(const char* key, std::optional<std::string>& out) const {
  std::string text;
  NIBBLE_TRY(read(key, text));
  if (find(key) != nullptr) out = std::move(text);
  return {};
}

Status JsonObject::read_id(const char* key, uint32_t& out) const {
  const json* value = find(key);
  if (value == nullptr) return {};
  if (!value->is_number_unsigned() || value->get<uint64_t>() > INT32_MAX) {
    return wrong(key, "a token id");
  }
  out = value->get<uint32_t>();
  return {};
}

}  // namespace nibble
