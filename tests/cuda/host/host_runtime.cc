// The CUDA runtime's functions on host memory; see host_device.h.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "base/dtype.h"
#include "base/half.h"
#include "host_device.h"

namespace nibble::cuda::host {
namespace {

using Work = std::vector<std::function<void()>>;

constexpr size_t kMemoryBytes = size_t{1} << 30;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kFresh = 0xff;  // NaN in every float type
constexpr unsigned char kGuard = 0xa5;

struct State {
  std::map<void*, size_t> device;  // allocations and their bytes
  std::map<void*, size_t> pinned;
  size_t used = 0;
  std::map<cudaStream_t, Work> waiting;    // nullptr: the default stream
  std::map<cudaStream_t, Work*> captured;  // streams that are being captured
  double clock = 0;                        // of events
};

State& state() {
  static State s;
  return s;
}

void run(Work& work) {
  const Work now = std::move(work);
  work.clear();
  for (const auto& step : now) {
    state().clock += 1;
    step();
  }
}

void check_guard(void* data, size_t bytes) {
  const auto* guard = static_cast<unsigned char*>(data) + bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (guard[i] == kGuard) continue;
    std::fprintf(stderr, "device memory of %zu bytes was written %zu bytes behind its end\n", bytes,
                 i);
    std::abort();
  }
}

bool is_pinned(const void* p) {
  const auto after = state().pinned.upper_bound(const_cast<void*>(p));
  if (after == state().pinned.begin()) return false;
  const auto& [start, bytes] = *std::prev(after);
  return static_cast<const char*>(p) < static_cast<const char*>(start) + bytes;
}

/// Copies rows when the stream comes to it. A source that is not pinned is read at once, as CUDA's
/// staging does; into a graph it would be read whenever the graph runs, which no caller wants.
void copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
               size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  auto staged = std::make_shared<std::vector<char>>();
  const bool stage = kind == cudaMemcpyHostToDevice && !is_pinned(from);
  if (stage) {
    if (state().captured.contains(stream)) {
      std::fprintf(stderr, "a copy of pageable memory was captured\n");
      std::abort();
    }
    const auto* begin = static_cast<const char*>(from);
    staged->assign(begin, begin + from_pitch * (height - 1) + width);
  }
  enqueue(stream, [=] {
    const char* source = stage ? staged->data() : static_cast<const char*>(from);
    for (size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<char*>(to) + row * to_pitch, source + row * from_pitch, width);
    }
  });
}

}  // namespace

void enqueue(cudaStream_t stream, std::function<void()> work) {
  const auto capturing = state().captured.find(stream);
  Work& to = capturing == state().captured.end() ? state().waiting[stream] : *capturing->second;
  to.push_back(std::move(work));
}

float load(const void* from, Element type, int64_t index) {
  return load_as_float(from, index, static_cast<Dtype>(type));
}

void store(void* to, Element type, int64_t index, float value) {
  store_from_float(to, index, static_cast<Dtype>(type), value);
}

}  // namespace nibble::cuda::host

// ---- the runtime
// ---------------------------------------------------------------------------------

namespace host = nibble::cuda::host;
using host::state;

struct CUgraph_st {
  host::Work work;
};
struct CUgraphExec_st {
  host::Work work;
};
struct CUstream_st {};
struct CUevent_st {
  double time = 0;
  cudaStream_t stream = nullptr;  // of the last record
  int waiting = 0;                // records that the stream has not come to
};

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the host's device"; }
const char* cudaGetErrorName(cudaError_t) { return "hostDeviceError"; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  // 90 or 80: which kernels are planned
  const char* capability = std::getenv("NIBBLE_HOST_DEVICE_CAPABILITY");
  const int number = capability == nullptr ? 90 : std::atoi(capability);
  *properties = {};
  std::strcpy(properties->name, "host memory");
  properties->major = number / 10;
  properties->minor = number % 10;
  properties->multiProcessorCount = 4;
  properties->l2CacheSize = 1 << 20;
  properties->totalGlobalMem = host::kMemoryBytes;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 227 * 1024;  // cudaDevAttrMaxSharedMemoryPerBlockOptin, the only one that is asked for
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
  if (bytes > host::kMemoryBytes - state().used) return cudaErrorMemoryAllocation;
  const size_t padded = (bytes + host::kGuardBytes + 255) / 256 * 256;
  *data = std::aligned_alloc(256, padded);
  std::memset(*data, host::kFresh, bytes);
  std::memset(static_cast<char*>(*data) + bytes, host::kGuard, padded - bytes);
  state().device[*data] = bytes;
  state().used += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  if (data == nullptr) return cudaSuccess;
  for (auto& [stream, work] : state().waiting) host::run(work);
  const auto found = state().device.find(data);
  if (found == state().device.end()) return cudaErrorInvalidValue;
  host::check_guard(data, found->second);
  state().used -= found->second;
  state().device.erase(found);
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** data, size_t bytes) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  state().pinned[*data] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
  state().pinned.erase(data);
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = host::kMemoryBytes - state().used;
  *total = host::kMemoryBytes;
  return cudaSuccess;
}

cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  host::enqueue(nullptr, [=] { std::memset(data, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  host::enqueue(stream, [=] { std::memset(data, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  host::run(state().waiting[nullptr]);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  host::copy_rows(to, bytes, from, bytes, bytes, 1, kind, stream);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  host::copy_rows(to, to_pitch, from, from_pitch, width, height, kind, stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  host::run(state().waiting[stream]);
  state().waiting.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (state().captured.contains(stream)) return cudaErrorStreamCaptureUnsupported;
  host::run(state().waiting[stream]);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  if (!state().captured.empty()) return cudaErrorStreamCaptureUnsupported;
  for (auto& [stream, work] : state().waiting) host::run(work);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  state().captured[stream] = new host::Work;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = new CUgraph_st{std::move(*state().captured[stream])};
  delete state().captured[stream];
  state().captured.erase(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
  const bool captured = state().captured.contains(stream);
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id != nullptr) *id = captured ? 1 : 0;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const auto& step : exec->work) host::enqueue(stream, step);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  host::enqueue(stream, [=] { event->time = state().clock; });
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream;
  event->waiting += 1;
  host::enqueue(stream, [=] { event->waiting -= 1; });
  return cudaSuccess;
}
/// No further than the event: what lies behind it is still to come.
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  host::Work& work = state().waiting[event->stream];
  size_t done = 0;
  while (event->waiting > 0) work[done++]();
  work.erase(work.begin(), work.begin() + static_cast<std::ptrdiff_t>(done));
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = static_cast<float>(end->time - start->time);
  return cudaSuccess;
}

}  // extern "C"
