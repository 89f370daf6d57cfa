// A line protocol for scripts/check_tokenizer.py: tokenizes what it reads, as bytes, so that any
// text can be sent.
//   tokenize_lines DIR [--speed FILE]
// Reads records from stdin until its end: one byte of mode, a 32-bit length (little endian), then
// that many bytes. Modes: 'e' encode, 'E' with special tokens added, 'u' encode_untrusted; 'd'
// decode 32-bit ids, 'D' without special tokens, 's' and 'S' the same through StreamDecoder.
// Writes for each a 32-bit count and so many 32-bit ids, or so many bytes of text.
#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>

#include "model/tokenizer.h"

namespace {

using namespace nibble;

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

template <class T>
void write_all(const T& items) {
  const auto count = static_cast<uint32_t>(items.size());
  std::fwrite(&count, sizeof(count), 1, stdout);
  std::fwrite(items.data(), sizeof(items[0]), items.size(), stdout);
}

std::string decode(const Tokenizer& tokenizer, const std::string& bytes, char mode) {
  std::vector<int32_t> ids(bytes.size() / sizeof(int32_t));
  std::memcpy(ids.data(), bytes.data(), ids.size() * sizeof(int32_t));
  const bool skip = mode == 'D' || mode == 'S';
  if (mode == 'd' || mode == 'D') return tokenizer.decode(ids, skip);
  StreamDecoder stream(tokenizer, skip);
  std::string text;
  for (const int32_t id : ids) text += stream.push(id);
  return text + stream.finish();
}

int serve(const Tokenizer& tokenizer) {
  char mode = 0;
  uint32_t size = 0;
  std::string bytes;
  while (std::fread(&mode, 1, 1, stdin) == 1 && std::fread(&size, sizeof(size), 1, stdin) == 1) {
    bytes.resize(size);
    if (std::fread(bytes.data(), 1, size, stdin) != size) return 2;
    switch (mode) {
      case 'e':
      case 'E': write_all(tokenizer.encode(bytes, mode == 'E')); break;
      case 'u': write_all(tokenizer.encode_untrusted(bytes, false)); break;
      case 'd':
      case 'D':
      case 's':
      case 'S': write_all(decode(tokenizer, bytes, mode)); break;
      default: return 2;
    }
  }
  return std::fflush(stdout) == 0 ? 0 : 4;
}

int measure(const std::string& directory, const Tokenizer& tokenizer, const char* file) {
  std::ifstream in(file, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  double load = 1e9;
  double encode = 1e9;
  double decode = 1e9;
  size_t count = 0;
  for (int round = 0; round < 5; ++round) {
    auto begin = std::chrono::steady_clock::now();
    if (!Tokenizer::load(directory).ok()) return 1;
    load = std::min(load, seconds_since(begin));
    begin = std::chrono::steady_clock::now();
    const auto ids = tokenizer.encode(text, false);
    encode = std::min(encode, seconds_since(begin));
    begin = std::chrono::steady_clock::now();
    (void)tokenizer.decode(ids, false);
    decode = std::min(decode, seconds_since(begin));
    count = ids.size();
  }
  const double megabytes = static_cast<double>(text.size()) / 1e6;
  fmt::print(
      "{} tokens, load {:.1f} ms, {} bytes -> {} ids, encode {:.2f} MB/s, decode {:.2f} MB/s\n",
      tokenizer.vocab_size(), load * 1e3, text.size(), count, megabytes / encode,
      megabytes / decode);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 4) {
    fmt::print(stderr, "usage: tokenize_lines DIR [--speed FILE]\n");
    return 2;
  }
  const auto tokenizer = Tokenizer::load(argv[1]);
  if (!tokenizer.ok()) {
    fmt::print(stderr, "{}\n", tokenizer.status().message());
    return static_cast<int>(tokenizer.status().code());
  }
  return argc == 4 ? measure(argv[1], *tokenizer, argv[3]) : serve(*tokenizer);
}
