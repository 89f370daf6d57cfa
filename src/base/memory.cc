#include "base/memory.h"

#include <sys/resource.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace nibble {
namespace {

/// "MemAvailable:   123 kB" of /proc/meminfo.
std::optional<uint64_t> mem_available() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  uint64_t value = 0;
  while (file >> key >> value) {
    if (key == "MemAvailable:") return value * 1024;
    std::getline(file, unit);
  }
  return {};
}

std::optional<uint64_t> number_in(const char* path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (file >> value) return value;  // "max" is no number: no limit
  return {};
}

std::optional<uint64_t> left_in_group(const char* limit_path, const char* used_path) {
  const auto limit = number_in(limit_path), used = number_in(used_path);
  if (!limit || !used) return {};
  return *limit > *used ? *limit - *used : 0;
}

}  // namespace

uint64_t available_memory_bytes() {
  constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();
  const uint64_t least = std::min(
      {mem_available().value_or(kNone),
       left_in_group("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current").value_or(kNone),
       left_in_group("/sys/fs/cgroup/memory/memory.limit_in_bytes",
                     "/sys/fs/cgroup/memory/memory.usage_in_bytes")
           .value_or(kNone)});
  return least == kNone ? 0 : least;
}

uint64_t peak_memory_bytes() {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace nibble
