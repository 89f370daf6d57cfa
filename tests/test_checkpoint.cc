// Model directories: hostile configs and indexes, every place a quantization block may be in, and
// a writer that either delivers a whole directory or leaves nothing.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "checkpoint_builder.h"

namespace nibble::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Names = std::vector<std::string>;

const LayerSpec kLayer = {.name = "model.layers.0.mlp.up_proj", .k = 64, .n = 16};

void expect_error(const Status& status, Code code, const std::string& fragment) {
  EXPECT_EQ(status.code(), code) << status.message();
  EXPECT_NE(status.message().find(fragment), std::string::npos)
      << status.message() << "\nexpected: " << fragment;
}

void expect_open_error(const std::string& directory, Code code, const std::string& fragment) {
  const auto checkpoint = Checkpoint::open(directory);
  ASSERT_FALSE(checkpoint.ok()) << "expected: " << fragment;
  expect_error(checkpoint.status(), code, fragment);
}

TEST(ParseJson, NeverThrows) {
  EXPECT_TRUE(parse_json(R"({"a":[1,2.5,"x",null,true]})", "f").ok());
  for (const char* text : {"", "{", "nul", "[1,]", "\"\xff\"", "1e999999", "{\"a\":1}x", "[1] [2]",
                           "\xef\xbb\xbf", "\"\\ud800\""}) {
    const auto parsed = parse_json(text, "config.json");
    ASSERT_FALSE(parsed.ok()) << text;
    expect_error(parsed.status(), Code::corrupt_file, "config.json: invalid JSON");
  }
  expect_error(parse_json(std::string_view("{}\0{", 4), "f").status(), Code::corrupt_file,
               "zero byte at offset 2");
}

TEST(ParseJson, NestingIsLimited) {
  const auto nested = [](int levels) {
    return std::string(static_cast<size_t>(levels), '[') +
           std::string(static_cast<size_t>(levels), ']');
  };
  EXPECT_TRUE(parse_json(nested(128), "f").ok());
  expect_error(parse_json(nested(129), "f").status(), Code::corrupt_file, "at byte 128");
  EXPECT_FALSE(parse_json(std::string(10'000'000, '['), "f").ok());
  EXPECT_FALSE(parse_json(std::string(10'000'000, '{'), "f").ok());
  // Brackets inside strings do not nest.
  EXPECT_TRUE(parse_json("\"\\\"" + std::string(1000, '[') + "\"", "f").ok());
}

Result<QuantConfig> parse_block(const json& document, const char* source = "config.json") {
  return parse_quant_config(document, source);
}

TEST(QuantConfig, EveryGenerationIsRead) {
  const json modern = {{"quant_method", "AWQ"}, {"bits", 4},
                       {"group_size", 128},     {"version", "GEMM"},
                       {"zero_point", true},    {"modules_to_not_convert", {"visual"}}};
  for (const json& document : {json{{"quantization_config", modern}},
                               json{{"text_config", {{"quantization_config", modern}}}},
                               json{{"llm_config", {{"quantization_config", modern}}}},
                               json{{"text_config", 3}, {"compression_config", modern}}}) {
    const auto config = parse_block(document);
    ASSERT_TRUE(config.ok()) << config.status().message();
    EXPECT_TRUE(config->present);
    EXPECT_EQ(config->method, "awq");
    EXPECT_EQ(config->version, "gemm");
    EXPECT_EQ(config->bits, 4);
    EXPECT_EQ(config->group_size, 128);
    EXPECT_TRUE(config->zero_point_given && config->zero_point);
    EXPECT_EQ(config->modules_to_not_convert, Names{"visual"});
    EXPECT_EQ(config->source, "config.json");
  }
  const auto old =
      parse_block({{"zero_point", true}, {"q_group_size", 64}, {"w_bit", 4}, {"version", "GEMM"}},
                  "quant_config.json");
  ASSERT_TRUE(old.ok());
  EXPECT_EQ(old->group_size, 64);
  EXPECT_EQ(old->bits, 4);
  EXPECT_EQ(old->source, "quant_config.json");

  const auto model = parse_block({{"bits", 4},
                                  {"group_size", -1},
                                  {"checkpoint_format", "gemm"},
                                  {"method", "awq"},
                                  {"sym", true}},
                                 "quantize_config.json");
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(model->group_size, -1);
  EXPECT_EQ(model->version, "gemm");
  EXPECT_EQ(model->method, "awq");
  EXPECT_TRUE(model->zero_point_given && !model->zero_point);
}

TEST(QuantConfig, CompressedTensorsGroups) {
  const auto with_groups = [](const json& groups) {
    return parse_block({{"quantization_config",
                         {{"quant_method", "compressed-tensors"},
                          {"format", "pack-quantized"},
                          {"ignore", {"lm_head"}},
                          {"config_groups", groups}}}});
  };
  const json four = {
      {"weights",
       {{"num_bits", 4}, {"group_size", 32}, {"symmetric", true}, {"strategy", "group"}}}};
  auto config = with_groups({{"group_0", four}});
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->bits, 4);
  EXPECT_EQ(config->group_size, 32);
  EXPECT_TRUE(config->zero_point_given && !config->zero_point);
  EXPECT_EQ(config->version, "pack-quantized");
  EXPECT_EQ(config->modules_to_not_convert, Names{"lm_head"});

  const json channel = {
      {"weights",
       {{"num_bits", 4}, {"group_size", nullptr}, {"symmetric", false}, {"strategy", "channel"}}}};
  EXPECT_EQ(with_groups({{"group_0", channel}})->group_size, -1);
  // Groups that disagree are no hint.
  config = with_groups({{"group_0", four}, {"group_1", channel}});
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->bits, 4);
  EXPECT_EQ(config->group_size, 0);
  EXPECT_FALSE(config->zero_point_given);

  EXPECT_TRUE(with_groups(json::object()).ok());
  EXPECT_FALSE(with_groups({1, 2}).ok());
  expect_error(with_groups({{"g", {{"weights", {{"num_bits", "4"}}}}}}).status(),
               Code::corrupt_file, "\"num_bits\"");
}

TEST(QuantConfig, AbsentOrNullIsNotPresent) {
  for (const json& document :
       {json::object(), json{{"quantization_config", nullptr}}, json(nullptr), json::array(),
        json{{"text_config", json::object()}}}) {
    const auto config = parse_block(document);
    ASSERT_TRUE(config.ok());
    EXPECT_FALSE(config->present);
  }
}

TEST(QuantConfig, WrongTypesNameTheKey) {
  const std::vector<std::pair<const char*, json>> cases = {{"quant_method", 4},
                                                           {"version", json::array()},
                                                           {"bits", "4"},
                                                           {"bits", 4.0},
                                                           {"bits", 0},
                                                           {"bits", -4},
                                                           {"bits", 1ull << 40},
                                                           {"group_size", 0},
                                                           {"group_size", -2},
                                                           {"group_size", true},
                                                           {"group_size", ~0ull},
                                                           {"zero_point", 1},
                                                           {"sym", "false"},
                                                           {"w_bit", "4"},
                                                           {"q_group_size", 1.5},
                                                           {"modules_to_not_convert", "lm_head"},
                                                           {"modules_to_not_convert", {1}},
                                                           {"config_groups", "x"}};
  for (const auto& [key, value] : cases) {
    const auto config = parse_block({{"quantization_config", {{key, value}}}});
    ASSERT_FALSE(config.ok()) << key << " = " << value;
    expect_error(config.status(), Code::corrupt_file, std::string("\"") + key + "\"");
    expect_error(config.status(), Code::corrupt_file, "config.json: quantization_config");
  }
  expect_error(parse_block({{"quantization_config", "awq"}}).status(), Code::corrupt_file,
               "expected an object");
}

TEST(Checkpoint, OpensASingleFile) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.path(), {kLayer}, {.dense_tensors = true}).ok());
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_EQ(checkpoint->architecture(), "LlamaForCausalLM");
  EXPECT_EQ(checkpoint->shards(), Names{"model.safetensors"});
  EXPECT_EQ(checkpoint->directory(), dir.path());
  EXPECT_EQ(checkpoint->config().at("hidden_size"), 64);
  EXPECT_EQ(checkpoint->quant_config().group_size, 64);
  EXPECT_NE(checkpoint->find("lm_head.weight"), nullptr);
  EXPECT_EQ(checkpoint->find("lm_head"), nullptr);
  uint64_t bytes = 0;
  for (const auto& [name, view] : checkpoint->tensors()) bytes += view.bytes;
  EXPECT_EQ(checkpoint->bytes(), bytes);
}

TEST(Checkpoint, OpensShardsThroughTheIndex) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.path(), {kLayer}, {.dense_tensors = true, .shards = 3}).ok());
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_EQ(checkpoint->shards().size(), 3u);
  EXPECT_EQ(checkpoint->tensors().size(), 6u);
}

TEST(Checkpoint, ConfigMayBeAbsent) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.path(), {kLayer}).ok());
  fs::remove(dir.file("config.json"));
  {
    const auto checkpoint = Checkpoint::open(dir.path());
    ASSERT_TRUE(checkpoint.ok());
    EXPECT_TRUE(checkpoint->config().is_null());
    EXPECT_FALSE(checkpoint->quant_config().present);
    EXPECT_EQ(checkpoint->architecture(), "unknown");
  }
  write_text(dir.file("quantize_config.json"), R"({"bits":4,"group_size":32})");
  EXPECT_EQ(Checkpoint::open(dir.path())->quant_config().source, "quantize_config.json");
  write_text(dir.file("quant_config.json"), R"({"w_bit":4,"q_group_size":64})");
  EXPECT_EQ(Checkpoint::open(dir.path())->quant_config().source, "quant_config.json");
  write_text(dir.file("config.json"), R"({"quantization_config":{"bits":4}, "model_type":"x"})");
  EXPECT_EQ(Checkpoint::open(dir.path())->quant_config().source, "config.json");
  EXPECT_EQ(Checkpoint::open(dir.path())->architecture(), "x");
}

TEST(Checkpoint, SaysWhatIsMissing) {
  TempDir dir;
  expect_open_error(dir.file("none"), Code::io_error, "not a directory");
  expect_open_error(dir.path(), Code::io_error, "has neither");
  write_text(dir.file("awq_model_w4_g128.pt"), "x");
  expect_open_error(dir.path(), Code::unsupported, "only safetensors files are read");
  write_text(dir.file("other.safetensors"), "x");
  expect_open_error(dir.path(), Code::io_error, "found \"other.safetensors\"");
  write_text(dir.file("model.safetensors"), "");
  expect_open_error(dir.path(), Code::corrupt_file, "model.safetensors: 0 bytes");
}

TEST(Checkpoint, RefusesBrokenConfigs) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.path(), {kLayer}).ok());
  write_text(dir.file("config.json"), "{");
  expect_open_error(dir.path(), Code::corrupt_file, "config.json: invalid JSON");
  write_text(dir.file("config.json"), "[]");
  expect_open_error(dir.path(), Code::corrupt_file, "expected an object");
  write_text(dir.file("config.json"), R"({"architectures":[7],"model_type":[]})");
  EXPECT_EQ(Checkpoint::open(dir.path())->architecture(), "unknown");
}

TEST(Checkpoint, RefusesHostileIndexes) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.path(), {kLayer}).ok());
  const std::string index = dir.file("model.safetensors.index.json");
  const std::string name = kLayer.name + ".qweight";
  for (const json& shard :
       {json("../model.safetensors"), json("/etc/passwd"), json("sub/model.safetensors"),
        json("a\\b"), json(".."), json("."), json(""), json(7), json(nullptr),
        json(std::string("model.safetensors\0x", 19))}) {
    write_text(index, json{{"weight_map", {{name, shard}}}}.dump());
    expect_open_error(dir.path(), Code::corrupt_file, "shard of \"" + name + "\"");
  }
  for (const char* text : {"[]", "{}", R"({"weight_map":[]})", R"({"weight_map":null})"}) {
    write_text(index, text);
    expect_open_error(dir.path(), Code::corrupt_file, "weight_map is no object");
  }
  write_text(index, R"({"weight_map":{}})");
  expect_open_error(dir.path(), Code::corrupt_file, "weight_map is empty");
  write_text(index, json{{"weight_map", {{name, "missing.safetensors"}}}}.dump());
  expect_open_error(dir.path(), Code::io_error, "missing.safetensors: No such file");
}

TEST(Checkpoint, IndexAndShardsMustAgree) {
  TempDir dir;
  TensorStore store;
  store.add_dense("a", 2, 2, Dtype::f16, 1);
  store.add_dense("b", 2, 2, Dtype::f16, 2);
  const TensorView a = store.tensors().at("a"), b = store.tensors().at("b");
  const auto write = [&](const TensorMap& first, const TensorMap& second, const json& map) {
    ASSERT_TRUE(write_safetensors(dir.file("1.safetensors"), first, {}).ok());
    ASSERT_TRUE(write_safetensors(dir.file("2.safetensors"), second, {}).ok());
    write_text(dir.file("model.safetensors.index.json"), json{{"weight_map", map}}.dump());
  };
  const json map = {{"a", "1.safetensors"}, {"b", "2.safetensors"}};
  write({{"a", a}}, {{"b", b}}, map);
  EXPECT_TRUE(Checkpoint::open(dir.path()).ok());
  write({{"a", a}, {"b", b}}, {{"b", b}}, map);
  expect_open_error(dir.path(), Code::corrupt_file, "1.safetensors: holds tensor \"b\", which");
  write({{"a", a}}, {}, map);
  expect_open_error(dir.path(), Code::corrupt_file, "places tensor \"b\" in \"2.safetensors\"");
  write({{"a", a}, {"c", b}}, {{"b", b}}, map);
  expect_open_error(dir.path(), Code::corrupt_file,
                    "\"c\", which model.safetensors.index.json does not list");
  write({{"b", b}}, {{"a", a}}, map);
  expect_open_error(dir.path(), Code::corrupt_file, "places in");
}

TEST(Checkpoint, EveryTruncationOfTheWeightsFailsCleanly) {
  TempDir dir;
  const LayerSpec tiny = {.name = "l", .k = 32, .n = 8, .group_size = 32};
  ASSERT_TRUE(write_checkpoint(dir.path(), {tiny}).ok());
  const auto size = fs::file_size(dir.file("model.safetensors"));
  const std::string whole = read_text(dir.file("model.safetensors"));
  for (size_t length = 0; length < size; ++length) {
    write_text(dir.file("model.safetensors"), std::string_view(whole).substr(0, length));
    const auto checkpoint = Checkpoint::open(dir.path());
    ASSERT_FALSE(checkpoint.ok()) << length;
    ASSERT_EQ(checkpoint.status().code(), Code::corrupt_file);
  }
}

void expect_same_tensors(const TensorMap& read, const TensorMap& written) {
  ASSERT_EQ(read.size(), written.size());
  for (const auto& [name, view] : written) {
    const auto found = read.find(name);
    ASSERT_NE(found, read.end()) << name;
    EXPECT_EQ(found->second.dtype, view.dtype);
    EXPECT_EQ(found->second.shape, view.shape);
    ASSERT_EQ(found->second.bytes, view.bytes);
    EXPECT_EQ(std::memcmp(found->second.data, view.data, view.bytes), 0) << name;
  }
}

TensorStore some_tensors() {
  TensorStore store;
  add_layer(store, kLayer);
  store.add_dense("model.embed_tokens.weight", 8, 64, Dtype::bf16, 3);
  store.add("odd", TensorDtype::u8, {3}, std::vector<uint8_t>{1, 2, 3});
  return store;
}

Status write_all(CheckpointWriter& writer, const TensorStore& store) {
  for (const auto& [name, view] : store.tensors()) NIBBLE_TRY(writer.add(name, view));
  NIBBLE_TRY(writer.write_config({{"architectures", {"X"}}}));
  return writer.commit();
}

TEST(CheckpointWriter, RoundTripsAndCopiesSideFiles) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.file("in"), {kLayer}).ok());
  for (const char* name : {"merges.txt", "pytorch_model.bin", "x.pt", "quant_config.json",
                           "quantize_config.json", "a.index.json", "old.safetensors"}) {
    write_text(dir.file("in/" + std::string(name)), name);
  }
  write_text(dir.file("in/empty"), "");
  fs::create_directory(dir.file("in/folder"));
  fs::create_symlink("merges.txt", dir.file("in/link.txt"));
  const Names before = list_directory(dir.file("in"));

  const TensorStore store = some_tensors();
  {
    auto writer = CheckpointWriter::create(dir.file("out/"));
    ASSERT_TRUE(writer.ok()) << writer.status().message();
    ASSERT_TRUE(writer->copy_side_files(dir.file("in")).ok());
    EXPECT_FALSE(fs::exists(dir.file("out")));
    ASSERT_TRUE(write_all(*writer, store).ok());
    expect_error(writer->commit(), Code::invalid_argument, "already committed");
    expect_error(writer->add("x", store.tensors().at("odd")), Code::invalid_argument, "committed");
  }
  EXPECT_EQ(list_directory(dir.path()), (Names{"in", "out"}));
  EXPECT_EQ(list_directory(dir.file("out")),
            (Names{"config.json", "empty", "link.txt", "merges.txt", "model.safetensors",
                   "tokenizer.json"}));
  EXPECT_EQ(read_text(dir.file("out/link.txt")), "merges.txt");
  EXPECT_EQ(list_directory(dir.file("in")), before);
  const auto checkpoint = Checkpoint::open(dir.file("out"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_EQ(checkpoint->architecture(), "X");
  expect_same_tensors(checkpoint->tensors(), store.tensors());
}

TEST(CheckpointWriter, SplitsIntoShardsOfTheGivenSize) {
  TempDir dir;
  const TensorStore store = some_tensors();
  uint64_t total = 0;
  for (const auto& [name, view] : store.tensors()) total += view.bytes;
  for (const uint64_t shard_bytes : {uint64_t{1}, uint64_t{600}, uint64_t{1040}, total}) {
    const std::string out = dir.file("out" + std::to_string(shard_bytes));
    auto writer = CheckpointWriter::create(out, shard_bytes);
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(write_all(*writer, store).ok());
    const auto checkpoint = Checkpoint::open(out);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
    expect_same_tensors(checkpoint->tensors(), store.tensors());
    const size_t shards = checkpoint->shards().size();
    EXPECT_EQ(shards == store.tensors().size(), shard_bytes == 1);
    EXPECT_EQ(shards == 1, shard_bytes == total);
    if (shards == 1) continue;
    EXPECT_EQ(checkpoint->shards()[0],
              "model-00001-of-0000" + std::to_string(shards) + ".safetensors");
    const auto index = parse_json(read_text(out + "/model.safetensors.index.json"), "index");
    EXPECT_EQ(index->at("metadata").at("total_size"), total);
  }
}

TEST(CheckpointWriter, AnUncommittedWriterLeavesNothing) {
  TempDir dir;
  const TensorStore store = some_tensors();
  {
    auto writer = CheckpointWriter::create(dir.file("out"), 100);
    ASSERT_TRUE(writer.ok());
    const std::string partial = ".out.partial-" + std::to_string(::getpid());
    EXPECT_EQ(list_directory(dir.path()), Names{partial});
    for (const auto& [name, view] : store.tensors()) ASSERT_TRUE(writer->add(name, view).ok());
    CheckpointWriter moved = std::move(*writer);
    EXPECT_EQ(list_directory(dir.path()), Names{partial});
  }
  EXPECT_TRUE(list_directory(dir.path()).empty());
}

TEST(CheckpointWriter, RefusesBadTargets) {
  TempDir dir;
  fs::create_directory(dir.file("full"));
  write_text(dir.file("full/x"), "keep");
  write_text(dir.file("file"), "keep");
  const auto refused = [](const std::string& path) {
    return CheckpointWriter::create(path).status();
  };
  expect_error(refused(dir.file("full")), Code::invalid_argument, "is not empty");
  expect_error(refused(dir.file("file")), Code::invalid_argument, "not a directory");
  expect_error(refused(""), Code::invalid_argument, "cannot name");
  expect_error(refused("/"), Code::invalid_argument, "cannot name");
  expect_error(refused(dir.file("no/out")), Code::io_error, "No such file");
  expect_error(refused("/proc/nibble-test"), Code::io_error, "/proc/.nibble-test.partial-");
  EXPECT_EQ(list_directory(dir.path()), (Names{"file", "full"}));
}

TEST(CheckpointWriter, CommitReplacesAnEmptyDirectoryButNothingElse) {
  TempDir dir;
  const TensorStore store = some_tensors();
  fs::create_directory(dir.file("empty"));
  {
    auto writer = CheckpointWriter::create(dir.file("empty"));
    ASSERT_TRUE(writer.ok());
    EXPECT_TRUE(write_all(*writer, store).ok());
  }
  EXPECT_TRUE(Checkpoint::open(dir.file("empty")).ok());
  {
    auto writer = CheckpointWriter::create(dir.file("late"));
    ASSERT_TRUE(writer.ok());
    fs::create_directory(dir.file("late"));
    write_text(dir.file("late/x"), "keep");
    expect_error(write_all(*writer, store), Code::io_error, "not empty");
  }
  EXPECT_EQ(list_directory(dir.path()), (Names{"empty", "late"}));
  EXPECT_EQ(list_directory(dir.file("late")), Names{"x"});
}

TEST(CheckpointWriter, RefusesWhatCannotBeWritten) {
  TempDir dir;
  const TensorStore store = some_tensors();
  auto writer = CheckpointWriter::create(dir.file("out"));
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer->add("odd", store.tensors().at("odd")).ok());
  expect_error(writer->add("odd", store.tensors().at("odd")), Code::invalid_argument, "before");
  expect_error(writer->write_config({{"a", "\xff"}}), Code::invalid_argument, "UTF-8");
  EXPECT_TRUE(writer->commit().ok());

  auto empty = CheckpointWriter::create(dir.file("out2"));
  ASSERT_TRUE(empty.ok());
  expect_error(empty->commit(), Code::invalid_argument, "no tensor");
}

TEST(CheckpointWriter, AFullDiskLeavesNothingAndTheSourceUntouched) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.file("in"), {kLayer}).ok());
  write_text(dir.file("in/large.txt"), std::string(100'000, 'x'));
  const std::string weights = read_text(dir.file("in/model.safetensors"));
  TensorStore store;
  store.add_dense("a", 16, 256, Dtype::f32, 1);
  store.add_dense("b", 16, 256, Dtype::f32, 2);

  rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  int failures = 0;
  // Each limit fails another step: the config, a spill, the shard with its header, a side file.
  for (const rlim_t limit : {rlim_t{10}, rlim_t{16'000}, rlim_t{16'400}, rlim_t{40'000}}) {
    rlimit small = before;
    small.rlim_cur = limit;
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
    {
      auto writer = CheckpointWriter::create(dir.file("out"), 20'000);
      ASSERT_TRUE(writer.ok());
      Status status = writer->write_config({{"key", "a value longer than ten bytes"}});
      for (const auto& [name, view] : store.tensors()) {
        if (status.ok()) status = writer->add(name, view);
      }
      if (status.ok()) status = writer->copy_side_files(dir.file("in"));
      EXPECT_EQ(status.code(), Code::io_error) << limit;
      EXPECT_NE(status.message().find(dir.path()), std::string::npos) << status.message();
      EXPECT_NE(status.message().find("too large"), std::string::npos) << status.message();
      // A failure sticks: nothing half-written can be committed.
      EXPECT_EQ(writer->commit().message(), status.message());
      failures += !status.ok();
    }
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
    EXPECT_EQ(list_directory(dir.path()), Names{"in"});
    EXPECT_EQ(read_text(dir.file("in/model.safetensors")), weights);
  }
  ::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(failures, 4);
}

}  // namespace
}  // namespace nibble::test
