// SHA-256, to name texts and files by what they hold: the digests that are printed and stored are
// those of sha256sum. The arithmetic is OpenSSL's.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace nibble {

class Sha256 {
 public:
  Sha256();
  Sha256(Sha256&&) noexcept;
  ~Sha256();
  void update(const void* data, size_t bytes);
  void update(std::string_view text) { update(text.data(), text.size()); }
  /// 64 lower-case hexadecimal digits. Nothing may be added afterwards.
  std::string finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

inline std::string sha256_hex(std::string_view text) {
  Sha256 hash;
  hash.update(text);
  return hash.finish();
}

}  // namespace nibble
