// The safetensors parser against every malformed file we could think of, and the writer against a
// disk that refuses.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cstring>

#include "checkpoint_builder.h"
#include "format/safetensors.h"

namespace nibble::test {
namespace {

/// A file image with this header text and `payload_bytes` bytes of data.
std::string image(const std::string& header, size_t payload_bytes) {
  const uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file + header + std::string(payload_bytes, '\x5a');
}

Result<SafetensorsIndex> parse(const std::string& file) {
  return parse_safetensors({reinterpret_cast<const std::byte*>(file.data()), file.size()}, "f");
}

void expect_corrupt(const std::string& file, const std::string& fragment,
                    Code code = Code::corrupt_file) {
  const auto parsed = parse(file);
  ASSERT_FALSE(parsed.ok()) << "expected: " << fragment;
  EXPECT_EQ(parsed.status().code(), code);
  EXPECT_NE(parsed.status().message().find(fragment), std::string::npos)
      << parsed.status().message() << "\nexpected: " << fragment;
}

void expect_header_corrupt(const std::string& header, const std::string& fragment,
                           size_t payload_bytes = 4) {
  expect_corrupt(image(header, payload_bytes), fragment);
}

std::string header_of(const std::string& entries) { return fmt::format("{{{}}}", entries); }

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + "}";
}

TEST(SafetensorsParse, ReadsTensorsAndMetadata) {
  const std::string file =
      image(R"({"__metadata__":{"format":"pt"},)" + entry("b", "I32", "[2,1]", "[4,12]") + "," +
                entry("a", "F16", "[2]", "[0,4]") + "," + entry("none", "F32", "[0,7]", "[12,12]") +
                "," + entry("scalar", "U8", "[]", "[12,13]") + "}  ",
            13);
  const auto parsed = parse(file);
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  ASSERT_EQ(parsed->tensors.size(), 4u);
  const TensorView& b = parsed->tensors.find("b")->second;
  EXPECT_EQ(b.dtype, TensorDtype::i32);
  EXPECT_EQ(b.shape_text(), "[2, 1]");
  EXPECT_EQ(b.elements(), 2);
  EXPECT_EQ(b.bytes, 8u);
  EXPECT_EQ(b.data, reinterpret_cast<const std::byte*>(file.data()) + file.size() - 13 + 4);
  EXPECT_EQ(parsed->tensors.find("none")->second.elements(), 0);
  EXPECT_EQ(parsed->tensors.find("scalar")->second.elements(), 1);
  EXPECT_EQ(parsed->metadata.at("format"), "pt");
}

TEST(SafetensorsParse, EmptyHeaderIsAnEmptyFile) {
  const auto parsed = parse(image("{}", 0));
  ASSERT_TRUE(parsed.ok());
  EXPECT_TRUE(parsed->tensors.empty());
}

TEST(SafetensorsParse, RefusesImpossibleHeaderLengths) {
  expect_corrupt("", "0 bytes");
  expect_corrupt("1234567", "7 bytes");
  for (const uint64_t length :
       {uint64_t{3}, uint64_t{100'000'001}, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7}) {
    std::string file = image("{}", 0);
    std::memcpy(file.data(), &length, sizeof length);
    expect_corrupt(file, "header length " + std::to_string(length));
  }
  expect_corrupt(image("", 0), "begin with '{'");
  // Longer than the format allows although the file has the bytes.
  expect_corrupt(image(header_of(std::string(100'000'000, ' ')), 0), "exceeds 100000000");
}

TEST(SafetensorsParse, RefusesHeadersThatAreNoObject) {
  expect_header_corrupt(" {}", "begin with '{'");
  expect_header_corrupt("[]", "begin with '{'");
  expect_header_corrupt("{", "invalid JSON");
  expect_header_corrupt("{}}", "invalid JSON");
  expect_header_corrupt("{} x", "invalid JSON");
  expect_header_corrupt(std::string("{}\0garbage", 10), "zero byte");
  expect_header_corrupt("{\"\xff\":{}}", "invalid JSON");
  expect_header_corrupt(R"({"a":1})", "expected an object, found a number");
  expect_header_corrupt(R"({"a":[]})", "expected an object, found an array");
  expect_header_corrupt(R"({"a":null})", "found null");
  expect_header_corrupt(R"({"a":true})", "found a boolean");
}

TEST(SafetensorsParse, DeepNestingNeitherRecursesNorBuildsADocument) {
  expect_header_corrupt(R"({"a":)" + std::string(5'000'000, '['), "expected an object");
  expect_header_corrupt(R"({"a":{"shape":)" + std::string(5'000'000, '['), "found an array");
  std::string objects = "{\"a\":{\"dtype\":";
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  expect_header_corrupt(objects, "expected a string, found an object");
}

TEST(SafetensorsParse, RefusesWrongEntries) {
  const std::string good = entry("a", "F32", "[1]", "[0,4]");
  ASSERT_TRUE(parse(image(header_of(good), 4)).ok());
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"("a":{})", "has no dtype"},
      {R"("a":{"dtype":"F32","data_offsets":[0,4]})", "has no shape"},
      {R"("a":{"dtype":"F32","shape":[1]})", "has no data_offsets"},
      {R"("a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})", "occurs twice"},
      {R"("a":{"shape":[1],"shape":[1],"dtype":"F32","data_offsets":[0,4]})", "occurs twice"},
      {R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1})", "unknown key \"x\""},
      {R"("a":{"dtype":4,"shape":[1],"data_offsets":[0,4]})", "expected a string"},
      {R"("a":{"dtype":"F32","shape":1,"data_offsets":[0,4]})", "expected an array"},
      {R"("a":{"dtype":"F32","shape":"1","data_offsets":[0,4]})", "expected an array"},
      {entry("a", "F32", "[[1]]", "[0,4]"), "found an array"},
      {entry("a", "F32", "[-1]", "[0,4]"), "negative"},
      {entry("a", "F32", "[1.0]", "[0,4]"), "not an integer"},
      {entry("a", "F32", "[1e0]", "[0,4]"), "not an integer"},
      {entry("a", "F32", "[true]", "[0,4]"), "found a boolean"},
      {entry("a", "F32", "[null]", "[0,4]"), "found null"},
      {entry("a", "F32", "[\"1\"]", "[0,4]"), "found a string"},
      {entry("a", "F32", "[1]", "[0]"), "exactly two"},
      {entry("a", "F32", "[1]", "[]"), "exactly two"},
      {entry("a", "F32", "[1]", "[0,4,4]"), "more than 2"},
      {entry("a", "F32", "[1]", "[4,0]"), "leave the 4 bytes"},
      {entry("a", "F32", "[1]", "[-4,0]"), "negative"},
      {entry("a", "F32", "[1]", "[0,8]"), "leave the 4 bytes"},
      {entry("a", "F32", "[2]", "[0,8]"), "leave the 4 bytes"},
      {entry("a", "F32", "[2]", "[0,4]"), "F32 [2] needs 8 bytes"},
      {entry("a", "F16", "[1]", "[0,4]"), "F16 [1] needs 2 bytes"},
      {entry("a", "f32", "[1]", "[0,4]"), "not a safetensors type"},
      {entry("a", "", "[1]", "[0,4]"), "not a safetensors type"},
      {entry("a", "F32", "[9223372036854775807]", "[0,4]"), "overflows"},
      {entry("a", "F32", "[9223372036854775808]", "[0,4]"), "more than 2^63-1"},
      {entry("a", "F32", "[18446744073709551616]", "[0,4]"), "not an integer"},
      {entry("a", "F32", "[4294967296,4294967296]", "[0,4]"), "overflows"},
      {entry("a", "F32", "[0,4294967296,4294967296]", "[0,0]"), "overflows"},
      {entry("a", "F32", "[4294967296,4294967296,0]", "[0,0]"), "overflows"},
      {good + "," + good, "name occurs twice"},
      {R"("__metadata__":1,)" + good, "expected an object"},
      {R"("__metadata__":{"a":1},)" + good, "expected a string, found a number"},
      {R"("__metadata__":{"a":{}},)" + good, "expected a string, found an object"},
      {R"("__metadata__":{"a":"1","a":"2"},)" + good, "occurs twice"},
      {R"("__metadata__":{},"__metadata__":{},)" + good, "occurs twice"},
  };
  for (const auto& [entries, fragment] : cases) {
    SCOPED_TRACE(entries);
    expect_header_corrupt(header_of(entries), fragment);
  }
}

TEST(SafetensorsParse, RefusesAbsurdRank) {
  std::string shape = "[1";
  for (int i = 0; i < 16; ++i) shape += ",1";
  expect_header_corrupt(header_of(entry("a", "F32", shape + "]", "[0,4]")), "more than 16");
}

TEST(SafetensorsParse, TypesOfTheSpecificationThatAreNotReadAreUnsupported) {
  expect_corrupt(image(header_of(entry("a", "F8_E8M0", "[4]", "[0,4]")), 4), "\"F8_E8M0\"",
                 Code::unsupported);
}

TEST(SafetensorsParse, TensorsMustTileTheData) {
  const auto two = [](const std::string& first, const std::string& second) {
    return header_of(entry("a", "U8", "[4]", first) + "," + entry("b", "U8", "[4]", second));
  };
  ASSERT_TRUE(parse(image(two("[0,4]", "[4,8]"), 8)).ok());
  ASSERT_TRUE(parse(image(two("[4,8]", "[0,4]"), 8)).ok());
  expect_header_corrupt(two("[0,4]", "[0,4]"), "overlap", 8);
  expect_header_corrupt(two("[0,4]", "[3,7]"), "overlap", 8);
  expect_header_corrupt(two("[0,4]", "[5,9]"), "hole", 9);
  expect_header_corrupt(two("[1,5]", "[5,9]"), "expected 0 (hole)", 9);
  expect_header_corrupt(two("[0,4]", "[4,8]"), "9 bytes", 9);
  expect_header_corrupt("{}", "1 bytes", 1);
}

TEST(SafetensorsParse, HostileNamesStayOnOneReadableLine) {
  const auto parsed = parse(image(R"({")" + std::string(5000, 'n') + R"(\n\u0007":1})", 0));
  ASSERT_FALSE(parsed.ok());
  EXPECT_LT(parsed.status().message().size(), 300u);
  const auto control = parse(image(R"({"a\nb\u0007":1})", 0));
  EXPECT_NE(control.status().message().find(R"("a\x0ab\x07")"), std::string::npos)
      << control.status().message();
}

/// Random tables of tensors, one of each type at least.
TensorStore random_store() {
  TensorStore store;
  const int count = *rc::gen::inRange(1, 12);
  for (int i = 0; i < count; ++i) {
    const auto dtype = static_cast<TensorDtype>(*rc::gen::inRange(0, 15));
    const auto shape = *rc::gen::container<std::vector<int64_t>>(rc::gen::inRange<int64_t>(0, 5));
    const std::vector<int64_t> short_shape(shape.begin(),
                                           shape.begin() + std::min<long>(3, std::ssize(shape)));
    int64_t bytes = tensor_dtype_bytes(dtype);
    for (const int64_t size : short_shape) bytes *= size;
    const auto data = *rc::gen::container<std::vector<uint8_t>>(static_cast<size_t>(bytes),
                                                                rc::gen::arbitrary<uint8_t>());
    store.add(fmt::format("t{}\"\\\n\xc3\xa9", i), dtype, short_shape, data);
  }
  return store;
}

TEST(SafetensorsWrite, RoundTripsAnyTable) {
  TempDir dir;
  const std::string path = dir.file("x.safetensors");
  EXPECT_TRUE(rc::check([&] {
    const TensorStore store = random_store();
    RC_ASSERT(write_safetensors(path, store.tensors(), {{"k\n", "v\""}}).ok());
    const auto file = MappedFile::open(path);
    RC_ASSERT(file.ok());
    const auto parsed = parse_safetensors(file->bytes(), "x");
    RC_ASSERT(parsed.ok());
    RC_ASSERT(parsed->metadata.at("k\n") == "v\"");
    RC_ASSERT(parsed->tensors.size() == store.tensors().size());
    for (const auto& [name, view] : store.tensors()) {
      const TensorView& read = parsed->tensors.find(name)->second;
      RC_ASSERT(read.dtype == view.dtype && read.shape == view.shape);
      RC_ASSERT(read.bytes == view.bytes);
      // Not within RC_ASSERT, whose capture of the expression evaluates both sides of ||.
      const bool equal = view.bytes == 0 || std::memcmp(read.data, view.data, view.bytes) == 0;
      RC_ASSERT(equal);
      const auto address = reinterpret_cast<uintptr_t>(read.data);
      RC_ASSERT(address % static_cast<uintptr_t>(tensor_dtype_bytes(view.dtype)) == 0u);
    }
  }));
}

TEST(SafetensorsWrite, IsByteForByteReproducibleAndPadded) {
  TempDir dir;
  TensorStore store;
  store.add("small", TensorDtype::u8, {3}, std::vector<uint8_t>{1, 2, 3});
  store.add("wide", TensorDtype::i64, {1}, std::vector<int64_t>{4});
  ASSERT_TRUE(write_safetensors(dir.file("a"), store.tensors(), {}).ok());
  std::string header = R"({"wide":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                       R"("small":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  EXPECT_EQ(read_text(dir.file("a")), image(header, 0) + std::string("\4\0\0\0\0\0\0\0\1\2\3", 11));
}

TEST(SafetensorsWrite, RefusesTensorsThatContradictThemselves) {
  TempDir dir;
  TensorStore store;
  store.add("a", TensorDtype::f32, {2}, std::vector<float>{1, 2});
  const TensorView good = store.tensors().at("a");
  const auto refused = [&](const std::string& name, const TensorView& view) {
    const Status status = write_safetensors(dir.file("x"), {{name, view}}, {});
    return status.code() == Code::invalid_argument && list_directory(dir.path()).empty();
  };
  EXPECT_TRUE(refused("a", {good.dtype, {3}, good.data, good.bytes}));
  EXPECT_TRUE(refused("a", {good.dtype, {-2}, good.data, good.bytes}));
  EXPECT_TRUE(refused("a", {good.dtype, {INT64_MAX, 4}, good.data, good.bytes}));
  EXPECT_TRUE(refused("a", {good.dtype, {2}, good.data, 9}));
  EXPECT_TRUE(refused("__metadata__", good));
  EXPECT_TRUE(refused("", good));
  EXPECT_TRUE(refused("\xff", good));
}

TEST(SafetensorsWrite, EveryTruncationFailsCleanly) {
  TempDir dir;
  TensorStore store;
  add_layer(store, {.name = "l", .k = 32, .n = 8, .group_size = 32});
  ASSERT_TRUE(write_safetensors(dir.file("a"), store.tensors(), {{"format", "pt"}}).ok());
  const std::string whole = read_text(dir.file("a"));
  ASSERT_TRUE(parse(whole).ok());
  for (size_t length = 0; length < whole.size(); ++length) {
    const auto parsed = parse(whole.substr(0, length));
    ASSERT_FALSE(parsed.ok()) << length;
    ASSERT_EQ(parsed.status().code(), Code::corrupt_file);
  }
  EXPECT_FALSE(parse(whole + '\0').ok());
}

TEST(SafetensorsWrite, EverySingleByteChangeOfTheHeaderIsHandled) {
  TempDir dir;
  TensorStore store;
  add_layer(store, {.name = "l", .k = 32, .n = 8, .group_size = 32});
  ASSERT_TRUE(write_safetensors(dir.file("a"), store.tensors(), {}).ok());
  const std::string whole = read_text(dir.file("a"));
  uint64_t header = 0;
  std::memcpy(&header, whole.data(), sizeof header);
  int accepted = 0;
  for (size_t i = 0; i < 8 + header; ++i) {
    for (const int value : {0x00, 0x09, 0x30, 0x39, 0x22, 0x7b, 0x5d, 0x2c, 0x7f, 0xff}) {
      std::string changed = whole;
      changed[i] = static_cast<char>(value);
      const auto parsed = parse(changed);
      if (!parsed.ok()) continue;
      ++accepted;  // a name changed, say; then the table must still be sound
      for (const auto& [name, view] : parsed->tensors) {
        ASSERT_EQ(static_cast<int64_t>(view.bytes),
                  view.elements() * tensor_dtype_bytes(view.dtype));
      }
    }
  }
  EXPECT_GT(accepted, 0);
}

TEST(MappedFile, SaysWhyAFileCannotBeRead) {
  TempDir dir;
  const auto missing = MappedFile::open(dir.file("none"));
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), Code::io_error);
  EXPECT_NE(missing.status().message().find("none: No such file"), std::string::npos);
  EXPECT_NE(MappedFile::open(dir.path()).status().message().find("not a regular file"),
            std::string::npos);
  ASSERT_EQ(::mkfifo(dir.file("fifo").c_str(), 0600), 0);
  EXPECT_NE(MappedFile::open(dir.file("fifo")).status().message().find("not a regular file"),
            std::string::npos);
  write_text(dir.file("empty"), "");
  const auto empty = MappedFile::open(dir.file("empty"));
  ASSERT_TRUE(empty.ok());
  EXPECT_TRUE(empty->bytes().empty());
}

TEST(SafetensorsWrite, AFullDiskLeavesTheOldFileAndNothingElse) {
  TempDir dir;
  write_text(dir.file("x"), "old");
  TensorStore store;
  store.add_dense("w", 64, 1024, Dtype::f32, 1);
  // A limit on file size fails write() half way, like a full disk, without needing one.
  rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t limit : {rlim_t{0}, rlim_t{5}, rlim_t{4096}, rlim_t{200'000}}) {
    rlimit small = before;
    small.rlim_cur = limit;
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
    const Status status = write_safetensors(dir.file("x"), store.tensors(), {});
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
    EXPECT_EQ(status.code(), Code::io_error);
    EXPECT_NE(status.message().find(dir.file("x")), std::string::npos) << status.message();
    EXPECT_EQ(list_directory(dir.path()), std::vector<std::string>{"x"});
    EXPECT_EQ(read_text(dir.file("x")), "old");
  }
  ::signal(SIGXFSZ, old_handler);
  EXPECT_TRUE(write_safetensors(dir.file("x"), store.tensors(), {}).ok());
}

TEST(SafetensorsWrite, AMissingDirectoryIsAnIoError) {
  TempDir dir;
  const Status status = write_safetensors(dir.file("no/x"), {}, {});
  EXPECT_EQ(status.code(), Code::io_error);
  EXPECT_NE(status.message().find("No such file"), std::string::npos);
}

}  // namespace
}  // namespace nibble::test
