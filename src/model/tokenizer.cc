// Encoding, decoding and looking tokens up.
#include "model/tokenizer.h"

#include <algorithm>

#include "model/tokenizer_state.h"
#include "model/tokenizer_unicode.h"

namespace nibble {

std::vector<int32_t> Tokenizer::State::encode(std::string_view text, bool with_special,
                                              bool add_special_tokens) const {
  std::string replaced;
  if (!unicode::is_valid(text)) {
    replaced = unicode::replace_invalid(text);
    text = replaced;
  }
  std::vector<int32_t> ids;
  std::vector<AddedVocabulary::Part> raw_parts;
  std::vector<AddedVocabulary::Part> parts;
  added.split(text, false, with_special, raw_parts);
  for (const auto& raw_part : raw_parts) {
    if (raw_part.id >= 0) {
      ids.push_back(raw_part.id);
      continue;
    }
    std::string normal(text.substr(raw_part.span.begin, raw_part.span.end - raw_part.span.begin));
    normalizer.apply(normal);
    added.split(normal, true, with_special, parts);
    for (const auto& part : parts) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      Pieces pieces;
      pieces.text = normal.substr(part.span.begin, part.span.end - part.span.begin);
      pieces.spans = {{0, pieces.text.size()}};
      pieces.at_start = raw_part.span.begin == 0 && part.span.begin == 0;
      pre_tokenizer.apply(pieces);
      model.encode(pieces.text, pieces.spans, ids);
    }
  }
  return post_processor.apply(std::move(ids), add_special_tokens);
}

bool Tokenizer::State::decoded_text(int32_t id, bool skip_special_tokens,
                                    std::string_view& text) const {
  if (id < 0) return false;
  const auto index = static_cast<uint32_t>(id);
  if (const AddedToken* token = added.find(index)) {
    text = token->decoded;
    return !skip_special_tokens || !added.is_special(token->content);
  }
  text = model.text_of(index);
  return text.data() != nullptr;
}

std::string Tokenizer::State::decode(std::span<const int32_t> ids, bool skip_special_tokens,
                                     BrokenText broken) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const int32_t id : ids) {
    std::string_view text;
    if (decoded_text(id, skip_special_tokens, text)) tokens.emplace_back(text);
  }
  return decoder.decode(std::move(tokens), broken);
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  return state_->encode(text, true, add_special_tokens);
}

std::vector<int32_t> Tokenizer::encode_untrusted(std::string_view text,
                                                 bool add_special_tokens) const {
  return state_->encode(text, false, add_special_tokens);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  return state_->decode(ids, skip_special_tokens, BrokenText::replaced);
}

size_t Tokenizer::vocab_size() const {
  const auto& tokens = state_->added.tokens();
  const auto new_tokens = std::count_if(tokens.begin(), tokens.end(), [this](const auto& token) {
    return !state_->model.id_of(token.content);
  });
  return state_->model.vocab_size() + static_cast<size_t>(new_tokens);
}

size_t Tokenizer::id_limit() const { return state_->added.id_limit(); }

std::optional<int32_t> Tokenizer::bos_id() const { return state_->bos_id; }

const std::vector<int32_t>& Tokenizer::eos_ids() const { return state_->eos_ids; }

bool Tokenizer::is_eos(int32_t id) const {
  return std::find(eos_ids().begin(), eos_ids().end(), id) != eos_ids().end();
}

bool Tokenizer::is_special(int32_t id) const {
  const AddedToken* token = id < 0 ? nullptr : state_->added.find(static_cast<uint32_t>(id));
  return token != nullptr && state_->added.is_special(token->content);
}

std::optional<std::string> Tokenizer::token_text(int32_t id) const {
  if (id < 0) return std::nullopt;
  if (const AddedToken* token = state_->added.find(static_cast<uint32_t>(id))) {
    return token->content;
  }
  const std::string_view text = state_->model.text_of(static_cast<uint32_t>(id));
  if (text.data() == nullptr) return std::nullopt;
  return std::string(text);
}

std::optional<int32_t> Tokenizer::token_id(std::string_view text) const {
  auto id = state_->added.id_of(text);
  if (!id) id = state_->model.id_of(text);
  if (!id) return std::nullopt;
  return static_cast<int32_t>(*id);
}

// ---- StreamDecoder ------------------------------------------------------------------------------

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens)
    : tokenizer_(tokenizer), skip_special_tokens_(skip_special_tokens) {}

std::string StreamDecoder::push(int32_t id) {
  // Decoders treat the start of a text in their own ways and look at nothing else but the token
  // itself, so a few tokens before it are context enough.
  constexpr size_t kMaxContext = 8;
  const auto decode = [this](const std::vector<int32_t>& ids) {
    return tokenizer_.state_->decode(ids, skip_special_tokens_, BrokenText::kept);
  };
  context_.push_back(id);
  std::string text = decode(context_);
  const auto [common, unused] =
      std::mismatch(text.begin(), text.end(), context_text_.begin(), context_text_.end());
  pending_.append(common, text.end());
  std::string_view found;
  const bool gives_text = tokenizer_.state_->decoded_text(id, skip_special_tokens_, found);
  if (!gives_text) {
    context_.pop_back();
  } else if (context_.size() > kMaxContext) {
    context_.erase(context_.begin(), context_.begin() + kMaxContext / 2);
    context_text_ = decode(context_);
  } else {
    context_text_ = std::move(text);
  }
  return take_complete(false);
}

std::string StreamDecoder::finish() {
  context_.clear();
  context_text_.clear();
  return take_complete(true);
}

std::string StreamDecoder::take_complete(bool at_end) {
  std::string out;
  size_t at = 0;
  while (at < pending_.size()) {
    const auto step = unicode::next_step(pending_, at);
    if (step.incomplete && !at_end) break;
    out += step.valid ? std::string_view(pending_).substr(at, step.bytes) : "\uFFFD";
    at += step.bytes;
  }
  pending_.erase(0, at);
  return out;
}

}  // namespace nibble
