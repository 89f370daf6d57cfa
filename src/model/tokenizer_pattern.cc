// Oniguruma's pattern syntax to PCRE2's. Where the two differ, tokenizers follow Oniguruma:
//   \s           no U+180E            -> \p{White_Space}
//   \w, \b       Alphabetic, M, Nd, Pc and six characters of Latin-1, not PCRE2's L, N and _
//   \h, \v       a hexadecimal digit, and U+000B
//   \p{Han}      the Script property, not Script_Extensions
//   x{2}+, x{2}? a repeated and an optional x{2}, neither possessive nor lazy
//   x{,2}        x{0,2}; any other brace that is no quantifier stands for itself
//   (?m)         the dot matches newlines (PCRE2's s); ^ always matches after them
//   (?i)         may match several characters for one (ss for U+00DF): refused where it could
//   [a[bc]]      [abc]; negated sets within sets and intersections ([a&&b]) are refused, like
//                anything not listed here
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "format/message.h"
#include "model/tokenizer_regex.h"
#include "model/tokenizer_unicode.h"

namespace nibble {
namespace {

constexpr std::string_view kWordSet = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\xb2\xb3\xb9\xbc-\xbe)";
constexpr std::string_view kHexSet = "0-9a-fA-F";

/// Pairs of letters that are the full case folding of one character; i with a dot above and others
/// involve characters beyond ASCII, which are refused under (?i) altogether.
constexpr std::array<std::string_view, 5> kFoldings = {"ss", "ff", "fi", "fl", "st"};

bool is_general_category(std::string_view name) {
  constexpr std::string_view kMajor = "LMNPSZC";
  constexpr std::array<std::string_view, 30> kMinor = {
      "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe",
      "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn", "Cs"};
  if (name.size() == 1) return kMajor.find(name[0]) != std::string_view::npos;
  return std::find(kMinor.begin(), kMinor.end(), name) != kMinor.end();
}

bool is_ascii_letter(uint32_t c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  Result<std::string> run() {
    groups_.push_back({});
    while (at_ < in_.size() && problem_.empty()) step();
    if (problem_.empty() && groups_.size() != 1) problem_ = "a group that is not closed";
    if (!problem_.empty()) {
      return Status(Code::unsupported, fmt::format("{} (at byte {})", problem_, at_));
    }
    return out_;
  }

 private:
  struct Group {
    size_t begin = 0;       // where it starts in out_
    bool caseless = false;  // within it
    bool option_only = false;
  };

  void fail(std::string what) {
    if (problem_.empty()) problem_ = std::move(what);
  }
  bool looking_at(std::string_view text) const { return in_.substr(at_).starts_with(text); }
  bool take(std::string_view text) {
    if (!looking_at(text)) return false;
    at_ += text.size();
    return true;
  }

  /// Everything that a quantifier can follow goes through here.
  void atom(std::string_view text) {
    atom_begin_ = out_.size();
    out_ += text;
  }

  void step() {
    const char c = in_[at_];
    switch (c) {
      case '\\':
        ++at_;
        previous_letter_ = 0;
        return escape();
      case '[':
        ++at_;
        previous_letter_ = 0;
        return set();
      case '(':
        ++at_;
        previous_letter_ = 0;
        return open_group();
      case ')':
        ++at_;
        previous_letter_ = 0;
        return close_group();
      case '|':
        ++at_;
        previous_letter_ = 0;
        return alternative();
      case '*':
      case '+':
      case '?':
        ++at_;
        previous_letter_ = 0;
        return quantifier(std::string(1, c), false);
      case '{':
        ++at_;
        previous_letter_ = 0;
        return brace();
      case '^':
      case '$':
        ++at_;
        previous_letter_ = 0;
        return boundary(std::string_view(&c, 1));
      case '.':
        ++at_;
        previous_letter_ = 0;
        return atom(".");
      default: return literal();
    }
  }

  void literal() {
    const auto c = unicode::decode_at(in_, at_);
    check_folding(c.value);
    atom(quoted(in_.substr(at_, c.bytes)));
    at_ += c.bytes;
  }

  static std::string quoted(std::string_view c) {
    const bool special = c.size() == 1 && !is_ascii_letter(static_cast<unsigned char>(c[0])) &&
                         !is_digit(c[0]) && c[0] > ' ' && c[0] < 0x7f;
    if (c == std::string_view("\0", 1)) return "\\x{0}";
    return special ? fmt::format("\\{}", c) : std::string(c);
  }

  void check_folding(uint32_t c) {
    if (!groups_.back().caseless) return;
    if (c >= 0x80) return fail("(?i) over a character beyond ASCII");
    const char lower = static_cast<char>(is_ascii_letter(c) ? c | 32 : c);
    for (const std::string_view folding : kFoldings) {
      if (previous_letter_ == folding[0] && lower == folding[1]) {
        return fail(fmt::format("(?i) over {}, which one character folds to", quote_name(folding)));
      }
    }
    previous_letter_ = lower;
  }

  // ---- quantifiers ----------------------------------------------------------------------------

  /// `interval`: a {n,m}, whose suffixes differ between the two syntaxes.
  void quantifier(const std::string& text, bool interval) {
    if (!atom_begin_) return fail("a quantifier with nothing to repeat");
    out_ += text;
    if (interval && (looking_at("+") || looking_at("*"))) {
      out_.insert(*atom_begin_, "(?:");
      out_ += ')';
      return;  // the suffix is the next quantifier, on the group
    }
    if (take("+")) {
      out_ += '+';
    } else if (take("?")) {
      out_ += '?';
    }
    // A further quantifier repeats the repetition.
    if (looking_at("*") || looking_at("+") || looking_at("?") || looking_at("{")) {
      out_.insert(*atom_begin_, "(?:");
      out_ += ')';
    }
  }

  void brace() {
    size_t at = at_;
    const auto number = [&] {
      const size_t begin = at;
      while (at < in_.size() && is_digit(in_[at])) ++at;
      return std::string(in_.substr(begin, at - begin));
    };
    const std::string low = number();
    const bool range = at < in_.size() && in_[at] == ',';
    if (range) ++at;
    const std::string high = range ? number() : low;
    const bool closed = at < in_.size() && in_[at] == '}';
    if (!closed || (low.empty() && high.empty())) return atom("\\{");
    if (low.size() > 4 || high.size() > 4) return fail("a repetition of more than 9999");
    at_ = at + 1;
    if (range && !low.empty() && !high.empty() && std::stoi(low) > std::stoi(high)) {
      return fail("a repetition whose bounds are in the wrong order");
    }
    const std::string text = range ? fmt::format("{{{},{}}}", low.empty() ? "0" : low, high)
                                   : fmt::format("{{{}}}", low);
    // {n}? is optional, not lazy, in Oniguruma; {n,m}? is lazy in both.
    if (!range && looking_at("?")) {
      if (!atom_begin_) return fail("a quantifier with nothing to repeat");
      out_ += text;
      out_.insert(*atom_begin_, "(?:");
      out_ += ')';
      return;
    }
    quantifier(text, true);
  }

  // ---- groups ---------------------------------------------------------------------------------

  void open_group() {
    Group group{out_.size(), groups_.back().caseless, false};
    if (!looking_at("?")) {
      if (looking_at("*")) return fail("(*");
      out_ += "(?:";  // nothing here reads captures
    } else if (take("?:") || looking_at("?=") || looking_at("?!") || looking_at("?>") ||
               looking_at("?<=") || looking_at("?<!")) {
      out_ += "(?";
      const size_t kind = in_[at_ - 1] == ':' ? 0 : looking_at("?<") ? 3 : 2;
      out_ += kind == 0 ? ":" : in_.substr(at_ + 1, kind - 1);
      at_ += kind;
    } else {
      const size_t begin = at_;
      ++at_;
      if (!options(group)) {
        at_ = begin;
        return fail(fmt::format("a group that starts with {}",
                                quote_name(fmt::format("({}", in_.substr(at_, 3)))));
      }
      if (group.option_only) return;
    }
    groups_.push_back(group);
    group_content_begin_ = out_.size();
    atom_begin_.reset();
  }

  /// (?im-im: or (?im-im) after the question mark.
  bool options(Group& group) {
    std::string text;
    bool on = true;
    for (; at_ < in_.size(); ++at_) {
      const char c = in_[at_];
      if (c == '-' && on) {
        on = false;
        text += c;
      } else if (c == 'i') {
        group.caseless = on;
        text += c;
      } else if (c == 'm') {
        text += 's';
      } else {
        break;
      }
    }
    if (text.empty() || at_ == in_.size()) return false;
    if (take(":")) {
      out_ += "(?" + text + ":";
      return true;
    }
    // Alone it holds for the rest of the group, alternatives included; in PCRE2 too, but only if
    // nothing comes before it.
    if (out_.size() != group_content_begin_) return false;
    if (!take(")")) return false;
    out_ += "(?" + text + ")";
    group_content_begin_ = out_.size();
    groups_.back().caseless = group.caseless;
    group.option_only = true;
    atom_begin_.reset();
    return true;
  }

  void close_group() {
    if (groups_.size() == 1) return fail("a parenthesis that closes nothing");
    out_ += ')';
    atom_begin_ = groups_.back().begin;
    groups_.pop_back();
  }

  void alternative() {
    out_ += '|';
    atom_begin_.reset();
  }

  // ---- escapes and sets -----------------------------------------------------------------------

  /// The body of \p{...} or \P{...} after the letter.
  std::string property(bool negated) {
    const size_t close = in_.find('}', at_);
    if (!looking_at("{") || close == std::string_view::npos) {
      fail("a property without braces");
      return "";
    }
    std::string_view name = in_.substr(at_ + 1, close - at_ - 1);
    if (name.starts_with("^")) {
      negated = !negated;
      name.remove_prefix(1);
    }
    const bool plain = !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
      return is_ascii_letter(static_cast<unsigned char>(c)) || c == '_';
    });
    // A script is the Script property in Oniguruma, Script_Extensions in PCRE2 unless it says sc.
    // PCRE2 refuses what is no script, such as Oniguruma's own \p{Punct}.
    if (!plain) {
      fail(fmt::format("the property {}", quote_name(name)));
      return "";
    }
    at_ = close + 1;
    return fmt::format("\\{}{{{}{}}}", negated ? 'P' : 'p',
                       is_general_category(name) ? "" : "sc:", name);
  }

  /// A character given by number; \x{...}, \xHH below 80, \uHHHH.
  std::string by_number(char kind) {
    size_t digits = 0;
    const bool braces = kind == 'x' && take("{");
    const auto is_hex = [](char c) { return is_digit(c) || ((c | 32) >= 'a' && (c | 32) <= 'f'); };
    uint32_t value = 0;
    const size_t most = braces ? 6 : kind == 'u' ? 4 : 2;
    while (digits < most && at_ < in_.size() && is_hex(in_[at_])) {
      const char c = in_[at_++];
      value = value * 16 + static_cast<uint32_t>(is_digit(c) ? c - '0' : (c | 32) - 'a' + 10);
      ++digits;
    }
    const bool complete = braces ? digits > 0 && take("}") : digits == most;
    const bool scalar = value <= 0x10ffff && (value < 0xd800 || value > 0xdfff);
    if (!complete || !scalar || (kind == 'x' && !braces && value >= 0x80)) {
      fail(fmt::format("\\{}", kind));
      return "";
    }
    check_folding(value);
    return fmt::format("\\x{{{:x}}}", value);
  }

  /// What means the same in and outside of sets; empty if `c` is not such an escape.
  std::string common_escape(char c) {
    switch (c) {
      case 's': return R"(\p{White_Space})";
      case 'S': return R"(\P{White_Space})";
      case 'd': return R"(\p{Nd})";
      case 'D': return R"(\P{Nd})";
      case 'p': return property(false);
      case 'P': return property(true);
      case 'x':
      case 'u': return by_number(c);
      case 'v': return R"(\x0b)";
      case 'n':
      case 'r':
      case 't':
      case 'f':
      case 'a':
      case 'e': return std::string("\\") + c;
      default: break;
    }
    const bool punctuation =
        c > ' ' && c < 0x7f && !is_digit(c) && !is_ascii_letter(static_cast<unsigned char>(c));
    if (punctuation || c == ' ') return punctuation ? std::string("\\") + c : " ";
    return "";
  }

  void escape() {
    if (at_ == in_.size()) return fail("a backslash at the end");
    const char c = in_[at_++];
    if (groups_.back().caseless && (c == 'p' || c == 'P')) return fail("(?i) over a property");
    if (const std::string text = common_escape(c); !text.empty() || !problem_.empty()) {
      return atom(text);
    }
    const std::string word(kWordSet);
    switch (c) {
      case 'w': return atom("[" + word + "]");
      case 'W': return atom("[^" + word + "]");
      case 'h': return atom(fmt::format("[{}]", kHexSet));
      case 'H': return atom(fmt::format("[^{}]", kHexSet));
      case 'b': return boundary(fmt::format("(?:(?<=[{0}])(?![{0}])|(?<![{0}])(?=[{0}]))", word));
      case 'B': return boundary(fmt::format("(?:(?<=[{0}])(?=[{0}])|(?<![{0}])(?![{0}]))", word));
      case 'A': return boundary("\\A");
      case 'z': return boundary("\\z");
      default: return fail(fmt::format("the escape {}", quote_name(std::string("\\") + c)));
    }
  }

  void boundary(std::string_view text) {
    out_ += text;
    atom_begin_.reset();
  }

  void set() {
    std::string text = "[";
    if (take("^")) text += '^';
    bool first = true;
    size_t depth = 0;
    while (true) {
      if (at_ == in_.size()) return fail("a set that is not closed");
      if (!first && depth > 0 && take("]")) {
        --depth;
        continue;
      }
      if (take("]")) {
        if (!first) break;
        text += "\\]";
        first = false;
        continue;
      }
      if (!looking_at("[:") && !looking_at("[^") && take("[")) {
        ++depth;  // a set within a set adds what is in it
        first = true;
        continue;
      }
      first = false;
      if (looking_at("[")) return fail("a set within a set that is negated or has a name");
      if (looking_at("&&")) return fail("an intersection of sets");
      if (take("\\")) {
        if (at_ == in_.size()) return fail("a backslash at the end");
        const char c = in_[at_++];
        if (groups_.back().caseless && (c == 'p' || c == 'P')) return fail("(?i) over a property");
        previous_letter_ = 0;
        std::string part = common_escape(c);
        if (part.empty() && c == 'w') part = kWordSet;
        if (part.empty() && c == 'h') part = kHexSet;
        if (part.empty() && c == 'b') part = "\\b";
        if (!problem_.empty()) return;
        if (part.empty()) return fail(fmt::format("\\{} within a set", c));
        text += part;
        continue;
      }
      const auto c = unicode::decode_at(in_, at_);
      previous_letter_ = 0;
      check_folding(c.value);
      const std::string_view bytes = in_.substr(at_, c.bytes);
      text += bytes == "-" ? "-" : quoted(bytes);
      at_ += c.bytes;
    }
    previous_letter_ = 0;
    atom(text + "]");
  }

  std::string_view in_;
  size_t at_ = 0;
  std::string out_;
  std::string problem_;
  std::vector<Group> groups_;
  std::optional<size_t> atom_begin_;  // what a quantifier would repeat
  size_t group_content_begin_ = 0;    // of the group that was opened last
  char previous_letter_ = 0;          // under (?i), the letter just before, lower case
};

}  // namespace

Result<std::string> translate_pattern(std::string_view oniguruma) {
  if (!unicode::is_valid(oniguruma)) return Status(Code::corrupt_file, "not UTF-8");
  return Translator(oniguruma).run();
}

}  // namespace nibble
