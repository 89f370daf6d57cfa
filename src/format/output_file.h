// A file being written: created exclusively, removed again unless finish() succeeds. Every failure
// is an io_error that names the path and the system's reason. replace_file puts a whole file in the
// place of another. Not here: directories that are replaced as a whole (checkpoint_writer).
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>

#include "base/status.h"

namespace nibble {

/// io_error "cannot <action> <path>: <reason of errno>".
inline Status system_error(const char* action, const std::string& path) {
  const int reason = errno;
  return Status(Code::io_error,
                fmt::format("cannot {} {}: {}", action, path, std::strerror(reason)));
}

/// Makes a rename or a new name in `directory` survive a power loss.
inline Status sync_directory(const std::string& directory) {
  const int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return system_error("open directory", directory);
  // Some network file systems cannot sync a directory; they say EINVAL, which loses nothing.
  const bool failed = ::fsync(fd) != 0 && errno != EINVAL;
  Status status = failed ? system_error("sync directory", directory) : Status{};
  ::close(fd);
  return status;
}

class OutputFile {
 public:
  static Result<OutputFile> create(const std::string& path) {
    OutputFile file;
    file.fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file.fd_ < 0) return system_error("create", path);
    file.path_ = path;
    return file;
  }

  OutputFile(OutputFile&& other) noexcept { swap(other); }
  OutputFile& operator=(OutputFile&& other) noexcept {
    swap(other);
    return *this;
  }
  ~OutputFile() {
    if (fd_ < 0) return;
    ::close(fd_);
    ::unlink(path_.c_str());
  }

  Status write(const void* data, size_t bytes) {
    const char* next = static_cast<const char*>(data);
    while (bytes > 0) {
      // One call moves at most 2 GiB; a short write (disk nearly full) fails on the next turn.
      const ssize_t written = ::write(fd_, next, std::min(bytes, size_t{1} << 30));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return system_error("write", path_);
      next += written;
      bytes -= static_cast<size_t>(written);
    }
    return {};
  }

  /// Syncs and closes. On failure the file is removed.
  Status finish() {
    if (::fsync(fd_) != 0) return system_error("sync", path_);
    const int fd = std::exchange(fd_, -1);
    if (::close(fd) != 0) {
      Status status = system_error("close", path_);
      ::unlink(path_.c_str());
      return status;
    }
    return {};
  }

 private:
  OutputFile() = default;
  void swap(OutputFile& other) {
    std::swap(fd_, other.fd_);
    std::swap(path_, other.path_);
  }

  int fd_ = -1;
  std::string path_;
};

/// Makes the file at `path` anew: fill(OutputFile&) writes it under a temporary name beside it,
/// which then takes its place, synced. After a failure, what was at `path` is there still.
template <class Fill>
Status replace_file(const std::string& path, const Fill& fill) {
  const std::string partial = fmt::format("{}.partial-{}", path, ::getpid());
  auto file = OutputFile::create(partial);
  if (!file.ok()) return file.status();
  NIBBLE_TRY(fill(*file));
  NIBBLE_TRY(file->finish());
  if (std::rename(partial.c_str(), path.c_str()) != 0) {
    Status status = system_error("rename to", path);
    ::unlink(partial.c_str());
    return status;
  }
  const auto parent = std::filesystem::path(path).parent_path();
  return sync_directory(parent.empty() ? "." : parent.string());
}

}  // namespace nibble
