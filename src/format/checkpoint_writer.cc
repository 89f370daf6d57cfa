// Writing a model directory. Tensors are appended to a spill file as they come and each full shard
// is written from a memory map of it: a shard needs its header first and its tensors sorted, and
// holding five gigabytes in memory for that would decide which machines can quantize a model.
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "format/checkpoint.h"
#include "format/message.h"
#include "format/output_file.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// What copy_side_files leaves behind: weights in any framework's form and what describes the
// quantization of the source.
constexpr std::array kWeightExtensions = {".safetensors", ".bin", ".pt",      ".pth", ".ckpt",
                                          ".gguf",        ".h5",  ".msgpack", ".onnx"};
constexpr std::array kNotSideFiles = {"config.json", "quant_config.json", "quantize_config.json",
                                      "quantization_config.json"};

Status write_file(const fs::path& path, std::string_view text) {
  auto file = OutputFile::create(path.string());
  if (!file.ok()) return file.status();
  NIBBLE_TRY(file->write(text.data(), text.size()));
  return file->finish();
}

Result<std::string> json_text(const json& document, const char* file_name) {
  try {
    return document.dump(2) + "\n";
  } catch (const json::exception&) {
    return Status(Code::invalid_argument, fmt::format("{}: a string is not UTF-8", file_name));
  }
}

bool is_side_file(const std::string& name) {
  const std::string extension = fs::path(name).extension().string();
  const auto is = [](const auto& list, const std::string& text) {
    return std::find(list.begin(), list.end(), text) != list.end();
  };
  return !is(kWeightExtensions, extension) && !is(kNotSideFiles, name) &&
         !name.ends_with(".index.json");
}

}  // namespace

struct CheckpointWriter::State {
  struct Pending {
    std::string name;
    TensorView view;  // without data
    uint64_t offset;  // in the spill file
  };

  fs::path final_directory;
  fs::path directory;  // the temporary
  uint64_t shard_bytes = 0;
  bool owns_directory = false;  // until committed
  Status failure;               // sticky: after a failed write nothing may be committed

  std::optional<OutputFile> spill;
  uint64_t spill_bytes = 0;
  std::vector<Pending> pending;
  std::vector<std::vector<std::string>> shards;  // tensor names
  std::set<std::string> names;
  uint64_t total_bytes = 0;

  ~State() {
    std::error_code ignored;
    spill.reset();
    if (owns_directory) fs::remove_all(directory, ignored);
  }

  fs::path spill_path() const { return directory / ".spill"; }
  fs::path unnamed_shard(size_t number) const {  // until the number of shards is known
    return directory / fmt::format(".shard-{}", number);
  }

  /// Remembers the first failure, which every later call repeats.
  Status note(Status status) {
    if (failure.ok()) failure = status;
    return status;
  }

  Status append(const std::string& name, const TensorView& tensor);
  Status flush_shard();
  Status copy_side_files(const fs::path& source);
  Status name_shards();
  Status commit();
};

Status CheckpointWriter::State::append(const std::string& name, const TensorView& tensor) {
  if (!pending.empty() && spill_bytes + tensor.bytes > shard_bytes) NIBBLE_TRY(flush_shard());
  if (!spill) {
    auto file = OutputFile::create(spill_path().string());
    if (!file.ok()) return file.status();
    spill.emplace(std::move(*file));
  }
  NIBBLE_TRY(spill->write(tensor.data, tensor.bytes));
  pending.push_back({name, {tensor.dtype, tensor.shape, nullptr, tensor.bytes}, spill_bytes});
  spill_bytes += tensor.bytes;
  total_bytes += tensor.bytes;
  return {};
}

Status CheckpointWriter::State::flush_shard() {
  if (pending.empty()) return {};
  // Synced, so that a file system that allocates late reports a full disk before we read back.
  NIBBLE_TRY(spill->finish());
  spill.reset();
  {
    auto map = MappedFile::open(spill_path().string());
    if (!map.ok()) return map.status();
    TensorMap tensors;
    for (Pending& item : pending) {
      item.view.data = map->bytes().data() + item.offset;
      tensors.emplace(item.name, item.view);
    }
    // "format" is what transformers requires before it accepts a file.
    const Status written =
        write_safetensors(unnamed_shard(shards.size()).string(), tensors, {{"format", "pt"}});
    NIBBLE_TRY(written);
  }
  std::error_code ignored;
  fs::remove(spill_path(), ignored);
  auto& shard = shards.emplace_back();
  for (const Pending& item : pending) shard.push_back(item.name);
  pending.clear();
  spill_bytes = 0;
  return {};
}

Status CheckpointWriter::State::copy_side_files(const fs::path& source) {
  std::error_code error;
  for (fs::directory_iterator entry(source, error), end; !error && entry != end;
       entry.increment(error)) {
    std::error_code not_regular;
    // Follows links: a model cache is a directory of links to blobs.
    if (!entry->is_regular_file(not_regular)) continue;
    const std::string name = entry->path().filename().string();
    if (!is_side_file(name)) continue;
    auto file = MappedFile::open(entry->path().string());
    if (!file.ok()) return file.status();
    const auto bytes = file->bytes();
    NIBBLE_TRY(
        write_file(directory / name, {reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
  }
  if (!error) return {};
  return Status(Code::io_error,
                fmt::format("cannot list {}: {}", source.string(), error.message()));
}

Status CheckpointWriter::State::name_shards() {
  json weight_map = json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name =
        shards.size() == 1 ? "model.safetensors"
                           : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    for (const std::string& tensor : shards[i]) weight_map[tensor] = name;
    const fs::path path = directory / name;
    if (std::rename(unnamed_shard(i).c_str(), path.c_str()) != 0) {
      return system_error("rename to", path.string());
    }
  }
  if (shards.size() == 1) return {};
  constexpr const char* kName = "model.safetensors.index.json";
  auto text =
      json_text({{"metadata", {{"total_size", total_bytes}}}, {"weight_map", weight_map}}, kName);
  if (!text.ok()) return text.status();
  return write_file(directory / kName, *text);
}

Status CheckpointWriter::State::commit() {
  NIBBLE_TRY(flush_shard());
  if (shards.empty()) return Status(Code::invalid_argument, "no tensor was added");
  NIBBLE_TRY(name_shards());
  NIBBLE_TRY(sync_directory(directory.string()));
  // Replaces an empty directory; anything put there meanwhile makes it fail.
  if (std::rename(directory.c_str(), final_directory.c_str()) != 0) {
    return system_error("rename to", final_directory.string());
  }
  owns_directory = false;
  return sync_directory(final_directory.parent_path().string());
}

Result<CheckpointWriter> CheckpointWriter::create(const std::string& directory,
                                                  uint64_t shard_bytes) {
  const auto bad = [&](const char* reason) {
    return Status(Code::invalid_argument, fmt::format("{}: {}", quote_name(directory), reason));
  };
  std::error_code error;
  fs::path target = fs::absolute(directory, error).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();  // a trailing slash
  if (directory.empty() || error || !target.has_filename()) return bad("cannot name a directory");
  if (fs::exists(target, error)) {
    if (!fs::is_directory(target, error)) return bad("exists and is not a directory");
    if (!fs::is_empty(target, error) || error) return bad("exists and is not empty");
  }

  auto state = std::make_unique<State>();
  state->final_directory = target;
  state->shard_bytes = shard_bytes;
  state->directory =
      target.parent_path() / fmt::format(".{}.partial-{}", target.filename().string(), ::getpid());
  if (::mkdir(state->directory.c_str(), 0777) != 0) {
    return system_error("create directory", state->directory.string());
  }
  state->owns_directory = true;
  return CheckpointWriter(std::move(state));
}

CheckpointWriter::CheckpointWriter(std::unique_ptr<State> state) : state_(std::move(state)) {}
CheckpointWriter::CheckpointWriter(CheckpointWriter&&) noexcept = default;
CheckpointWriter& CheckpointWriter::operator=(CheckpointWriter&&) noexcept = default;
CheckpointWriter::~CheckpointWriter() = default;

Status CheckpointWriter::add(const std::string& name, const TensorView& tensor) {
  NIBBLE_TRY(state_->failure);
  if (!state_->names.insert(name).second) {
    return Status(Code::invalid_argument, quote_name(name) + " was added before");
  }
  return state_->note(state_->append(name, tensor));
}

Status CheckpointWriter::write_config(const json& config) {
  NIBBLE_TRY(state_->failure);
  auto text = json_text(config, "config.json");
  if (!text.ok()) return text.status();
  return state_->note(write_file(state_->directory / "config.json", *text));
}

Status CheckpointWriter::copy_side_files(const std::string& source_directory) {
  NIBBLE_TRY(state_->failure);
  return state_->note(state_->copy_side_files(source_directory));
}

Status CheckpointWriter::commit() {
  NIBBLE_TRY(state_->failure);
  NIBBLE_TRY(state_->note(state_->commit()));
  state_->failure = Status(Code::invalid_argument, "the checkpoint is already committed");
  return {};
}

}  // namespace nibble
