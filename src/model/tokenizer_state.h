// What a loaded tokenizer holds. Private to tokenizer.cc and tokenizer_load.cc.
#pragma once

#include "model/tokenizer.h"
#include "model/tokenizer_added.h"
#include "model/tokenizer_bpe.h"
#include "model/tokenizer_decoder.h"
#include "model/tokenizer_normalizer.h"
#include "model/tokenizer_pretokenizer.h"
#include "model/tokenizer_template.h"

namespace nibble {

struct Tokenizer::State {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe model;
  AddedVocabulary added;
  TokenTemplate post_processor;
  TokenDecoder decoder;
  std::optional<int32_t> bos_id;
  std::vector<int32_t> eos_ids;

  std::vector<int32_t> encode(std::string_view text, bool with_special,
                              bool add_special_tokens) const;
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens,
                     BrokenText broken) const;
  /// The text that decoding starts from; false if there is no such token, or it is left out.
  bool decoded_text(int32_t id, bool skip_special_tokens, std::string_view& text) const;
};

}  // namespace nibble
