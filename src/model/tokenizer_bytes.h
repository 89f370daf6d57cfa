// The alphabet of byte-level tokenizers: every byte as one printable character, GPT-2's way.
#pragma once

#include <array>
#include <cstdint>

namespace nibble {

/// Printable bytes stand for themselves; the others follow from U+0100 in order.
inline constexpr auto kByteLevelCharacters = [] {
  std::array<uint16_t, 256> characters{};
  uint16_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
    characters[byte] = printable ? static_cast<uint16_t>(byte) : next++;
  }
  return characters;
}();

inline uint32_t byte_level_character(unsigned char byte) { return kByteLevelCharacters[byte]; }

/// The byte that a character stands for, or -1.
inline constexpr auto kByteLevelBytes = [] {
  std::array<int16_t, 0x200> bytes{};
  bytes.fill(-1);
  for (unsigned byte = 0; byte < 256; ++byte) {
    bytes[kByteLevelCharacters[byte]] = static_cast<int16_t>(byte);
  }
  return bytes;
}();

inline int byte_of_character(uint32_t character) {
  return character < kByteLevelBytes.size() ? kByteLevelBytes[character] : -1;
}

}  // namespace nibble
