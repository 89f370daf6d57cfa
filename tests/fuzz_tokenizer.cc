// libFuzzer target: tokenizer.json and text at once. The input is a document, a zero byte, and the
// text to encode. Nothing may throw or hang; what a document that loads gives must hold together.
//   ./fuzz_tokenizer -runs=1000000 -max_len=4096
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "base/check.h"
#include "model/tokenizer.h"
#include "model/tokenizer_unicode.h"

namespace {

using namespace nibble;

void check_ids(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  for (const bool skip : {false, true}) {
    const std::string decoded = tokenizer.decode(ids, skip);
    NIBBLE_CHECK(unicode::is_valid(decoded));
    StreamDecoder stream(tokenizer, skip);
    std::string streamed;
    for (const int32_t id : ids) streamed += stream.push(id);
    streamed += stream.finish();
    NIBBLE_CHECK(unicode::is_valid(streamed));
  }
}

void check_text(const Tokenizer& tokenizer, std::string_view text) {
  const auto ids = tokenizer.encode(text, true);
  NIBBLE_CHECK(ids == tokenizer.encode(unicode::replace_invalid(text), true));
  check_ids(tokenizer, ids);
  const auto plain = tokenizer.encode_untrusted(text, false);
  // Ids of the text are tokens; those of a template are whatever the file says.
  for (const int32_t id : plain) NIBBLE_CHECK(tokenizer.token_text(id).has_value());
  for (const int32_t id : plain) NIBBLE_CHECK(static_cast<size_t>(id) < tokenizer.id_limit());
}

/// Documents to start from instead of a corpus: one with every byte-level part, one with every
/// SentencePiece part, one with the rest.
std::string make_document(unsigned which) {
  using nlohmann::json;
  json document = json::parse(R"json({"version": "1.0", "added_tokens": [
      {"id": 0, "content": "<unk>", "special": true, "normalized": false},
      {"id": 1, "content": "<s>", "special": true, "normalized": false, "rstrip": true},
      {"id": 12, "content": "ab", "single_word": true, "lstrip": true}],
    "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
      "vocab": {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "c": 4, "bc": 5, "abc": 6, "Ġ": 7, "▁": 8,
                "▁a": 9, "<0x41>": 10, "1": 11},
      "merges": [["b", "c"], ["a", "bc"], ["▁", "a"]]}})json");
  if (which % 3 == 0) {
    document.update(json::parse(R"json({"normalizer": {"type": "NFC"},
      "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex":
          "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\w]++[\\r\\n]*|\\s+(?!\\S)"
  }
  , "behavior" : "Isolated", "invert" : false
},
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}]
}
, "post_processor" : {
  "type" : "TemplateProcessing",
  "single" : [
    {"SpecialToken" : {"id" : "<s>", "type_id" : 0}}, {"Sequence" : {"id" : "A", "type_id" : 0}}
  ],
  "special_tokens" : {"<s>" : {"id" : "<s>", "ids" : [1], "tokens" : ["<s>"]}}
},
                     "decoder" : {
  "type" : "ByteLevel"
}
})json"));
    document["model"]["ignore_merges"] = true;
  } else if (which % 3 == 1) {
    document.update(json::parse(R"json({"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
      "pre_tokenizer": {"type": "Split", "pattern": {"String": "▁"},
        "behavior": "MergedWithNext", "invert": true},
      "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}})json"));
  } else {
    document.update(json::parse(R"json({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Whitespace"}, {"type": "WhitespaceSplit"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}]},
      "post_processor": {"type": "BertProcessing", "sep": ["<s>", 1], "cls": ["<s>", 1]},
      "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}})json"));
    document["model"]["merges"] = {"b c", "a bc"};
  }
  return document.dump();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t cut = std::min(input.find('\0'), input.size());
  const std::string_view text = input.substr(std::min(cut + 1, input.size()));
  const auto tokenizer = Tokenizer::parse({.tokenizer = input.substr(0, cut)});
  if (!tokenizer.ok()) {
    NIBBLE_CHECK(tokenizer.status().code() == Code::corrupt_file ||
                 tokenizer.status().code() == Code::unsupported);
    NIBBLE_CHECK(tokenizer.status().message().size() < 2000);
    return 0;
  }
  check_text(*tokenizer, text);
  std::vector<int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<signed char>(c));
  check_ids(*tokenizer, ids);
  return 0;
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

/// Starts again from a real document now and then; keeps the text at its place otherwise.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  if (size < 2 || seed % 32 == 0) {
    std::string input = make_document(seed / 32);
    input += '\0';
    input +=
        "<s>ab abc \xc3\xa9 123\n'S \xff\xe2\x96\x81"
        "A";
    if (input.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
    std::memcpy(data, input.data(), input.size());
    size = input.size();
  }
  const void* zero = std::memchr(data, 0, size);
  const size_t cut =
      zero == nullptr ? size : static_cast<size_t>(static_cast<const uint8_t*>(zero) - data) + 1;
  if (cut < size && seed % 2 == 1) {  // the text alone
    return cut + LLVMFuzzerMutate(data + cut, size - cut, max_size - cut);
  }
  return LLVMFuzzerMutate(data, size, max_size);
}
