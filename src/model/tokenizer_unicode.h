// Unicode for the tokenizer: UTF-8 in and out, white space as tokenizer files mean it, and the
// characters that are newer than the tables of PCRE2. Not here: patterns (tokenizer_regex.h).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace nibble::unicode {

struct CodePoint {
  uint32_t value = 0;
  size_t bytes = 1;
};

/// The character at `at` of valid UTF-8.
inline CodePoint decode_at(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const uint32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xe0) return {(lead & 0x1f) << 6 | (byte(1) & 0x3fu), 2};
  if (lead < 0xf0) return {(lead & 0x0f) << 12 | (byte(1) & 0x3fu) << 6 | (byte(2) & 0x3fu), 3};
  return {
      (lead & 0x07) << 18 | (byte(1) & 0x3fu) << 12 | (byte(2) & 0x3fu) << 6 | (byte(3) & 0x3fu),
      4};
}

/// The character that ends at `end` (> 0) of valid UTF-8.
inline CodePoint decode_before(std::string_view text, size_t end) {
  size_t at = end - 1;
  while ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return decode_at(text, at);
}

void append_utf8(std::string& out, uint32_t code_point);

/// One step of a decoder that replaces what is not UTF-8: `bytes` are one character (valid), or the
/// longest start of one that cannot be continued, to be replaced by one U+FFFD (!valid);
/// `incomplete` if that start reaches the end of the text, so that more bytes could complete it.
struct Step {
  size_t bytes = 0;
  bool valid = false;
  bool incomplete = false;
};
Step next_step(std::string_view text, size_t at);

/// Offset of the first byte that is not UTF-8, or text.size().
size_t valid_prefix(std::string_view text);
inline bool is_valid(std::string_view text) { return valid_prefix(text) == text.size(); }

/// As Python's bytes.decode("utf-8", "replace") and Rust's from_utf8_lossy.
std::string replace_invalid(std::string_view text);

/// Unicode's White_Space, which is what `\s` and char::is_whitespace mean in tokenizer files.
bool is_white_space(uint32_t code_point);

/// Puts, for every character that PCRE2's tables (Unicode 14) do not know but those of the
/// tokenizers package (Unicode 16) do, an older one of the same general category, script Han or
/// not, and length in bytes, so that patterns see what they were written for. False, and `out`
/// untouched, if there is none (the usual case).
bool substitute_new_characters(std::string_view text, std::string& out);

/// Normal forms. Valid UTF-8 in and out.
enum class NormalForm { nfc, nfd, nfkc, nfkd };
std::string normalize(std::string_view text, NormalForm form);

/// As Rust's char::to_lowercase: character by character.
void append_lower_case(std::string& out, uint32_t code_point);

}  // namespace nibble::unicode
