// The behaviours, as the tokenizers package folds its lists of matches.
#include "model/tokenizer_split.h"

#include <algorithm>

namespace nibble {
namespace {

struct Part {
  Span span;
  bool match = false;
};

/// The whole of `text` as alternating parts; empty ones occur where the pattern matches nothing.
void find_parts(std::string_view text, const Regex& regex, bool invert, std::vector<Span>& matches,
                std::vector<Part>& parts) {
  parts.clear();
  regex.find_all(text, matches);
  size_t last = 0;
  for (const Span& match : matches) {
    if (last != match.begin) parts.push_back({{last, match.begin}, invert});
    parts.push_back({match, !invert});
    last = match.end;
  }
  if (last != text.size()) parts.push_back({{last, text.size()}, invert});
}

/// Joins each part that `joins` says to the one before it (in the order given).
template <class Joins>
void fold(std::vector<Part>& parts, const Joins& joins) {
  bool previous = false;
  size_t kept = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part part = parts[i];
    if (joins(part.match, previous) && kept > 0) {
      Span& last = parts[kept - 1].span;
      last = {std::min(last.begin, part.span.begin), std::max(last.end, part.span.end)};
    } else {
      parts[kept++] = part;
    }
    previous = part.match;
  }
  parts.resize(kept);
}

void apply_behavior(std::vector<Part>& parts, SplitBehavior behavior) {
  const auto lone_match = [](bool match, bool previous) { return match && !previous; };
  switch (behavior) {
    case SplitBehavior::isolated: return;
    case SplitBehavior::removed:
      std::erase_if(parts, [](const Part& part) { return part.match; });
      return;
    case SplitBehavior::contiguous:
      return fold(parts, [](bool match, bool previous) { return match == previous; });
    case SplitBehavior::merged_with_previous: return fold(parts, lone_match);
    case SplitBehavior::merged_with_next:
      std::reverse(parts.begin(), parts.end());
      fold(parts, lone_match);
      std::reverse(parts.begin(), parts.end());
      return;
  }
}

}  // namespace

void split_pieces(Pieces& pieces, const Regex& regex, SplitBehavior behavior, bool invert) {
  std::vector<Span> cut;
  std::vector<Span> matches;
  std::vector<Part> parts;
  cut.reserve(std::max(pieces.spans.size(), pieces.text.size() / 4));
  for (const Span& span : pieces.spans) {
    find_parts(pieces.piece(span), regex, invert, matches, parts);
    apply_behavior(parts, behavior);
    for (const Part& part : parts) {
      if (part.span.begin == part.span.end) continue;
      cut.push_back({span.begin + part.span.begin, span.begin + part.span.end});
    }
  }
  pieces.spans = std::move(cut);
}

}  // namespace nibble
