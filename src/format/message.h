// Text for error messages about untrusted files: names come from the file, so they may be of any
// length and hold any byte. Messages must stay one readable line.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

namespace nibble {

/// The items with `separator` between them. (fmt::join, at -O3, makes GCC 12 warn inside fmt.)
template <class Range>
std::string joined(const Range& items, std::string_view separator) {
  std::string out;
  for (const auto& item : items) {
    if (&item != &*items.begin()) out += separator;
    out += fmt::format("{}", item);
  }
  return out;
}

/// `text` in double quotes, cut to a readable length. Everything that is not printable ASCII is
/// escaped, so that a message is valid UTF-8 even where a name is not or is cut within a character.
inline std::string quote_name(std::string_view text) {
  constexpr size_t kLongest = 160;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    if (out.size() > kLongest) return out + "...\"";
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7f) {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + "\"";
}

}  // namespace nibble
