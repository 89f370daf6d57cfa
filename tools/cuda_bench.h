// What `bench gemm --device cuda` measures with: device memory, graphs of many launches, the clocks
// and the power of the device, and cuBLAS. Failures are exceptions: this is a measuring program,
// and a device that fails ends it (main.cc prints what was thrown).
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "timing.h"

namespace nibble::cli {

void check_cuda(cudaError_t error, const char* what);

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes);  // zeroed
  DeviceMemory(DeviceMemory&& other) noexcept;
  ~DeviceMemory();

  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

/// One thing that is timed: `launch` enqueues launch number `index` (0, 1, ...), which chooses the
/// copy of its weights, so that none is found in L2.
struct DeviceContender {
  std::string name;
  std::function<void(int64_t index, cudaStream_t stream)> launch;
  int64_t copies = 1;
  Samples samples = {};  // microseconds of one launch
  /// In place of `launch`, if it is set: microseconds by a clock of its own; nothing if it has
  /// failed, which takes it out of the contest.
  std::function<std::optional<double>()> run_and_time = {};
  bool failed = false;
};

struct DeviceBudget {
  double seconds = 2;  // of all rounds; least_rounds has precedence
  int least_rounds = 7, most_rounds = 200;
  double graph_us = 3000;  // of one replay: long against its own start
};

/// Graphs of many launches of each contender, replayed in turn, each round from another on; stops
/// early, with what it has, on Ctrl-C.
void time_on_device(std::vector<DeviceContender>& contenders, const DeviceBudget& budget,
                    const std::function<void()>& each_round);

/// Clock, power and temperature through NVML, which comes with the driver.
class DeviceMonitor {
 public:
  explicit DeviceMonitor(int ordinal);
  ~DeviceMonitor();
  struct Reading {
    double sm_mhz = 0, memory_mhz = 0, watts = 0, limit_watts = 0, celsius = 0;  // 0: not known
  };
  Reading read() const;
  std::string driver() const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace nibble::cli
