#include "cuda_bench.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "cli.h"

namespace nibble::cli {

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(fmt::format("{}: {}", what, cudaGetErrorString(error)));
}

DeviceMemory::DeviceMemory(size_t bytes) : bytes_(bytes) {
  check_cuda(cudaMalloc(&data_, bytes), fmt::format("{} bytes of device memory", bytes).c_str());
  check_cuda(cudaMemset(data_, 0, bytes), "cudaMemset");
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}

DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) (void)cudaFree(data_);
}

// ---- timing -------------------------------------------------------------------------------------

namespace {

constexpr int64_t kMostLaunches = 2000;

/// A stream, two events, and the graph of one contender.
class Replay {
 public:
  Replay(const DeviceContender& contender, int64_t launches) : launches_(launches) {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    check_cuda(cudaEventCreate(&start_), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end_), "cudaEventCreate");
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    for (int64_t i = 0; i < launches; ++i) contender.launch(i, stream_);
    check_cuda(cudaStreamEndCapture(stream_, &graph), contender.name.c_str());
    check_cuda(cudaGraphInstantiate(&executable_, graph, 0), contender.name.c_str());
    check_cuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  ~Replay() {
    (void)cudaGraphExecDestroy(executable_);
    (void)cudaEventDestroy(start_);
    (void)cudaEventDestroy(end_);
    (void)cudaStreamDestroy(stream_);
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  /// Microseconds of one launch.
  double run() const {
    float milliseconds = 0;
    check_cuda(cudaEventRecord(start_, stream_), "cudaEventRecord");
    check_cuda(cudaGraphLaunch(executable_, stream_), "cudaGraphLaunch");
    check_cuda(cudaEventRecord(end_, stream_), "cudaEventRecord");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    check_cuda(cudaEventElapsedTime(&milliseconds, start_, end_), "cudaEventElapsedTime");
    return milliseconds * 1e3 / static_cast<double>(launches_);
  }

 private:
  int64_t launches_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, end_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

/// Whole turns over the copies that last about graph_us.
int64_t launches_for(const DeviceContender& contender, double graph_us) {
  const Replay once(contender, contender.copies);
  (void)once.run();
  const double us = std::max(0.5, once.run());
  const auto wanted = static_cast<int64_t>(std::ceil(graph_us / us));
  const int64_t turns = std::max<int64_t>(1, wanted / contender.copies);
  return std::min(turns * contender.copies, std::max(kMostLaunches, contender.copies));
}

}  // namespace

void time_on_device(std::vector<DeviceContender>& contenders, const DeviceBudget& budget,
                    const std::function<void()>& each_round) {
  std::vector<std::unique_ptr<Replay>> replays;  // null of those with a clock of their own
  for (const DeviceContender& contender : contenders) {
    replays.push_back(nullptr);
    if (contender.run_and_time) continue;
    replays.back() = std::make_unique<Replay>(contender, launches_for(contender, budget.graph_us));
    (void)replays.back()->run();
  }
  const size_t count = contenders.size();
  const double end = now_seconds() + budget.seconds;
  for (int round = 0; round < budget.most_rounds; ++round) {
    if (round >= budget.least_rounds && now_seconds() > end) break;
    for (size_t turn = 0; turn < count; ++turn) {
      const size_t i = (static_cast<size_t>(round) + turn) % count;
      DeviceContender& contender = contenders[i];
      if (interrupted()) return;
      if (contender.failed) continue;
      const std::optional<double> us =
          contender.run_and_time ? contender.run_and_time() : replays[i]->run();
      contender.failed = !us;
      if (us) contender.samples.microseconds.push_back(*us);
    }
    each_round();
  }
}

// ---- NVML ---------------------------------------------------------------------------------------

namespace {

/// A function of a library that was opened at run time; null if it has none of this name.
template <class Function>
Function symbol(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

struct DeviceMonitor::Library {
  using Device = void*;
  void* handle = nullptr;
  Device device = nullptr;
  int (*clock)(Device, int, unsigned*) = nullptr;
  int (*power)(Device, unsigned*) = nullptr;
  int (*power_limit)(Device, unsigned*) = nullptr;
  int (*temperature)(Device, int, unsigned*) = nullptr;
  int (*driver_version)(char*, unsigned) = nullptr;
  ~Library() {
    if (handle != nullptr) dlclose(handle);
  }
};

DeviceMonitor::DeviceMonitor(int ordinal) {
  auto library = std::make_unique<Library>();
  library->handle = dlopen("libnvidia-ml.so.1", RTLD_NOW);
  if (library->handle == nullptr) return;
  const auto init = symbol<int (*)()>(library->handle, "nvmlInit_v2");
  const auto by_bus =
      symbol<int (*)(const char*, void**)>(library->handle, "nvmlDeviceGetHandleByPciBusId_v2");
  char bus[32] = {};  // NVML counts devices its own way; their addresses agree
  if (init == nullptr || by_bus == nullptr || init() != 0 ||
      cudaDeviceGetPCIBusId(bus, sizeof bus, ordinal) != cudaSuccess ||
      by_bus(bus, &library->device) != 0) {
    return;
  }
  void* nvml = library->handle;
  library->clock = symbol<decltype(library->clock)>(nvml, "nvmlDeviceGetClockInfo");
  library->power = symbol<decltype(library->power)>(nvml, "nvmlDeviceGetPowerUsage");
  library->power_limit =
      symbol<decltype(library->power_limit)>(nvml, "nvmlDeviceGetEnforcedPowerLimit");
  library->temperature = symbol<decltype(library->temperature)>(nvml, "nvmlDeviceGetTemperature");
  library->driver_version =
      symbol<decltype(library->driver_version)>(nvml, "nvmlSystemGetDriverVersion");
  library_ = std::move(library);
}

DeviceMonitor::~DeviceMonitor() = default;

DeviceMonitor::Reading DeviceMonitor::read() const {
  Reading reading;
  if (library_ == nullptr) return reading;
  const auto ask = [this](auto function, auto... arguments) {
    unsigned value = 0;
    const bool known = function != nullptr && function(library_->device, arguments..., &value) == 0;
    return known ? static_cast<double>(value) : 0.0;
  };
  constexpr int kSmClock = 1, kMemoryClock = 2, kGpuSensor = 0;
  reading.sm_mhz = ask(library_->clock, kSmClock);
  reading.memory_mhz = ask(library_->clock, kMemoryClock);
  reading.watts = ask(library_->power) / 1000;
  reading.limit_watts = ask(library_->power_limit) / 1000;
  reading.celsius = ask(library_->temperature, kGpuSensor);
  return reading;
}

std::string DeviceMonitor::driver() const {
  char text[96] = {};
  if (library_ == nullptr || library_->driver_version == nullptr ||
      library_->driver_version(text, sizeof text) != 0) {
    return "";
  }
  return text;
}

}  // namespace nibble::cli
