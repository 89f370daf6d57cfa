// Compiling and running a translated pattern.
#include "model/tokenizer_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <array>

#include "format/message.h"
#include "model/tokenizer_unicode.h"

namespace nibble {
namespace {

constexpr uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
constexpr size_t kMaxPatternBytes = 20'000;
// Patterns of real models need a handful of steps per character; these bound hostile ones.
constexpr uint32_t kMatchLimit = 1'000'000;
constexpr uint32_t kHeapLimitKib = 65'536;

template <auto Free>
struct Freer {
  template <class T>
  void operator()(T* pointer) const {
    Free(pointer);
  }
};
using MatchData = std::unique_ptr<pcre2_match_data, Freer<pcre2_match_data_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Freer<pcre2_compile_context_free>>;

/// Start and end of the first match at or after `from`; false if there is none.
bool find_next(const pcre2_code* code, pcre2_match_context* context, pcre2_match_data* data,
               std::string_view text, size_t from, Span& found) {
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  int rc = pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, data, context);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its stack on the heap
    rc = pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                     context);
  }
  if (rc < 0) return false;
  const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(data);
  found = {offsets[0], offsets[1]};
  return true;
}

}  // namespace

struct Regex::Compiled {
  std::unique_ptr<pcre2_code, Freer<pcre2_code_free>> code;
  std::unique_ptr<pcre2_match_context, Freer<pcre2_match_context_free>> limits;
};

Result<Regex> Regex::compile_pcre2(const std::string& pattern, const std::string& where) {
  const CompileContext context(pcre2_compile_context_create(nullptr));
  const auto code = std::make_shared<Compiled>();
  code->limits.reset(pcre2_match_context_create(nullptr));
  if (context == nullptr || code->limits == nullptr) {
    return Status(Code::out_of_memory, where + ": no memory for the pattern");
  }
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_match_limit(code->limits.get(), kMatchLimit);
  pcre2_set_heap_limit(code->limits.get(), kHeapLimitKib);
  int error = 0;
  PCRE2_SIZE offset = 0;
  code->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                 kOptions, &error, &offset, context.get()));
  if (code->code == nullptr) {
    std::array<PCRE2_UCHAR, 256> message{};
    pcre2_get_error_message(error, message.data(), message.size());
    return Status(Code::unsupported, fmt::format("{}: pattern {}: {}", where, quote_name(pattern),
                                                 reinterpret_cast<const char*>(message.data())));
  }
  // Without JIT (other architectures, no executable memory) the interpreter does the same work.
  (void)pcre2_jit_compile(code->code.get(), PCRE2_JIT_COMPLETE);
  return Regex(std::shared_ptr<const Compiled>(code));
}

Result<Regex> Regex::compile(std::string_view oniguruma, const std::string& where) {
  if (oniguruma.size() > kMaxPatternBytes) {
    return Status(Code::unsupported, fmt::format("{}: a pattern of {} bytes, more than {}", where,
                                                 oniguruma.size(), kMaxPatternBytes));
  }
  auto pattern = translate_pattern(oniguruma);
  if (!pattern.ok()) {
    return Status(pattern.status().code(),
                  fmt::format("{}: pattern {}: {}", where, quote_name(oniguruma),
                              pattern.status().message()));
  }
  return compile_pcre2(*pattern, where);
}

Result<Regex> Regex::compile_literal(std::string_view literal, const std::string& where) {
  if (literal.size() > kMaxPatternBytes) {
    return Status(Code::unsupported, fmt::format("{}: a text of {} bytes, more than {}", where,
                                                 literal.size(), kMaxPatternBytes));
  }
  std::string pattern;
  for (size_t at = 0; at < literal.size();) {
    const auto c = unicode::decode_at(literal, at);
    pattern += fmt::format("\\x{{{:x}}}", c.value);
    at += c.bytes;
  }
  return compile_pcre2(pattern, where);
}

void Regex::find_all(std::string_view text, std::vector<Span>& matches) const {
  matches.clear();
  const MatchData data(pcre2_match_data_create(1, nullptr));
  if (data == nullptr) return;
  std::string older;  // the same text to PCRE2's eyes, character by character
  if (unicode::substitute_new_characters(text, older)) text = older;
  Span found;
  for (size_t from = 0; from <= text.size();) {
    if (!find_next(code_->code.get(), code_->limits.get(), data.get(), text, from, found)) return;
    if (found.begin == found.end && !matches.empty() && matches.back().end == found.end) {
      from += from < text.size() ? unicode::decode_at(text, from).bytes : 1;
      continue;
    }
    matches.push_back(found);
    from = found.end;
  }
}

}  // namespace nibble
