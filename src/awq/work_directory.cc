#include "awq/work_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <utility>
#include <vector>

#include "format/message.h"
#include "format/output_file.h"

namespace nibble::awq {
namespace {

namespace fs = std::filesystem;

// The key file is written last when a directory is set up: without one, there is nothing to go on
// from.
constexpr const char* kLock = "lock";
constexpr const char* kKey = "key";

bool is_block(const std::string& name) {
  return name.starts_with("block-") && name.ends_with(".safetensors");
}

/// A write that was cut short leaves a file of a temporary name beside its goal.
bool is_ours(const std::string& name) {
  const bool torn =
      name.find("block-") != std::string::npos && name.find(".safetensors") != std::string::npos;
  return name == kLock || name == kKey || is_block(name) || torn;
}

Result<std::vector<std::string>> list(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end;
       entry.increment(error)) {
    names.push_back(entry->path().filename().string());
  }
  if (!error) return names;
  return Status(Code::io_error, fmt::format("cannot list {}: {}", directory, error.message()));
}

std::string read_key(const std::string& path) {
  const auto file = MappedFile::open(path);
  if (!file.ok()) return {};
  const auto bytes = file->bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Status remove_files(const std::string& directory, bool (*which)(const std::string& name)) {
  const auto names = list(directory);
  if (!names.ok()) return names.status();
  for (const std::string& name : *names) {
    const std::string path = directory + "/" + name;
    if (which(name) && ::unlink(path.c_str()) != 0) return system_error("remove", path);
  }
  return {};
}

Status write_key(const std::string& path, const std::string& key) {
  auto file = OutputFile::create(path);
  if (!file.ok()) return file.status();
  NIBBLE_TRY(file->write(key.data(), key.size()));
  return file->finish();
}

}  // namespace

uint64_t kept_bytes(const std::string& path, const std::string& key) {
  if (read_key(path + "/" + kKey) != key) return 0;
  const auto names = list(path);
  uint64_t bytes = 0;
  if (!names.ok()) return bytes;
  for (const std::string& name : *names) {
    std::error_code error;
    const auto size = is_block(name) ? fs::file_size(path + "/" + name, error) : 0;
    if (!error) bytes += size;
  }
  return bytes;
}

Result<WorkDirectory> WorkDirectory::open(const std::string& path, const std::string& key) {
  WorkDirectory work;
  work.path_ = path;
  if (::mkdir(path.c_str(), 0777) != 0 && errno != EEXIST) {
    return system_error("create directory", path);
  }
  const auto names = list(path);
  if (!names.ok()) return names.status();
  for (const std::string& name : *names) {
    if (is_ours(name)) continue;
    return Status(Code::invalid_argument,
                  fmt::format("{} holds {}, which is not the work of an earlier run",
                              quote_name(path), quote_name(name)));
  }
  const std::string lock = path + "/" + kLock;
  work.lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (work.lock_ < 0) return system_error("create", lock);
  if (::flock(work.lock_, LOCK_EX | LOCK_NB) != 0) {
    return Status(Code::invalid_argument,
                  fmt::format("{} is in use by another run", quote_name(path)));
  }
  const std::string key_path = path + "/" + kKey;
  if (read_key(key_path) != key) {
    // The old key goes first and the new one comes last.
    NIBBLE_TRY(remove_files(path, [](const std::string& name) { return name == kKey; }));
    NIBBLE_TRY(remove_files(path, [](const std::string& name) { return name != kLock; }));
    NIBBLE_TRY(write_key(key_path, key));
    NIBBLE_TRY(sync_directory(path));
  }
  NIBBLE_TRY(remove_files(path, [](const std::string& name) {  // torn ones
    return name != kLock && name != kKey && !is_block(name);
  }));
  while (::access(work.block_path(work.finished_).c_str(), R_OK) == 0) ++work.finished_;
  return work;
}

WorkDirectory::WorkDirectory(WorkDirectory&& other) noexcept { *this = std::move(other); }

WorkDirectory& WorkDirectory::operator=(WorkDirectory&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(lock_, other.lock_);
  std::swap(finished_, other.finished_);
  return *this;
}

WorkDirectory::~WorkDirectory() {
  if (lock_ >= 0) ::close(lock_);
}

std::string WorkDirectory::block_path(int64_t block) const {
  return fmt::format("{}/block-{:05}.safetensors", path_, block);
}

Status WorkDirectory::save(const TensorMap& tensors,
                           const std::map<std::string, std::string>& notes) {
  NIBBLE_TRY(write_safetensors(block_path(finished_), tensors, notes));
  ++finished_;
  return {};
}

Result<WorkDirectory::BlockFile> WorkDirectory::load(int64_t block) const {
  const std::string path = block_path(block);
  auto file = MappedFile::open(path);
  if (!file.ok()) return file.status();
  auto index = parse_safetensors(file->bytes(), path);
  if (!index.ok()) return index.status();
  return BlockFile{std::move(*file), std::move(*index)};
}

Status WorkDirectory::remove() {
  NIBBLE_TRY(remove_files(path_, [](const std::string& name) { return name != kLock; }));
  NIBBLE_TRY(remove_files(path_, is_ours));
  if (::rmdir(path_.c_str()) != 0) return system_error("remove directory", path_);
  finished_ = 0;
  return {};
}

}  // namespace nibble::awq
