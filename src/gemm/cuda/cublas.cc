// See cublas.h.
#include "gemm/cuda/cublas.h"

#include <fmt/format.h>

#include <vector>

#include "base/shared_library.h"
#include "gemm/cuda/device_buffer.h"
#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

// The few numbers of cublas_api.h and library_types.h that are used.
constexpr int kPlain = 0, kTransposed = 1;
constexpr int kTypeF16 = 2, kTypeInt8 = 3, kTypeInt32 = 10, kTypeBf16 = 14;
constexpr int kComputeF32 = 68, kComputeI32 = 72;
constexpr int kDefaultAlgorithm = -1;
constexpr size_t kWorkspaceBytes = size_t{64} << 20;

using Handle = void*;

}  // namespace

struct Cublas::State {
  SharedLibrary library;
  Handle handle = nullptr;
  DeviceBuffer workspace;
  int (*create)(Handle*) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*set_stream)(Handle, cudaStream_t) = nullptr;
  int (*set_workspace)(Handle, void*, size_t) = nullptr;
  int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int,
              int, const void*, void*, int, int, int, int) = nullptr;

  ~State() {
    if (handle != nullptr) destroy(handle);
  }
};

Cublas::Cublas(std::unique_ptr<State> state) : state_(std::move(state)) {}
Cublas::~Cublas() = default;

Result<std::unique_ptr<Cublas>> Cublas::open(const DeviceInfo& device, const std::string& path) {
  auto state = std::make_unique<State>();
  State& s = *state;
  const std::vector<std::string> names =
      path.empty() ? std::vector<std::string>{"libcublas.so.13", "libcublas.so.12"}
                   : std::vector<std::string>{path};
  Result<SharedLibrary> library = SharedLibrary::open(names);
  if (!library.ok()) {
    return Status(Code::unsupported,
                  fmt::format("cuBLAS, which multiplies 16-bit weights, was not found ({}): "
                              "LD_LIBRARY_PATH can name its folder",
                              library.status().message()));
  }
  s.library = std::move(*library);
  if (!s.library.find(s.create, "cublasCreate_v2") ||
      !s.library.find(s.destroy, "cublasDestroy_v2") ||
      !s.library.find(s.set_stream, "cublasSetStream_v2") ||
      !s.library.find(s.set_workspace, "cublasSetWorkspace_v2") ||
      !s.library.find(s.gemm, "cublasGemmEx")) {
    return Status(Code::unsupported, "cuBLAS lacks a function that is needed");
  }
  if (const int error = s.create(&s.handle); error != 0) {
    return Status(Code::unsupported, fmt::format("cublasCreate: error {}", error));
  }
  NIBBLE_TRY(s.workspace.allocate(kWorkspaceBytes, device));
  return std::unique_ptr<Cublas>(new Cublas(std::move(state)));
}

Status Cublas::multiply(Type type, const void* x, const void* w, void* y, int64_t y_stride,
                        int64_t m, int64_t n, int64_t k, Stream stream) {
  State& s = *state_;
  const float one_f = 1, zero_f = 0;
  const int one_i = 1, zero_i = 0;
  const bool integers = type == Type::int8;
  const void* one = integers ? static_cast<const void*>(&one_i) : &one_f;
  const void* zero = integers ? static_cast<const void*>(&zero_i) : &zero_f;
  const int from = integers ? kTypeInt8 : type == Type::f16 ? kTypeF16 : kTypeBf16;
  const int to = integers ? kTypeInt32 : from;
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  int error = s.set_stream(s.handle, static_cast<cudaStream_t>(stream));
  // Setting the stream takes the workspace away; without one, capturing would allocate.
  if (error == 0) error = s.set_workspace(s.handle, s.workspace.as<>(), s.workspace.bytes());
  // Row-major y is column-major y transposed: its columns are rows of x.
  if (error == 0) {
    error =
        s.gemm(s.handle, kTransposed, kPlain, i(n), i(m), i(k), one, w, from, i(k), x, from, i(k),
               zero, y, to, i(y_stride), integers ? kComputeI32 : kComputeF32, kDefaultAlgorithm);
  }
  if (error == 0) return {};
  return Status(Code::io_error,
                fmt::format("cublasGemmEx of {} x {} x {}: error {}", m, n, k, error));
}

}  // namespace nibble::cuda
