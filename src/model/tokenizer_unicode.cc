// UTF-8 decoding with replacement, and what of Unicode the regular expression library lacks.
#include "model/tokenizer_unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

#include "model/tokenizer_unicode_tables.h"

namespace nibble::unicode {
namespace {

constexpr RangeTable kStandIns(kNewCharacters);
constexpr RangeTable kOpaque(kUnknownToNormalForms);
constexpr RangeTable kCapitals(kNewCapitals);

/// One part of the text by utf8proc.
void append_normal(std::string_view text, int options, std::string& out) {
  utf8proc_uint8_t* normal = nullptr;
  const utf8proc_ssize_t size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                             static_cast<utf8proc_ssize_t>(text.size()), &normal,
                                             static_cast<utf8proc_option_t>(options));
  if (size < 0) {  // out of memory only: the text is valid UTF-8
    out += text;
    return;
  }
  out.append(reinterpret_cast<const char*>(normal), static_cast<size_t>(size));
  std::free(normal);
}

}  // namespace

void append_utf8(std::string& out, uint32_t code_point) {
  const auto put = [&out](uint32_t byte) { out += static_cast<char>(byte); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xc0 | code_point >> 6);
    put(0x80 | (code_point & 0x3f));
  } else if (code_point < 0x10000) {
    put(0xe0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3f));
    put(0x80 | (code_point & 0x3f));
  } else {
    put(0xf0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3f));
    put(0x80 | (code_point >> 6 & 0x3f));
    put(0x80 | (code_point & 0x3f));
  }
}

Step next_step(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(at);
  if (lead < 0x80) return {1, true, false};
  if (lead < 0xc2 || lead > 0xf4) return {1, false, false};
  const size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  // The second byte is limited further after some leads: no overlong forms, no surrogates, and
  // nothing above U+10FFFF.
  const unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  for (size_t i = 1; i < length; ++i) {
    if (at + i == text.size()) return {i, false, true};
    const unsigned next = byte(at + i);
    const bool fits = i == 1 ? next >= low && next <= high : next >= 0x80 && next <= 0xbf;
    if (!fits) return {i, false, false};
  }
  return {length, true, false};
}

size_t valid_prefix(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      ++at;
      continue;
    }
    const Step step = next_step(text, at);
    if (!step.valid) return at;
    at += step.bytes;
  }
  return at;
}

std::string replace_invalid(std::string_view text) {
  std::string out(text.substr(0, valid_prefix(text)));
  for (size_t at = out.size(); at < text.size();) {
    const Step step = next_step(text, at);
    if (step.valid) {
      out += text.substr(at, step.bytes);
    } else {
      out += "\uFFFD";
    }
    at += step.bytes;
  }
  return out;
}

bool is_white_space(uint32_t code_point) {
  if (code_point < 0x80) return code_point == ' ' || (code_point >= 9 && code_point <= 13);
  return code_point == 0x85 || code_point == 0xa0 || code_point == 0x1680 ||
         (code_point >= 0x2000 && code_point <= 0x200a) || code_point == 0x2028 ||
         code_point == 0x2029 || code_point == 0x202f || code_point == 0x205f ||
         code_point == 0x3000;
}

bool substitute_new_characters(std::string_view text, std::string& out) {
  bool found = false;
  for (size_t at = 0; at < text.size();) {
    if (static_cast<unsigned char>(text[at]) < 0xe0) {
      ++at;  // ASCII, a character of two bytes, or a byte within one: all of them are old
      continue;
    }
    const CodePoint c = decode_at(text, at);
    if (const NewCharacters* row = kStandIns.find(c.value)) {
      if (!found) out.assign(text);
      found = true;
      std::string bytes;
      append_utf8(bytes, row->stand_in);
      out.replace(at, c.bytes, bytes);
    }
    at += c.bytes;
  }
  return found;
}

std::string normalize(std::string_view text, NormalForm form) {
  // Below U+00C0 (and for NFC below U+0300) every character is its own normal form.
  const unsigned first_lead = form == NormalForm::nfc   ? 0xcc
                              : form == NormalForm::nfd ? 0xc3
                                                        : 0xc2;
  const bool plain = std::all_of(text.begin(), text.end(), [first_lead](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte < 0xc0 || byte < first_lead;
  });
  if (plain) return std::string(text);
  int options = UTF8PROC_STABLE;
  options |=
      form == NormalForm::nfc || form == NormalForm::nfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == NormalForm::nfkc || form == NormalForm::nfkd) options |= UTF8PROC_COMPAT;
  // A character that the package's tables do not have is a starter to it that nothing composes
  // with, so what is before and after it are normal on their own.
  std::string out;
  out.reserve(text.size());
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const CodePoint c = decode_at(text, at);
    if (kOpaque.find(c.value) != nullptr) {
      if (at > done) append_normal(text.substr(done, at - done), options, out);
      out += text.substr(at, c.bytes);
      done = at + c.bytes;
    }
    at += c.bytes;
  }
  if (done < text.size()) append_normal(text.substr(done), options, out);
  return out;
}

void append_lower_case(std::string& out, uint32_t code_point) {
  if (const NewCapitals* row = kCapitals.find(code_point)) {
    return append_utf8(out, code_point + static_cast<uint32_t>(row->to_lower));
  }
  append_utf8(out,
              static_cast<uint32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(code_point))));
  // The one character whose lower case is two.
  if (code_point == 0x130) append_utf8(out, 0x307);
}

}  // namespace nibble::unicode
