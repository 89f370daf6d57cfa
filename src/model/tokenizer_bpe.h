// The byte-pair-encoding model: a vocabulary, merges with ranks, and what becomes of characters
// that are not in the vocabulary. Works on pieces of text that are already split and normalized.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "model/tokenizer_flat_map.h"
#include "model/tokenizer_regex.h"

namespace nibble {

class Bpe {
 public:
  /// The text of the "model" object of tokenizer.json (valid UTF-8).
  static Result<Bpe> parse(std::string_view model_json, const std::string& where);

  size_t vocab_size() const { return size_; }        // tokens
  size_t id_limit() const { return texts_.size(); }  // greatest id + 1
  std::optional<uint32_t> id_of(std::string_view token) const;
  /// The token's text, or null data if the vocabulary has no such id.
  std::string_view text_of(uint32_t id) const;

  /// Appends the ids of every piece. Deterministic; may be called from several threads.
  void encode(std::string_view text, const std::vector<Span>& pieces,
              std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    uint32_t rank = 0;
    uint32_t id = 0;
  };
  struct Scratch;
  class PieceCache;

  Status parse_options(const nlohmann::json& options, const std::string& where);
  Status parse_vocab(std::string_view json, const std::string& where);
  Status parse_merges(std::string_view json, const std::string& where);
  Status add_merge(std::string_view left, std::string_view right, uint32_t rank,
                   const std::string& where);
  Status check_unknowns(const std::string& where);
  void index_small_token(std::string_view token, uint32_t id);
  void split_characters(std::string_view piece, Scratch& scratch) const;
  void merge_all(Scratch& scratch) const;
  void encode_piece(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;

  std::string arena_;  // all token texts
  struct Text {
    uint32_t begin = 0;
    uint32_t size = kAbsent;
  };
  static constexpr uint32_t kAbsent = UINT32_MAX;
  std::vector<Text> texts_;  // by id
  size_t size_ = 0;
  TextIndex ids_;
  FlatMap64<Merge> merges_;
  std::string merged_;  // of add_merge: the last merged text and its id
  uint32_t merged_id_ = 0;
  std::array<int32_t, 0x400> small_ids_{};  // ids of one-character tokens below U+0400, or -1
  std::array<int32_t, 256> byte_ids_{};     // ids of <0x00> ... <0xFF>, or -1
  std::optional<std::string> unk_token_;
  int32_t unk_id_ = -1;
  bool fuse_unk_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
};

}  // namespace nibble
