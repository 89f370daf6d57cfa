// The tokenizer against golden files that scripts/check_tokenizer.py made with the `tokenizers`
// package, one small tokenizer for each family; what must be refused; what holds for any text.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <thread>

#include "model/tokenizer.h"
#include "model/tokenizer_regex.h"
#include "model/tokenizer_unicode.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Ids = std::vector<int32_t>;

const fs::path kGolden = fs::path(__FILE__).parent_path() / "golden" / "tokenizer";

std::string read_text(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string golden_json(const std::string& family) {
  return read_text(kGolden / family / "tokenizer.json");
}

Tokenizer load_golden(const std::string& family) {
  auto tokenizer = Tokenizer::load((kGolden / family).string());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  return *tokenizer;
}

std::vector<std::string> families() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(kGolden)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

std::string streamed(const Tokenizer& tokenizer, const Ids& ids, bool skip) {
  StreamDecoder stream(tokenizer, skip);
  std::string text;
  for (const int32_t id : ids) {
    const std::string part = stream.push(id);
    EXPECT_TRUE(unicode::is_valid(part));
    text += part;
  }
  return text + stream.finish();
}

/// A tokenizer over a few letters, with parts of the document replaced.
json small_document() {
  return json::parse(R"({
    "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
    "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "dropout": null, "unk_token": "?", "fuse_unk": false,
      "byte_fallback": false, "ignore_merges": false, "continuing_subword_prefix": "",
      "end_of_word_suffix": null,
      "vocab": {"?": 0, "a": 1, "b": 2, "ab": 3, "abab": 4, " ": 5},
      "merges": [["a", "b"], ["ab", "ab"]]}})");
}

Result<Tokenizer> parse(const json& document) {
  const std::string text = document.dump();
  return Tokenizer::parse({.tokenizer = text});
}

json added_token(const std::string& content, int id, const json& flags = json::object()) {
  json token = {{"content", content}, {"id", id},        {"single_word", false},
                {"lstrip", false},    {"rstrip", false}, {"normalized", false},
                {"special", false}};
  token.update(flags);
  return token;
}

void expect_refused(const Result<Tokenizer>& tokenizer, Code code, const std::string& fragment) {
  ASSERT_FALSE(tokenizer.ok()) << "expected: " << fragment;
  EXPECT_EQ(tokenizer.status().code(), code) << tokenizer.status().message();
  EXPECT_NE(tokenizer.status().message().find(fragment), std::string::npos)
      << tokenizer.status().message() << "\nexpected: " << fragment;
}

// ---- against the tokenizers package -------------------------------------------------------------

class TokenizerGolden : public testing::TestWithParam<std::string> {};

TEST_P(TokenizerGolden, IdsAndTextAreThoseOfTheTokenizersPackage) {
  const Tokenizer tokenizer = load_golden(GetParam());
  const json cases = json::parse(read_text(kGolden / GetParam() / "cases.json"));
  ASSERT_GT(cases.size(), 20U);
  for (const json& one : cases) {
    const std::string text = from_hex(one["bytes"].get<std::string>());
    const auto ids = one["ids"].get<Ids>();
    EXPECT_EQ(tokenizer.encode(text, false), ids) << text;
    EXPECT_EQ(tokenizer.encode(text, true), one.value("with_special", ids)) << text;
    const auto decoded = one["decoded"].get<std::string>();
    const std::string skipped = one.value("skipped", decoded);
    EXPECT_EQ(tokenizer.decode(ids, false), decoded);
    EXPECT_EQ(tokenizer.decode(ids, true), skipped);
    if (decoded.find("\uFFFD") == std::string::npos) {
      EXPECT_EQ(streamed(tokenizer, ids, false), decoded);
      EXPECT_EQ(streamed(tokenizer, ids, true), skipped);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Families, TokenizerGolden, testing::ValuesIn(families()),
                         [](const auto& name) { return name.param; });

// ---- the vocabulary and the files around it -----------------------------------------------------

TEST(Tokenizer, FindsTokensByTextAndById) {
  const Tokenizer tokenizer = load_golden("llama2");
  EXPECT_EQ(tokenizer.token_id("<s>"), 1);
  EXPECT_EQ(tokenizer.token_text(2), "</s>");
  EXPECT_EQ(tokenizer.token_text(3), "<0x00>");
  EXPECT_EQ(tokenizer.token_id("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer.token_text(-1), std::nullopt);
  EXPECT_EQ(tokenizer.token_text(1 << 30), std::nullopt);
  EXPECT_EQ(tokenizer.vocab_size(), 762U);
  EXPECT_EQ(tokenizer.id_limit(), 762U);
  EXPECT_TRUE(tokenizer.is_special(1));
  EXPECT_FALSE(tokenizer.is_special(3));
  EXPECT_FALSE(tokenizer.is_special(-5));
  EXPECT_EQ(tokenizer.decode(Ids{-1, 1 << 30}, false), "");
}

TEST(Tokenizer, BeginningAndEndComeFromTheConfigs) {
  const std::string text = golden_json("gpt2");
  const auto end = load_golden("gpt2").token_id("<|im_end|>");
  const auto start = load_golden("gpt2").token_id("<|im_start|>");
  TokenizerFiles files{.tokenizer = text};
  auto tokenizer = Tokenizer::parse(files);
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_EQ(tokenizer->bos_id(), std::nullopt);
  EXPECT_TRUE(tokenizer->eos_ids().empty());

  files.tokenizer_config = R"({"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>",
                               "add_bos_token": true})";
  files.generation_config = R"({"eos_token_id": [7, 9, 7, -1]})";
  files.config = R"({"eos_token_id": 11})";
  tokenizer = Tokenizer::parse(files);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_EQ(tokenizer->bos_id(), start);
  EXPECT_EQ(tokenizer->eos_ids(), (Ids{7, 9, *end}));
  EXPECT_TRUE(tokenizer->is_eos(9));
  EXPECT_FALSE(tokenizer->is_eos(11));
  // The post-processor says nothing of special tokens, so add_bos_token counts.
  EXPECT_EQ(tokenizer->encode("", true), Ids{*start});
  EXPECT_EQ(tokenizer->encode("", false), Ids{});

  files.generation_config = "";
  files.tokenizer_config = R"({"eos_token": null, "bos_token": "no such token"})";
  files.special_tokens_map = R"({"eos_token": "<|im_end|>"})";
  tokenizer = Tokenizer::parse(files);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_EQ(tokenizer->bos_id(), std::nullopt);
  EXPECT_EQ(tokenizer->eos_ids(), (Ids{11, *end}));

  files.config = R"({"eos_token_id": "two"})";
  expect_refused(Tokenizer::parse(files), Code::corrupt_file, "eos_token_id");
  files.config = "[]";
  expect_refused(Tokenizer::parse(files), Code::corrupt_file, "config.json");
}

TEST(Tokenizer, DirectoriesWithoutTokenizerJson) {
  const fs::path directory = fs::path(testing::TempDir()) / "nibble_no_tokenizer";
  fs::create_directories(directory);
  expect_refused(Tokenizer::load(directory.string()), Code::io_error, "no tokenizer.json");
  std::ofstream(directory / "tokenizer.model") << "x";
  expect_refused(Tokenizer::load(directory.string()), Code::unsupported, "tokenizer.model");
  fs::remove_all(directory);
}

// ---- encoding -----------------------------------------------------------------------------------

TEST(Tokenizer, UnknownCharacters) {
  json document = small_document();
  EXPECT_EQ(parse(document)->encode("xabyz", false), (Ids{0, 3, 0, 0}));
  document["model"]["fuse_unk"] = true;
  EXPECT_EQ(parse(document)->encode("xabyz", false), (Ids{0, 3, 0}));
  document["model"]["unk_token"] = nullptr;
  EXPECT_EQ(parse(document)->encode("xabyz", false), Ids{3});
  // Without a decoder tokens are joined by spaces.
  EXPECT_EQ(parse(document)->decode(Ids{3, 1}, false), "ab a");
  document["model"]["unk_token"] = "missing";
  expect_refused(parse(document), Code::corrupt_file, "unk_token");
}

TEST(Tokenizer, MergesInBothFormsAndIgnored) {
  json document = small_document();
  EXPECT_EQ(parse(document)->encode("abababba", false), (Ids{4, 3, 2, 1}));
  document["model"]["merges"] = {"#version: 0.2", "a b", "ab ab"};
  EXPECT_EQ(parse(document)->encode("abababba", false), (Ids{4, 3, 2, 1}));
  document["model"]["merges"] = {"a b"};
  EXPECT_EQ(parse(document)->encode("abab", false), (Ids{3, 3}));
  document["model"]["ignore_merges"] = true;
  EXPECT_EQ(parse(document)->encode("abab", false), Ids{4});
  document["model"]["merges"] = json::array();
  EXPECT_EQ(parse(document)->encode("ab", false), Ids{3});
  EXPECT_EQ(parse(document)->encode("aab", false), (Ids{1, 1, 2}));
}

TEST(Tokenizer, AddedTokens) {
  json document = small_document();
  document["added_tokens"] = {
      added_token("<x>", 6, {{"special", true}}),      added_token("<x>y", 7),
      added_token("word", 8, {{"single_word", true}}), added_token("<l>", 9, {{"lstrip", true}}),
      added_token("<r>", 10, {{"rstrip", true}}),      added_token("a", 1)};
  document["model"]["unk_token"] = nullptr;
  const auto tokenizer = parse(document);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  EXPECT_EQ(tokenizer->encode("<x>y<x>z", false), (Ids{7, 6}));  // the longest counts
  EXPECT_EQ(tokenizer->encode_untrusted("<x>y<x>z", false), Ids{7});
  EXPECT_EQ(tokenizer->encode("word words éword word", false), (Ids{8, 5, 5, 5, 8}));
  EXPECT_EQ(tokenizer->encode("b \u2003<l> b <r> \nb", false), (Ids{2, 9, 5, 2, 5, 10, 2}));
  EXPECT_EQ(tokenizer->encode("ab", false), (Ids{1, 2}));  // found before merging
  EXPECT_EQ(tokenizer->decode(Ids{6, 3, 7}, true), "ab <x>y");
  EXPECT_EQ(tokenizer->vocab_size(), 11U);
  document["added_tokens"] = {added_token("<x>", 8)};
  expect_refused(parse(document), Code::corrupt_file, "says id 8, but its place makes it 6");
}

TEST(Tokenizer, InvalidUtf8IsReplacedAsInPython) {
  const std::pair<const char*, const char*> cases[] = {
      {"\xff", "\uFFFD"},           {"a\xe4\xbd", "a\uFFFD"},
      {"\xe4\xbd!", "\uFFFD!"},     {"\xed\xa0\x80", "\uFFFD\uFFFD\uFFFD"},
      {"\xf0\x9f\x98", "\uFFFD"},   {"\xf4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
      {"\xc0\xaf", "\uFFFD\uFFFD"}, {"\xf0\x9f\x98\x80", "\U0001F600"},
  };
  const Tokenizer tokenizer = load_golden("gpt2");
  for (const auto& [bytes, text] : cases) {
    EXPECT_EQ(unicode::replace_invalid(bytes), text);
    EXPECT_EQ(tokenizer.encode(bytes, false), tokenizer.encode(text, false));
  }
}

// ---- refusals -----------------------------------------------------------------------------------

TEST(Tokenizer, UnsupportedComponentsAreNamed) {
  const std::tuple<const char*, const char*, const char*> cases[] = {
      {"normalizer", R"({"type": "Precompiled", "precompiled_charsmap": ""})", "Precompiled"},
      {"normalizer", R"({"type": "Sequence", "normalizers": [{"type": "Nmt"}]})", "Nmt"},
      {"pre_tokenizer", R"({"type": "UnicodeScripts"})", "UnicodeScripts"},
      {"pre_tokenizer", R"({"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}]})",
       "BertPreTokenizer"},
      {"decoder", R"({"type": "WordPiece", "prefix": "##", "cleanup": true})", "WordPiece"},
      {"decoder", R"({"type": "CTC"})", "CTC"},
      {"post_processor", R"({"type": "Other"})", "Other"},
      {"pre_tokenizer",
       R"({"type": "Split", "pattern": {"Regex": "(a)\\1"}, "behavior": "Isolated",
           "invert": false})",
       "escape"},
      {"pre_tokenizer",
       R"({"type": "Sequence", "pretokenizers": [
           {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
           {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"}]})",
       "prepend_scheme first"},
  };
  for (const auto& [part, value, name] : cases) {
    json document = small_document();
    document[part] = json::parse(value);
    expect_refused(parse(document), Code::unsupported, name);
  }
  json document = small_document();
  document["model"]["type"] = "Unigram";
  expect_refused(parse(document), Code::unsupported, "Unigram");
  document = small_document();
  document["model"]["end_of_word_suffix"] = "</w>";
  expect_refused(parse(document), Code::unsupported, "end_of_word_suffix");
  document["model"]["end_of_word_suffix"] = "";
  document["model"]["dropout"] = 0.1;
  expect_refused(parse(document), Code::unsupported, "dropout");
  document["model"]["dropout"] = 0.0;
  EXPECT_TRUE(parse(document).ok());
  document["version"] = "2.0";
  expect_refused(parse(document), Code::unsupported, "version");
}

TEST(Tokenizer, ContradictionsAreCorrupt) {
  const std::tuple<const char*, const char*, const char*> cases[] = {
      {"/model/vocab/b", "1", "given twice"},
      {"/model/vocab/b", "-1", "token id"},
      {"/model/vocab/b", "4294967295", "out of range"},
      {"/model/vocab/b", "99999999999999999999", "token id"},
      {"/model/vocab/b", "\"1\"", "token id"},
      {"/model/vocab/b", "1.5", "expected"},
      {"/model/vocab", "[]", "expected"},
      {"/model/merges", R"([["a", "c"]])", "not in the vocabulary"},
      {"/model/merges", R"([["b", "a"]])", "not in the vocabulary"},
      {"/model/merges", R"(["a b c"])", "with a space"},
      {"/model/merges", R"([["a"]])", "two strings"},
      {"/model/merges", R"([["a", "b", "a"]])", "two strings"},
      {"/model/merges", R"([["a", "b"], "ab ab"])", "expected"},
      {"/model/fuse_unk", "1", "fuse_unk"},
      {"/model", "[]", "expected"},
      {"/added_tokens", "{}", "expected a list"},
      {"/added_tokens", R"([{"id": 6}])", "content"},
      {"/added_tokens", R"([{"id": "6", "content": "x"}])", "token id"},
      {"/normalizer", R"({"type": "Replace", "pattern": {}, "content": ""})", "pattern"},
      {"/normalizer", R"({"normalizers": []})", "type"},
      {"/pre_tokenizer", R"({"type": "Metaspace", "replacement": ""})", "one character"},
      {"/decoder", R"({"type": "Strip", "content": " ", "start": -1, "stop": 0})", "start"},
      {"/post_processor", R"({"type": "TemplateProcessing", "single": [{"SpecialToken":
          {"id": "<s>", "type_id": 0}}], "special_tokens": {}})",
       "special_tokens"},
  };
  for (const auto& [pointer, value, fragment] : cases) {
    json document = small_document();
    std::string text;
    if (std::string_view(value) == "99999999999999999999") {
      text = document.dump();
      text.replace(text.find("\"b\":2"), 5, "\"b\":" + std::string(value));
    } else {
      document[json::json_pointer(pointer)] = json::parse(value);
      text = document.dump();
    }
    SCOPED_TRACE(text);
    expect_refused(Tokenizer::parse({.tokenizer = text}), Code::corrupt_file, fragment);
  }
}

TEST(Tokenizer, TornFilesAreCorrupt) {
  const std::string text = small_document().dump();
  for (size_t size = 0; size < text.size(); ++size) {
    const auto tokenizer = Tokenizer::parse({.tokenizer = std::string_view(text).substr(0, size)});
    ASSERT_FALSE(tokenizer.ok()) << size;
    EXPECT_EQ(tokenizer.status().code(), Code::corrupt_file) << tokenizer.status().message();
  }
  for (const std::string& bad : {text + "x", "\xef\xbb\xbf" + text, text + text,
                                 std::string("{\"model\":\"\xff\"}"), std::string(5000, '[')}) {
    EXPECT_FALSE(Tokenizer::parse({.tokenizer = bad}).ok());
  }
}

// ---- patterns -----------------------------------------------------------------------------------

std::string matches_of(const std::string& pattern, const std::string& text) {
  const auto regex = Regex::compile(pattern, "test");
  if (!regex.ok()) return "refused: " + regex.status().message();
  std::vector<Span> matches;
  regex->find_all(text, matches);
  std::string out;
  for (const Span& match : matches) {
    out += fmt::format("[{}]", text.substr(match.begin, match.end - match.begin));
  }
  return out;
}

TEST(TokenizerPattern, MeansWhatOnigurumaMeans) {
  EXPECT_EQ(matches_of(R"(\s)", "a\u180e\u2003b\u0085"), "[\u2003][\u0085]");
  EXPECT_EQ(matches_of(R"(\w+)", "e\u0301\u203fx ² -"), "[e\u0301\u203fx][²]");
  EXPECT_EQ(matches_of(R"(\h+)", "xyzAf09"), "[Af09]");
  EXPECT_EQ(matches_of(R"(\d+)", "1٣½"), "[1٣]");
  EXPECT_EQ(matches_of("a{,2}", "aaab"), "[aa][a][]");
  EXPECT_EQ(matches_of("a{2}+", "aaaaab"), "[aaaa]");
  EXPECT_EQ(matches_of("a{2}?b", "aab b"), "[aab][b]");
  EXPECT_EQ(matches_of("(?:ab){1,2}?", "abab"), "[ab][ab]");
  EXPECT_EQ(matches_of("a{x", "a{x"), "[a{x]");
  EXPECT_EQ(matches_of(".", "a\nb\r"), "[a][b][\r]");
  EXPECT_EQ(matches_of("(?m:.)", "a\nb"), "[a][\n][b]");
  EXPECT_EQ(matches_of("a$", "a\na"), "[a][a]");
  EXPECT_EQ(matches_of("(?i:'s|'T)", "'S 'ſ 't"), "['S]['ſ]['t]");
  EXPECT_EQ(matches_of("(?i)x|y", "XY"), "[X][Y]");
  EXPECT_EQ(matches_of(R"([a[bc]\-])", "a-bcd[]"), "[a][-][b][c]");
  EXPECT_EQ(matches_of("[]a]", "]a"), "[]][a]");
  EXPECT_EQ(matches_of(R"([^\S\r]+)", " \r\t"), "[ ][\t]");
  EXPECT_EQ(matches_of(R"(\p{^L}+)", "a1b"), "[1]");
  EXPECT_EQ(matches_of(R"(\p{Han})", "中、"), "[中]");  // a script, not its extensions
  EXPECT_EQ(matches_of(R"(\x{4e2d}\u6587\x41)", "中文A"), "[中文A]");
  EXPECT_EQ(matches_of(R"(\b)", "ab"), "[][]");
  EXPECT_EQ(matches_of("", "ab"), "[][][]");
  // U+31350 and U+1E030 are newer than PCRE2's tables.
  EXPECT_EQ(matches_of(R"(\p{L}+)", "a\U00031350\U0001E030!"), "[a\U00031350\U0001E030]");
  EXPECT_EQ(matches_of(R"(\p{Han}|\p{Cn})", "\U00031350\U0001E030"), "[\U00031350]");
}

TEST(TokenizerPattern, RefusesWhatItCannotSay) {
  for (const char* pattern : {"(",
                              ")",
                              "a)",
                              "[",
                              "[a",
                              "*",
                              "a|*",
                              R"(\)",
                              "[a&&b]",
                              "[a[^b]]",
                              "[[:alpha:]]",
                              R"(\p{Punct})",
                              R"(\p{L)",
                              R"(\pL)",
                              "(?<n>a)",
                              "(?P<n>a)",
                              "(?~a)",
                              "(*FAIL)",
                              "a(?i)b",
                              "(?s)a",
                              "(?x)a",
                              R"(\G)",
                              R"(\R)",
                              R"(\X)",
                              R"(\K)",
                              R"(\k<n>)",
                              R"(\Qa\E)",
                              R"(\1)",
                              "(?i:ss)",
                              "(?i:é)",
                              R"((?i:\p{Lu}))",
                              R"([\W])",
                              R"(\xff)",
                              R"(\x{110000})",
                              "a{3,2}",
                              "a{99999}",
                              "(?<=a+)b",
                              "\xff"}) {
    EXPECT_EQ(matches_of(pattern, "a").substr(0, 8), "refused:") << pattern;
  }
}

TEST(TokenizerPattern, CatastrophicPatternsEnd) {
  EXPECT_EQ(matches_of("(?:(?:a+)+)+b", std::string(40, 'a')), "");
  EXPECT_EQ(matches_of("(?:a|aa)+$", std::string(200'000, 'a') + "b"), "");
}

// ---- properties ---------------------------------------------------------------------------------

/// Valid UTF-8 of characters from all planes, white space and ASCII more often.
rc::Gen<std::string> any_text() {
  const auto character = rc::gen::oneOf(rc::gen::inRange<uint32_t>(1, 0x80),
                                        rc::gen::element<uint32_t>(' ', '\n', 'a', '<', '|', 's'),
                                        rc::gen::inRange<uint32_t>(0x80, 0xd800),
                                        rc::gen::inRange<uint32_t>(0xe000, 0x110000));
  return rc::gen::map(rc::gen::container<std::vector<uint32_t>>(character), [](const auto& points) {
    std::string text;
    for (const uint32_t point : points) unicode::append_utf8(text, point);
    return text;
  });
}

TEST(TokenizerProperty, ByteLevelRoundTripsAnyText) {
  for (const char* family : {"gpt2", "smollm", "llama3", "gpt4o", "deepseek3"}) {
    const Tokenizer tokenizer = load_golden(family);
    EXPECT_TRUE(rc::check(family, [&] {
      const std::string text = *any_text();
      const Ids ids = tokenizer.encode(text, false);
      RC_ASSERT(tokenizer.decode(ids, false) == text);
      RC_ASSERT(streamed(tokenizer, ids, false) == text);
    }));
  }
}

TEST(TokenizerProperty, AnyBytesEncodeAsTheirReplacedText) {
  for (const std::string& family : families()) {
    const Tokenizer tokenizer = load_golden(family);
    EXPECT_TRUE(rc::check(family, [&] {
      const auto bytes = *rc::gen::container<std::string>(rc::gen::arbitrary<char>());
      const Ids ids = tokenizer.encode(bytes, true);
      RC_ASSERT(ids == tokenizer.encode(unicode::replace_invalid(bytes), true));
      for (const int32_t id : ids) RC_ASSERT(tokenizer.token_text(id).has_value());
    }));
  }
}

TEST(TokenizerProperty, AnyIdsDecodeToUtf8) {
  for (const std::string& family : families()) {
    const Tokenizer tokenizer = load_golden(family);
    const auto limit = static_cast<int32_t>(tokenizer.id_limit());
    EXPECT_TRUE(rc::check(family, [&] {
      const auto ids = *rc::gen::container<Ids>(rc::gen::inRange(-2, limit + 2));
      const bool skip = *rc::gen::arbitrary<bool>();
      const std::string text = tokenizer.decode(ids, skip);
      RC_ASSERT(unicode::is_valid(text));
      if (text.find("\uFFFD") == std::string::npos) {
        RC_ASSERT(streamed(tokenizer, ids, skip) == text);
      }
    }));
  }
}

TEST(TokenizerThread, OneTokenizerManyThreads) {
  const Tokenizer tokenizer = load_golden("qwen2");
  const std::string text = golden_json("gpt2").substr(0, 4000);
  const Ids expected = tokenizer.encode(text, true);
  std::vector<std::thread> threads;
  std::vector<int> same(4, 0);
  for (size_t t = 0; t < same.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) same[t] += tokenizer.encode(text, true) == expected ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(same, std::vector<int>(4, 20));
}

}  // namespace
}  // namespace nibble
