// Text to token ids and back, as the `tokenizers` package does it with the same tokenizer.json:
// byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece-style BPE (Llama 2, Mistral,
// Gemma). A component that is not implemented makes loading fail with `unsupported` and its name.
// Not here: chat templates (scripts/render_chat.py), Unigram and WordPiece models,
// clean_up_tokenization_spaces, truncation and padding, which transformers does on top.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace nibble {

/// The files that a tokenizer is made of, as text; all but the first may be empty.
struct TokenizerFiles {
  std::string_view tokenizer = {};           // tokenizer.json
  std::string_view tokenizer_config = {};    // names bos and eos, add_bos_token
  std::string_view special_tokens_map = {};  // names bos and eos where the former does not
  std::string_view generation_config = {};   // the ids that end generation
  std::string_view config = {};              // those ids where generation_config has none
};

/// Immutable once loaded: may be used from several threads. Copies share their tables.
class Tokenizer {
 public:
  /// Reads a model directory. io_error if there is no tokenizer.json, unsupported if there is only
  /// a tokenizer.model or vocab.json, corrupt_file if a file is torn or contradicts itself.
  static Result<Tokenizer> load(const std::string& directory);
  static Result<Tokenizer> parse(const TokenizerFiles& files);

  /// `text` is UTF-8; what is not is replaced by U+FFFD first, as Python's
  /// bytes.decode("utf-8", "replace") does. Special tokens written out in the text, such as
  /// <|im_end|>, become their ids: never pass what a stranger wrote, see encode_untrusted.
  /// `add_special_tokens` puts around it what the file's post_processor says; if that says nothing
  /// and tokenizer_config.json has add_bos_token, the beginning-of-sequence token.
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens) const;

  /// The same with special tokens in the text taken as text. (Added tokens that are not special are
  /// still found.) What `encode_special_tokens = True` does in Python.
  std::vector<int32_t> encode_untrusted(std::string_view text, bool add_special_tokens) const;

  /// Valid UTF-8: bytes of tokens that are not become U+FFFD. Ids that do not exist are left out,
  /// and special tokens if asked (also those that are normalized, which version 0.23 of the
  /// tokenizers package leaves in).
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  size_t vocab_size() const;  // tokens, added ones included
  size_t id_limit() const;    // greatest id + 1: at most this many logits mean something

  std::optional<int32_t> bos_id() const;
  /// What ends generation: eos_token_id of generation_config.json (of config.json if that has
  /// none) and the eos_token of tokenizer_config.json, in that order, each once.
  const std::vector<int32_t>& eos_ids() const;
  bool is_eos(int32_t id) const;
  bool is_special(int32_t id) const;

  /// The text as the file writes it (a space may be U+0120 or U+2581); nullopt if there is no such
  /// token.
  std::optional<std::string> token_text(int32_t id) const;
  std::optional<int32_t> token_id(std::string_view text) const;

 private:
  friend class StreamDecoder;
  struct State;
  explicit Tokenizer(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

/// Decodes ids one by one for printing. What comes out, one after the other, is what decode() gives
/// for all of them, whole characters only; with one exception: of a run of <0xHH> tokens that is
/// not UTF-8, decode() drops also the characters before the fault, which are printed here already.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens);

  /// The text that `id` completes; may be empty.
  std::string push(int32_t id);
  /// What is left at the end: U+FFFD for a character that was never completed.
  std::string finish();

 private:
  std::string take_complete(bool at_end);

  Tokenizer tokenizer_;
  bool skip_special_tokens_;
  std::vector<int32_t> context_;  // the last tokens that gave text: decoders look back at them
  std::string context_text_;
  std::string pending_;  // bytes that are no whole character yet
};

}  // namespace nibble
