// Cutting pieces at the matches of a pattern, with the five behaviours of tokenizer.json.
#pragma once

#include <string_view>
#include <vector>

#include "model/tokenizer_pretokenizer.h"

namespace nibble {

enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

/// Cuts every piece at the matches of `regex`, or with `invert` at what is between them.
void split_pieces(Pieces& pieces, const Regex& regex, SplitBehavior behavior, bool invert);

}  // namespace nibble
