// Reading order: the table of types, the header reader (one JSON event at a time, so a hostile
// header can neither build a large document nor recurse), the checks over all tensors together,
// the memory map, the writer.
#include "format/safetensors.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "format/message.h"
#include "format/output_file.h"

namespace nibble {
namespace {

static_assert(std::endian::native == std::endian::little,
              "safetensors and the packed words are little-endian and are read in place");

// The header limit is the reference implementation's. It leaves the rank open; without a limit
// a header of "[1,1,1,...]" would cost eight bytes of memory for each two of the file, and shapes
// would not fit a message.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kMaxRank = 16;
constexpr const char* kMetadataKey = "__metadata__";

struct DtypeRow {
  TensorDtype dtype;
  const char* name;
  int64_t bytes;
};
constexpr std::array<DtypeRow, 15> kDtypes = {{
    {TensorDtype::boolean, "BOOL", 1},
    {TensorDtype::u8, "U8", 1},
    {TensorDtype::i8, "I8", 1},
    {TensorDtype::f8_e4m3, "F8_E4M3", 1},
    {TensorDtype::f8_e5m2, "F8_E5M2", 1},
    {TensorDtype::i16, "I16", 2},
    {TensorDtype::u16, "U16", 2},
    {TensorDtype::f16, "F16", 2},
    {TensorDtype::bf16, "BF16", 2},
    {TensorDtype::i32, "I32", 4},
    {TensorDtype::u32, "U32", 4},
    {TensorDtype::f32, "F32", 4},
    {TensorDtype::i64, "I64", 8},
    {TensorDtype::u64, "U64", 8},
    {TensorDtype::f64, "F64", 8},
}};
// Types of the specification that no checkpoint this project runs contains.
constexpr std::array kOtherDtypes = {"F4",          "F6_E2M3",     "F6_E3M2", "F8_E8M0",
                                     "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"};

const DtypeRow& dtype_row(TensorDtype dtype) { return kDtypes[static_cast<size_t>(dtype)]; }

/// Elements of `shape`, or nothing if the product overflows. A zero does not hide the overflow of
/// the other dimensions, so the answer is independent of their order.
std::optional<uint64_t> checked_elements(const std::vector<int64_t>& shape) {
  uint64_t product = 1;
  bool empty = false;
  for (const int64_t size : shape) {
    empty |= size == 0;
    const auto factor = static_cast<uint64_t>(std::max<int64_t>(size, 1));
    if (__builtin_mul_overflow(product, factor, &product)) return std::nullopt;
  }
  return empty ? 0 : product;
}

struct Range {
  uint64_t begin, end;
  std::string_view name;
};

/// Receives the JSON events of a header. Legal headers nest three levels deep, so the position is
/// one enum; anything else fails where it starts.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(std::span<const std::byte> payload) : payload_(payload) {}

  SafetensorsIndex index;
  std::vector<Range> ranges;
  Status status;

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t& text) override {
    return unexpected("the number " + text.substr(0, 40) + ", which is not an integer below 2^64");
  }
  bool binary(binary_t&) override { return unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (at_ != At::array) return unexpected("a number");
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return fail(fmt::format("{} holds {}, more than 2^63-1", key_, value));
    }
    auto& list = list_for_key();
    const size_t longest = key_ == "shape" ? kMaxRank : 2;
    if (list.size() == longest) {
      return fail(fmt::format("{} has more than {} numbers", key_, longest));
    }
    list.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(string_t& text) override {
    if (at_ == At::metadata) {
      if (index.metadata.emplace(key_, text).second) return true;
      return fail(fmt::format("key {} occurs twice", quote_name(key_)));
    }
    if (at_ != At::entry || key_ != "dtype") return unexpected("a string");
    dtype_ = text;
    return true;
  }

  bool start_object(size_t) override {
    if (at_ == At::start) {
      at_ = At::top;
    } else if (at_ == At::top && name_ == kMetadataKey) {
      at_ = At::metadata;
    } else if (at_ == At::top) {
      at_ = At::entry;
      dtype_.reset();
      shape_.reset();
      offsets_.reset();
    } else {
      return unexpected("an object");
    }
    return true;
  }

  bool key(string_t& key) override {
    if (at_ == At::top) {
      name_ = key;
      const bool metadata = name_ == kMetadataKey;
      const bool seen = metadata ? seen_metadata_ : index.tensors.contains(name_);
      seen_metadata_ |= metadata;
      return seen ? fail("name occurs twice") : true;
    }
    key_ = key;
    if (at_ == At::metadata) return true;
    const bool known = key_ == "dtype" || key_ == "shape" || key_ == "data_offsets";
    if (!known) return fail(fmt::format("unknown key {}", quote_name(key_)));
    const bool seen =
        key_ == "dtype" ? dtype_.has_value() : (key_ == "shape" ? shape_ : offsets_).has_value();
    return seen ? fail(fmt::format("key {} occurs twice", quote_name(key_))) : true;
  }

  bool end_object() override {
    if (at_ == At::entry) {
      at_ = At::top;
      return finish_entry();
    }
    at_ = at_ == At::metadata ? At::top : At::done;
    return true;
  }

  bool start_array(size_t) override {
    if (at_ != At::entry || key_ == "dtype") return unexpected("an array");
    (key_ == "shape" ? shape_ : offsets_).emplace();
    at_ = At::array;
    return true;
  }

  bool end_array() override {
    at_ = At::entry;
    return true;
  }

  bool parse_error(size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    name_.clear();
    const std::string_view reason = error.what();
    return fail(fmt::format("invalid JSON at byte {} of the header: {}", position,
                            quote_name(reason.substr(reason.find("] ") + 2))));
  }

 private:
  enum class At { start, top, entry, array, metadata, done };

  std::vector<int64_t>& list_for_key() { return key_ == "shape" ? *shape_ : *offsets_; }

  bool fail(const std::string& reason, Code code = Code::corrupt_file) {
    const std::string where = name_.empty() ? "header" : "tensor " + quote_name(name_);
    status = Status(code, where + ": " + reason);
    return false;
  }

  bool unexpected(const std::string& found) {
    switch (at_) {
      case At::start:
      case At::done: return fail("expected one object, found " + found);
      case At::top: return fail("expected an object, found " + found);
      case At::metadata: return fail("expected a string, found " + found);
      case At::array: return fail(key_ + ": expected non-negative integers, found " + found);
      case At::entry: break;
    }
    const char* expected = key_ == "dtype" ? "a string" : "an array";
    return fail(fmt::format("{}: expected {}, found {}", key_, expected, found));
  }

  bool finish_entry() {
    for (const auto& [present, missing] :
         {std::pair{dtype_.has_value(), "dtype"}, std::pair{shape_.has_value(), "shape"},
          std::pair{offsets_.has_value(), "data_offsets"}}) {
      if (!present) return fail(fmt::format("has no {}", missing));
    }
    const auto* row = std::find_if(kDtypes.begin(), kDtypes.end(),
                                   [&](const DtypeRow& r) { return *dtype_ == r.name; });
    if (row == kDtypes.end()) {
      const bool other = std::count(kOtherDtypes.begin(), kOtherDtypes.end(), *dtype_) > 0;
      return fail(fmt::format("dtype {} is not {}", quote_name(*dtype_),
                              other ? "supported" : "a safetensors type"),
                  other ? Code::unsupported : Code::corrupt_file);
    }
    if (offsets_->size() != 2) return fail("data_offsets has not exactly two numbers");
    TensorView view{row->dtype, std::move(*shape_), nullptr, 0};
    const auto elements = checked_elements(view.shape);
    uint64_t bytes = 0;
    if (!elements || __builtin_mul_overflow(*elements, static_cast<uint64_t>(row->bytes), &bytes)) {
      return fail(fmt::format("shape {} overflows", view.shape_text()));
    }
    const auto begin = static_cast<uint64_t>((*offsets_)[0]);
    const auto end = static_cast<uint64_t>((*offsets_)[1]);
    if (begin > end || end > payload_.size()) {
      return fail(fmt::format("data_offsets [{}, {}] leave the {} bytes of tensor data", begin, end,
                              payload_.size()));
    }
    if (end - begin != bytes) {
      return fail(fmt::format("{} {} needs {} bytes, data_offsets [{}, {}] give {}", row->name,
                              view.shape_text(), bytes, begin, end, end - begin));
    }
    view.data = payload_.data() + begin;
    view.bytes = bytes;
    const auto inserted = index.tensors.emplace(name_, std::move(view)).first;
    ranges.push_back({begin, end, inserted->first});
    return true;
  }

  std::span<const std::byte> payload_;
  At at_ = At::start;
  std::string name_;  // of the tensor, or __metadata__
  std::string key_;   // inside it
  bool seen_metadata_ = false;
  std::optional<std::string> dtype_;
  std::optional<std::vector<int64_t>> shape_, offsets_;
};

/// The tensors must tile the payload: no overlap, no hole, nothing left over.
Status check_tiling(std::vector<Range> ranges, uint64_t payload_bytes) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t end = 0;
  for (const Range& range : ranges) {
    if (range.begin != end) {
      return Status(Code::corrupt_file,
                    fmt::format("tensor {}: begins at byte {} of the data, expected {} ({})",
                                quote_name(range.name), range.begin, end,
                                range.begin < end ? "overlap" : "hole"));
    }
    end = range.end;
  }
  if (end != payload_bytes) {
    return Status(Code::corrupt_file, fmt::format("tensors end at byte {} of the data, the file "
                                                  "has {} bytes of it",
                                                  end, payload_bytes));
  }
  return {};
}

/// `text` as a JSON string, or nothing if it is not UTF-8.
std::optional<std::string> json_string(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    return std::nullopt;
  }
}

using NamedTensor = std::pair<const std::string, TensorView>;

Result<std::string> make_header(const std::vector<const NamedTensor*>& tensors,
                                const std::map<std::string, std::string>& metadata) {
  const auto not_utf8 = [](const std::string& text) {
    return Status(Code::invalid_argument, quote_name(text) + " is not UTF-8");
  };
  std::string header = "{";
  if (!metadata.empty()) {
    header += fmt::format("\"{}\":{{", kMetadataKey);
    for (const auto& [key, value] : metadata) {
      const auto key_text = json_string(key), value_text = json_string(value);
      if (!key_text || !value_text) return not_utf8(key_text ? value : key);
      header += *key_text + ":" + *value_text + ",";
    }
    header.back() = '}';
    header += ',';
  }
  uint64_t offset = 0;
  for (const NamedTensor* item : tensors) {
    const auto& [name, view] = *item;
    const auto name_text = json_string(name);
    if (!name_text) return not_utf8(name);
    header += fmt::format("{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}},",
                          *name_text, tensor_dtype_name(view.dtype), joined(view.shape, ","),
                          offset, offset + view.bytes);
    offset += view.bytes;
  }
  if (header.back() == ',') header.pop_back();
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return header;
}

}  // namespace

const char* tensor_dtype_name(TensorDtype dtype) { return dtype_row(dtype).name; }
int64_t tensor_dtype_bytes(TensorDtype dtype) { return dtype_row(dtype).bytes; }

int64_t TensorView::elements() const {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

std::string TensorView::shape_text() const { return fmt::format("[{}]", joined(shape, ", ")); }

Result<SafetensorsIndex> parse_safetensors(std::span<const std::byte> file,
                                           std::string_view file_name) {
  const auto corrupt = [&](const std::string& reason) {
    return Status(Code::corrupt_file, fmt::format("{}: {}", file_name, reason));
  };
  uint64_t header_bytes = 0;
  if (file.size() < sizeof header_bytes) {
    return corrupt(fmt::format("{} bytes are too few for a safetensors file", file.size()));
  }
  std::memcpy(&header_bytes, file.data(), sizeof header_bytes);
  const uint64_t rest = file.size() - sizeof header_bytes;
  if (header_bytes > kMaxHeaderBytes || header_bytes > rest) {
    return corrupt(fmt::format("header length {} exceeds {}", header_bytes,
                               header_bytes > rest ? fmt::format("the file's {} bytes", file.size())
                                                   : fmt::format("{}", kMaxHeaderBytes)));
  }
  const char* header = reinterpret_cast<const char*>(file.data() + sizeof header_bytes);
  if (header_bytes == 0 || header[0] != '{') return corrupt("the header does not begin with '{'");
  // The JSON lexer takes a zero byte for the end of its input and would ignore what follows.
  if (std::memchr(header, 0, header_bytes) != nullptr) return corrupt("zero byte in the header");

  const auto payload = file.subspan(sizeof header_bytes + header_bytes);
  HeaderReader reader(payload);
  if (!nlohmann::json::sax_parse(header, header + header_bytes, &reader)) {
    return Status(reader.status.code(), fmt::format("{}: {}", file_name, reader.status.message()));
  }
  if (Status status = check_tiling(std::move(reader.ranges), payload.size()); !status.ok()) {
    return corrupt(status.message());
  }
  return std::move(reader.index);
}

Result<MappedFile> MappedFile::open(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer. It does not affect regular files.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return system_error("open", path);
  MappedFile file;
  struct stat info;
  Status status;
  if (::fstat(fd, &info) != 0) {
    status = system_error("stat", path);
  } else if (!S_ISREG(info.st_mode)) {
    status = Status(Code::io_error, fmt::format("cannot read {}: not a regular file", path));
  } else if (info.st_size > 0) {  // mmap refuses empty files; an empty span is as good
    const auto size = static_cast<size_t>(info.st_size);
    void* memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED) {
      status = system_error("map", path);
    } else {
      file.data_ = static_cast<const std::byte*>(memory);
      file.size_ = size;
    }
  }
  ::close(fd);
  if (!status.ok()) return status;
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

Status write_safetensors(const std::string& path, const TensorMap& tensors,
                         const std::map<std::string, std::string>& metadata) {
  std::vector<const NamedTensor*> order;
  for (const auto& item : tensors) {
    const TensorView& view = item.second;
    const bool negative =
        std::any_of(view.shape.begin(), view.shape.end(), [](int64_t size) { return size < 0; });
    const auto elements = checked_elements(view.shape);
    const auto size = static_cast<uint64_t>(tensor_dtype_bytes(view.dtype));
    if (negative || !elements || view.bytes / size != *elements || view.bytes % size != 0) {
      return Status(Code::invalid_argument,
                    fmt::format("tensor {}: {} bytes do not hold {} {}", quote_name(item.first),
                                view.bytes, tensor_dtype_name(view.dtype), view.shape_text()));
    }
    if (item.first.empty() || item.first == kMetadataKey) {
      return Status(Code::invalid_argument, quote_name(item.first) + " cannot name a tensor");
    }
    order.push_back(&item);
  }
  // Largest elements first keeps every tensor aligned without holes, which the format forbids.
  std::stable_sort(order.begin(), order.end(), [](const NamedTensor* a, const NamedTensor* b) {
    return tensor_dtype_bytes(a->second.dtype) > tensor_dtype_bytes(b->second.dtype);
  });
  auto header = make_header(order, metadata);
  if (!header.ok()) return header.status();
  const uint64_t header_bytes = header->size();
  if (header_bytes > kMaxHeaderBytes) {
    return Status(Code::invalid_argument, fmt::format("{}: header of {} bytes exceeds {}", path,
                                                      header_bytes, kMaxHeaderBytes));
  }

  return replace_file(path, [&](OutputFile& file) -> Status {
    NIBBLE_TRY(file.write(&header_bytes, sizeof header_bytes));
    NIBBLE_TRY(file.write(header->data(), header->size()));
    for (const NamedTensor* item : order) {
      NIBBLE_TRY(file.write(item->second.data, item->second.bytes));
    }
    return {};
  });
}

}  // namespace nibble
