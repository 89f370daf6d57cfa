// Encoding with the model. The order of merges is the tokenizers package's to the letter: a heap
// of (rank, position), stale entries recognised by the id that they would make.
#include "model/tokenizer_bpe.h"

#include <algorithm>

#include "model/tokenizer_unicode.h"

namespace nibble {

struct Bpe::Scratch {
  struct Symbol {
    uint32_t id;
    int32_t previous;
    int32_t next;
    bool gone;
  };
  struct Candidate {
    uint32_t rank;
    uint32_t position;
    uint32_t id;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;

  void push(Candidate candidate) {
    heap.push_back(candidate);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
  Candidate pop() {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const Candidate top = heap.back();
    heap.pop_back();
    return top;
  }
};

/// Pieces repeat: words of the same text. One slot per hash, the later piece wins. Lives for one
/// call, so that calls share nothing; the pieces stay where they are that long.
class Bpe::PieceCache {
 public:
  explicit PieceCache(size_t pieces)
      : slots_(std::bit_ceil(std::clamp<size_t>(pieces, 16, 8192))) {}

  struct Slot {
    std::string_view piece;
    size_t begin = 0;  // of its ids in the output
    size_t end = 0;
  };
  Slot& slot(std::string_view piece) { return slots_[hash_text(piece) & (slots_.size() - 1)]; }

 private:
  std::vector<Slot> slots_;
};

std::optional<uint32_t> Bpe::id_of(std::string_view token) const {
  const int64_t id = ids_.find(token, [this](uint32_t other) { return text_of(other); });
  if (id < 0) return std::nullopt;
  return static_cast<uint32_t>(id);
}

std::string_view Bpe::text_of(uint32_t id) const {
  if (id >= texts_.size() || texts_[id].size == kAbsent) return {};
  return std::string_view(arena_).substr(texts_[id].begin, texts_[id].size);
}

/// One symbol per character that is a token; others become bytes, the unknown token, or nothing.
void Bpe::split_characters(std::string_view piece, Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  symbols.clear();
  const auto add = [&symbols](int32_t id) {
    symbols.push_back({static_cast<uint32_t>(id), static_cast<int32_t>(symbols.size()) - 1,
                       static_cast<int32_t>(symbols.size()) + 1, false});
  };
  // An unknown is held back until a known character follows, or the end: bytes in between overtake
  // it. So does the tokenizers package.
  bool unknown = false;
  for (size_t at = 0; at < piece.size();) {
    const unicode::CodePoint c = unicode::decode_at(piece, at);
    const std::string_view character = piece.substr(at, c.bytes);
    at += c.bytes;
    int32_t id = -1;
    if (c.value < small_ids_.size()) {
      id = small_ids_[c.value];
    } else if (const auto found = id_of(character)) {
      id = static_cast<int32_t>(*found);
    }
    if (id >= 0) {
      if (unknown) add(unk_id_);
      unknown = false;
      add(id);
      continue;
    }
    if (byte_fallback_ && std::all_of(character.begin(), character.end(), [this](char byte) {
          return byte_ids_[static_cast<unsigned char>(byte)] >= 0;
        })) {
      for (const char byte : character) add(byte_ids_[static_cast<unsigned char>(byte)]);
      continue;
    }
    if (unk_id_ < 0) continue;
    if (unknown && !fuse_unk_) add(unk_id_);
    unknown = true;
  }
  if (unknown) add(unk_id_);
  if (!symbols.empty()) symbols.back().next = -1;
}

void Bpe::merge_all(Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  const auto merge_of = [this, &symbols](int32_t left, int32_t right) {
    return merges_.find(uint64_t{symbols[static_cast<size_t>(left)].id} << 32 |
                        symbols[static_cast<size_t>(right)].id);
  };
  scratch.heap.clear();
  for (size_t i = 0; i + 1 < symbols.size(); ++i) {
    if (const Merge* merge = merge_of(static_cast<int32_t>(i), static_cast<int32_t>(i) + 1)) {
      scratch.heap.push_back({merge->rank, static_cast<uint32_t>(i), merge->id});
    }
  }
  std::make_heap(scratch.heap.begin(), scratch.heap.end(), std::greater<>());
  while (!scratch.heap.empty()) {
    const auto top = scratch.pop();
    const auto position = static_cast<int32_t>(top.position);
    auto& left = symbols[top.position];
    if (left.gone || left.next < 0) continue;
    const Merge* now = merge_of(position, left.next);
    if (now == nullptr || now->id != top.id) continue;
    auto& right = symbols[static_cast<size_t>(left.next)];
    left.id = top.id;
    left.next = right.next;
    right.gone = true;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = position;
    if (left.previous >= 0) {
      if (const Merge* merge = merge_of(left.previous, position)) {
        scratch.push({merge->rank, static_cast<uint32_t>(left.previous), merge->id});
      }
    }
    if (left.next >= 0) {
      if (const Merge* merge = merge_of(position, left.next)) {
        scratch.push({merge->rank, top.position, merge->id});
      }
    }
  }
}

void Bpe::encode_piece(std::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const auto id = id_of(piece)) return ids.push_back(static_cast<int32_t>(*id));
  }
  split_characters(piece, scratch);
  merge_all(scratch);
  for (const auto& symbol : scratch.symbols) {
    if (!symbol.gone) ids.push_back(static_cast<int32_t>(symbol.id));
  }
}

void Bpe::encode(std::string_view text, const std::vector<Span>& pieces,
                 std::vector<int32_t>& ids) const {
  constexpr size_t kLongestCached = 64;
  Scratch scratch;
  PieceCache cache(pieces.size());
  for (const Span& span : pieces) {
    const std::string_view piece = text.substr(span.begin, span.end - span.begin);
    if (piece.size() > kLongestCached) {
      encode_piece(piece, scratch, ids);
      continue;
    }
    PieceCache::Slot& slot = cache.slot(piece);
    const size_t begin = ids.size();
    if (slot.piece == piece && !piece.empty()) {
      for (size_t i = slot.begin; i < slot.end; ++i) {
        const int32_t id = ids[i];
        ids.push_back(id);
      }
      continue;
    }
    encode_piece(piece, scratch, ids);
    slot = {piece, begin, ids.size()};
  }
}

}  // namespace nibble
