// Reading tokenizer.json and its small companions: a cursor over JSON text for the vocabulary and
// the merges, which are too large for a document tree at start-up, and checked access to the small
// rest. Everything read is untrusted.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"

namespace nibble {

/// Pulls values one by one from JSON text that is valid UTF-8. The first error sticks: every later
/// call returns false, and status() names the place.
class JsonCursor {
 public:
  JsonCursor(std::string_view text, std::string where) : text_(text), where_(std::move(where)) {}

  /// Each consumes an opening bracket.
  bool enter_object() { return expect('{'); }
  bool enter_array() { return expect('['); }
  /// Moves to the next member or element: false at the closing bracket, which is consumed.
  /// `first` is true before the first one, and is cleared.
  bool next_key(bool& first, std::string_view& key, std::string& scratch);
  bool next_element(bool& first);

  /// The string without escapes, as a view of the text, or of `scratch` if it had any.
  bool string(std::string_view& out, std::string& scratch);
  bool unsigned_integer(uint32_t& out);
  /// The text of the value, which is consumed. Only its extent is checked.
  bool skip(std::string_view& value);
  bool at_end();
  bool peek_is(char c);

  Status status() const;
  bool ok() const { return problem_.empty(); }
  bool fail(const std::string& problem);

 private:
  bool expect(char c);
  bool skip_string();
  bool separator(bool& first, char close);
  void skip_space();
  bool escape(std::string& out);
  bool hex4(uint32_t& out);

  std::string_view text_;
  std::string where_;
  size_t at_ = 0;
  std::string problem_;
};

/// Access to the members of one object of a document, with the path for messages.
class JsonObject {
 public:
  /// corrupt_file if `value` is no object.
  static Result<JsonObject> from(const nlohmann::json& value, std::string where);

  /// The member, or null if it is absent or null.
  const nlohmann::json* find(const char* key) const;
  /// Each leaves `out` alone if the member is absent or null; corrupt_file if it has another type.
  Status read(const char* key, bool& out) const;
  Status read(const char* key, std::string& out) const;
  Status read(const char* key, std::optional<std::string>& out) const;
  Status read_id(const char* key, uint32_t& out) const;
  /// As above, but corrupt_file if the member is missing.
  Status require(const char* key) const;

  const std::string& where() const { return where_; }
  Status wrong(const char* key, const char* expected) const;

 private:
  JsonObject(const nlohmann::json& value, std::string where)
      : value_(&value), where_(std::move(where)) {}
  const nlohmann::json* value_;
  std::string where_;
};

}  // namespace nibble
