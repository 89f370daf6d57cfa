// The two hash tables of the tokenizer: pairs of ids to what they merge into, and texts to ids.
// Open addressing in one array each, because start-up time is filling them and encoding is
// looking things up in them. Built once, then only read.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace nibble {

inline uint64_t mix_bits(uint64_t x) {
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93;
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93;
  return x ^ x >> 32;
}

/// Eight bytes at a time. Not for keys chosen by an enemy: a file full of collisions loads slowly.
inline uint64_t hash_text(std::string_view text) {
  uint64_t hash = text.size() * 0x9e3779b97f4a7c15;
  const char* data = text.data();
  size_t left = text.size();
  for (; left >= 8; left -= 8, data += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data, 8);
    hash = mix_bits(hash ^ word);
  }
  uint64_t word = 0;
  if (left > 0) std::memcpy(&word, data, left);
  return mix_bits(hash ^ word);
}

inline size_t table_size(size_t entries) { return std::bit_ceil(entries * 2 + 1); }

/// 64-bit keys to small values.
template <class Value>
class FlatMap64 {
 public:
  void reserve(size_t entries) { slots_.assign(table_size(entries), Slot{}); }

  /// The value of `key`, made if it is new. At most as many keys as were reserved.
  Value& operator[](uint64_t key) {
    Slot& slot = slots_[find_slot(key)];
    slot.used = true;
    slot.key = key;
    return slot.value;
  }

  const Value* find(uint64_t key) const {
    if (slots_.empty()) return nullptr;
    const Slot& slot = slots_[find_slot(key)];
    return slot.used ? &slot.value : nullptr;
  }

 private:
  struct Slot {
    uint64_t key = 0;
    Value value{};
    bool used = false;
  };

  size_t find_slot(uint64_t key) const {
    const size_t mask = slots_.size() - 1;
    size_t at = mix_bits(key) & mask;
    while (slots_[at].used && slots_[at].key != key) at = (at + 1) & mask;
    return at;
  }

  std::vector<Slot> slots_;
};

/// Texts, kept elsewhere and named by index, to that index.
class TextIndex {
 public:
  void reserve(size_t entries) { slots_.assign(table_size(entries), Slot{}); }

  /// False if `text` is there already. `text_of(index)` gives the text that was inserted with it.
  template <class TextOf>
  bool insert(std::string_view text, uint32_t index, const TextOf& text_of) {
    const uint64_t hash = hash_text(text);
    Slot& slot = slots_[find_slot(text, hash, text_of)];
    if (slot.index != kEmpty) return false;
    slot = {static_cast<uint32_t>(hash >> 32), index};
    return true;
  }

  template <class TextOf>
  int64_t find(std::string_view text, const TextOf& text_of) const {
    if (slots_.empty()) return -1;
    const Slot& slot = slots_[find_slot(text, hash_text(text), text_of)];
    return slot.index == kEmpty ? -1 : static_cast<int64_t>(slot.index);
  }

 private:
  static constexpr uint32_t kEmpty = UINT32_MAX;
  struct Slot {
    uint32_t hash_high = 0;
    uint32_t index = kEmpty;
  };

  template <class TextOf>
  size_t find_slot(std::string_view text, uint64_t hash, const TextOf& text_of) const {
    const size_t mask = slots_.size() - 1;
    const auto high = static_cast<uint32_t>(hash >> 32);
    size_t at = hash & mask;
    while (slots_[at].index != kEmpty &&
           (slots_[at].hash_high != high || text_of(slots_[at].index) != text)) {
      at = (at + 1) & mask;
    }
    return at;
  }

  std::vector<Slot> slots_;
};

}  // namespace nibble
