// Text for people that more than one subcommand prints: sizes, aligned tables, and names that come
// from a file and may hold anything. Not here: numbers for scripts, which go into JSON as they are.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "format/message.h"

namespace nibble::cli {

/// "104.9 MiB"; below 1 KiB "17 B".
inline std::string bytes_text(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1000 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", value, value < 100 ? 1 : 0, kUnits[unit]);
}

/// "135.0 M" for counts of weights.
inline std::string count_text(uint64_t count) {
  if (count < 10'000) return fmt::format("{}", count);
  if (count < 1'000'000) return fmt::format("{:.1f} k", static_cast<double>(count) / 1e3);
  if (count < 1'000'000'000) return fmt::format("{:.1f} M", static_cast<double>(count) / 1e6);
  return fmt::format("{:.2f} G", static_cast<double>(count) / 1e9);
}

/// A name from a file as it is, or quoted and escaped if it could disturb a terminal or a table.
inline std::string printable(std::string_view name) {
  const bool plain =
      !name.empty() && name.size() <= 160 && std::all_of(name.begin(), name.end(), [](char c) {
        const auto byte = static_cast<unsigned char>(c);
        return byte > 0x20 && byte != 0x7f;
      });
  return plain ? std::string(name) : quote_name(name);
}

/// The same for text of any length, in which spaces are at home.
inline std::string printable_text(std::string_view text) {
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte >= 0x20 && byte != 0x7f;
  });
  return plain ? std::string(text) : quote_name(text);
}

/// "1 layer", "2 layers".
inline std::string plural(size_t count, std::string_view noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : "s");
}

/// At most `most` of `names`, and how many more there are.
inline std::string some_of(const std::vector<std::string>& names, size_t most = 8) {
  std::string text;
  for (size_t i = 0; i < std::min(most, names.size()); ++i) {
    text += (i == 0 ? "" : ", ") + printable(names[i]);
  }
  if (names.size() > most) text += fmt::format(" and {} more", names.size() - most);
  return text;
}

/// Columns as wide as their widest cell. Alignment: one character a column, '<' or '>'.
class Table {
 public:
  explicit Table(std::string alignment) : alignment_(std::move(alignment)) {}

  void add(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }

  void print(std::FILE* file) const {
    std::vector<size_t> widths;
    for (const auto& row : rows_) {
      widths.resize(std::max(widths.size(), row.size()));
      for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    }
    for (const auto& row : rows_) {
      std::string line;
      for (size_t i = 0; i < row.size(); ++i) {
        const bool right = i < alignment_.size() && alignment_[i] == '>';
        line += right ? fmt::format("{:>{}}", row[i], widths[i])
                      : fmt::format("{:<{}}", row[i], widths[i]);
        line += "  ";
      }
      line.erase(line.find_last_not_of(' ') + 1);
      fmt::print(file, "{}\n", line);
    }
  }

 private:
  std::string alignment_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace nibble::cli
