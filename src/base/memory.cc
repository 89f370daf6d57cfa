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

/// The value of `key` in a file of "key value" lines; 0 if it is not there.
uint64_t value_in(const char* path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  uint64_t value = 0;
  while (file >> name >> value) {
    if (name == key) return value;
  }
  return 0;
}

/// What a control group may still use. Cached pages of files count as used there, but give way.
std::optional<uint64_t> left_in_group(const char* limit_path, const char* used_path,
                                      uint64_t cached) {
  const auto limit = number_in(limit_path), used = number_in(used_path);
  if (!limit || !used) return {};
  const uint64_t held = *used > cached ? *used - cached : 0;
  return *limit > held ? *limit - held : 1;  // 0 would mean that nothing is known
}

}  // namespace

uint64_t available_memory_bytes() {
  constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();
  constexpr const char* kStat = "/sys/fs/cgroup/memory.stat";
  constexpr const char* kStat1 = "/sys/fs/cgroup/memory/memory.stat";
  const uint64_t cached = value_in(kStat, "inactive_file") + value_in(kStat, "active_file");
  const uint64_t cached1 =
      value_in(kStat1, "total_inactive_file") + value_in(kStat1, "total_active_file");
  const uint64_t least =
      std::min({mem_available().value_or(kNone),
                left_in_group("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", cached)
                    .value_or(kNone),
                left_in_group("/sys/fs/cgroup/memory/memory.limit_in_bytes",
                              "/sys/fs/cgroup/memory/memory.usage_in_bytes", cached1)
                    .value_or(kNone)});
  return least == kNone ? 0 : least;
}

uint64_t peak_memory_bytes() {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace nibble
