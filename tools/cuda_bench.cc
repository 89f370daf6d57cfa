#include "cuda_bench.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

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

constexpr double kGraphMicroseconds = 3000;  // of one replay: long against its own start
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

/// Whole turns over the copies that last about kGraphMicroseconds.
int64_t launches_for(const DeviceContender& contender) {
  const Replay once(contender, contender.copies);
  (void)once.run();
  const double us = std::max(0.5, once.run());
  const auto wanted = static_cast<int64_t>(std::ceil(kGraphMicroseconds / us));
  const int64_t turns = std::max<int64_t>(1, wanted / contender.copies);
  return std::min(turns * contender.copies, std::max(kMostLaunches, contender.copies));
}

}  // namespace

void time_on_device(std::vector<DeviceContender>& contenders, double seconds,
                    const std::function<void()>& each_round) {
  constexpr int kLeastRounds = 7, kMostRounds = 200;
  std::vector<std::unique_ptr<Replay>> replays;
  for (const DeviceContender& contender : contenders) {
    replays.push_back(std::make_unique<Replay>(contender, launches_for(contender)));
    (void)replays.back()->run();
  }
  const double end = now_seconds() + seconds;
  for (int round = 0; round < kMostRounds; ++round) {
    if (round >= kLeastRounds && now_seconds() > end) break;
    for (size_t i = 0; i < contenders.size(); ++i) {
      contenders[i].samples.microseconds.push_back(replays[i]->run());
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

// ---- cuBLAS -------------------------------------------------------------------------------------

// The few numbers of cublas_api.h and library_types.h that are used, which no toolkit of ours has.
struct Cublas::Library {
  using Handle = void*;
  static constexpr int kTransposed = 1, kPlain = 0;
  static constexpr int kF16 = 2, kInt8 = 3, kInt32 = 10;  // cudaDataType
  static constexpr int kComputeF32 = 68, kComputeI32 = 72;
  static constexpr int kDefaultAlgorithm = -1;

  void* handle = nullptr;
  Handle cublas = nullptr;
  int (*create)(Handle*) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*set_stream)(Handle, cudaStream_t) = nullptr;
  int (*set_workspace)(Handle, void*, size_t) = nullptr;
  int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int,
              int, const void*, void*, int, int, int, int) = nullptr;
  std::unique_ptr<DeviceMemory> workspace;
  ~Library() {
    if (cublas != nullptr) destroy(cublas);
    if (handle != nullptr) dlclose(handle);
  }
};

Cublas::Cublas(const std::string& path) {
  auto library = std::make_unique<Library>();
  const std::vector<std::string> names =
      path.empty() ? std::vector<std::string>{"libcublas.so.13", "libcublas.so.12"}
                   : std::vector<std::string>{path};
  for (const std::string& name : names) {
    if (library->handle == nullptr) library->handle = dlopen(name.c_str(), RTLD_NOW);
  }
  if (library->handle == nullptr) {
    problem_ = fmt::format("no cuBLAS ({})", dlerror());
    return;
  }
  void* blas = library->handle;
  library->create = symbol<decltype(library->create)>(blas, "cublasCreate_v2");
  library->destroy = symbol<decltype(library->destroy)>(blas, "cublasDestroy_v2");
  library->set_stream = symbol<decltype(library->set_stream)>(blas, "cublasSetStream_v2");
  library->set_workspace = symbol<decltype(library->set_workspace)>(blas, "cublasSetWorkspace_v2");
  library->gemm = symbol<decltype(library->gemm)>(blas, "cublasGemmEx");
  if (library->create == nullptr || library->destroy == nullptr || library->set_stream == nullptr ||
      library->set_workspace == nullptr || library->gemm == nullptr ||
      library->create(&library->cublas) != 0) {
    problem_ = "cuBLAS could not be set up";
    return;
  }
  library->workspace = std::make_unique<DeviceMemory>(size_t{64} << 20);
  library_ = std::move(library);
}

Cublas::~Cublas() = default;

bool Cublas::multiply(Type type, const void* x, const void* w, void* y, int64_t m, int64_t n,
                      int64_t k, cudaStream_t stream) const {
  const Library& l = *library_;
  const bool f16 = type == Type::f16;
  const float one_f = 1, zero_f = 0;
  const int one_i = 1, zero_i = 0;
  const void* one = f16 ? static_cast<const void*>(&one_f) : &one_i;
  const void* zero = f16 ? static_cast<const void*>(&zero_f) : &zero_i;
  const int from = f16 ? Library::kF16 : Library::kInt8, to = f16 ? Library::kF16 : Library::kInt32;
  if (l.set_stream(l.cublas, stream) != 0) return false;
  // setting the stream takes the workspace away; without one, capturing would allocate
  if (l.set_workspace(l.cublas, l.workspace->as<>(), l.workspace->bytes()) != 0) return false;
  // column-major: y (n, m) = w (k, n) transposed * x (k, m)
  return l.gemm(l.cublas, Library::kTransposed, Library::kPlain, static_cast<int>(n),
                static_cast<int>(m), static_cast<int>(k), one, w, from, static_cast<int>(k), x,
                from, static_cast<int>(k), zero, y, to, static_cast<int>(n),
                f16 ? Library::kComputeF32 : Library::kComputeI32, Library::kDefaultAlgorithm) == 0;
}

}  // namespace nibble::cli
