// Blocks that are finished while a model is being quantized, one file each in a directory beside
// the result, so that an interrupted run can go on. A key tells whether they belong to the same
// source, text and options. Not here: the result itself (format/checkpoint.h).
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "base/status.h"
#include "format/safetensors.h"

namespace nibble::awq {

class WorkDirectory {
 public:
  /// The tensors and notes of one finished block.
  struct BlockFile {
    MappedFile file;
    SafetensorsIndex index;  // views into `file`
  };

  /// Opens `path` or creates it. Blocks that were made under another `key` are deleted.
  /// invalid_argument if another process uses the directory or it holds anything else.
  static Result<WorkDirectory> open(const std::string& path, const std::string& key);
  WorkDirectory(WorkDirectory&& other) noexcept;
  WorkDirectory& operator=(WorkDirectory&& other) noexcept;
  ~WorkDirectory();  // lets the next process in; the files stay

  const std::string& path() const { return path_; }
  /// Blocks 0..finished()-1 can be loaded.
  int64_t finished() const { return finished_; }
  /// Block finished(), which then is one of them; all of it or, on failure, nothing is on disk.
  Status save(const TensorMap& tensors, const std::map<std::string, std::string>& notes);
  Result<BlockFile> load(int64_t block) const;

  /// Deletes the directory.
  Status remove();

 private:
  WorkDirectory() = default;
  std::string block_path(int64_t block) const;

  std::string path_;
  int lock_ = -1;
  int64_t finished_ = 0;
};

/// Bytes of the blocks that a run with this key left at `path`; 0 if there are none.
uint64_t kept_bytes(const std::string& path, const std::string& key);

}  // namespace nibble::awq
