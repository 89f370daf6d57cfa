// See cublas_fp8.h.
#include "cublas_fp8.h"

#include <fmt/format.h>

#include <filesystem>
#include <vector>

#include "base/shared_library.h"
#include "cuda_bench.h"

namespace nibble::cli {
namespace {

// The few numbers and structures of cublasLt.h and library_types.h that are used.
constexpr int kTypeF32 = 0, kTypeBf16 = 14, kTypeE4m3 = 28, kComputeF32 = 68;
constexpr int kTransA = 3, kFastAccumulation = 25, kMostWorkspace = 1, kTransposed = 1;
constexpr size_t kWorkspaceBytes = size_t{64} << 20;

struct Algorithm {
  uint64_t data[8];
};
struct Choice {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
using Handle = void*;

}  // namespace

struct CublasFp8::State {
  SharedLibrary library;
  Handle handle = nullptr;
  DeviceMemory workspace{kWorkspaceBytes};
  int (*create)(Handle*) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*create_product)(Handle*, int compute, int scale) = nullptr;
  int (*set_product)(Handle, int attribute, const void*, size_t) = nullptr;
  int (*destroy_product)(Handle) = nullptr;
  int (*create_layout)(Handle*, int type, uint64_t rows, uint64_t columns, int64_t ld) = nullptr;
  int (*destroy_layout)(Handle) = nullptr;
  int (*create_preference)(Handle*) = nullptr;
  int (*set_preference)(Handle, int attribute, const void*, size_t) = nullptr;
  int (*destroy_preference)(Handle) = nullptr;
  int (*choose)(Handle, Handle product, Handle a, Handle b, Handle c, Handle d, Handle preference,
                int wanted, Choice*, int* found) = nullptr;
  int (*multiply)(Handle, Handle product, const void* alpha, const void* a, Handle layout_a,
                  const void* b, Handle layout_b, const void* beta, const void* c, Handle layout_c,
                  void* d, Handle layout_d, const Algorithm*, void* workspace, size_t,
                  cudaStream_t) = nullptr;

  ~State() {
    if (handle != nullptr) destroy(handle);
  }
  bool find_all() {
    return library.find(create, "cublasLtCreate") && library.find(destroy, "cublasLtDestroy") &&
           library.find(create_product, "cublasLtMatmulDescCreate") &&
           library.find(set_product, "cublasLtMatmulDescSetAttribute") &&
           library.find(destroy_product, "cublasLtMatmulDescDestroy") &&
           library.find(create_layout, "cublasLtMatrixLayoutCreate") &&
           library.find(destroy_layout, "cublasLtMatrixLayoutDestroy") &&
           library.find(create_preference, "cublasLtMatmulPreferenceCreate") &&
           library.find(set_preference, "cublasLtMatmulPreferenceSetAttribute") &&
           library.find(destroy_preference, "cublasLtMatmulPreferenceDestroy") &&
           library.find(choose, "cublasLtMatmulAlgoGetHeuristic") &&
           library.find(multiply, "cublasLtMatmul");
  }
};

CublasFp8::CublasFp8(std::unique_ptr<State> state) : state_(std::move(state)) {}
CublasFp8::~CublasFp8() = default;

Result<std::unique_ptr<CublasFp8>> CublasFp8::open(const std::string& cublas) {
  auto state = std::make_unique<State>();
  std::vector<std::string> names = {"libcublasLt.so.13", "libcublasLt.so.12"};
  if (!cublas.empty()) {
    const std::filesystem::path folder = std::filesystem::path(cublas).parent_path();
    for (std::string& name : names) name = (folder / name).string();
  }
  Result<SharedLibrary> library = SharedLibrary::open(names);
  if (!library.ok()) {
    return Status(Code::unsupported,
                  fmt::format("cuBLASLt was not found ({})", library.status().message()));
  }
  state->library = std::move(*library);
  if (!state->find_all()) {
    return Status(Code::unsupported, "cuBLASLt lacks a function that is needed");
  }
  if (const int error = state->create(&state->handle); error != 0) {
    return Status(Code::unsupported, fmt::format("cublasLtCreate: error {}", error));
  }
  return std::unique_ptr<CublasFp8>(new CublasFp8(std::move(state)));
}

namespace {

/// Column-major, cuBLAS's view: y transposed (n, m) = w transposed (k, n), transposed, times x
/// transposed (k, m).
template <class State>
class LtProduct : public CublasFp8::Product {
 public:
  explicit LtProduct(State& state) : s_(state) {}
  ~LtProduct() override {
    for (Handle layout : {w_, x_, y_}) {
      if (layout != nullptr) s_.destroy_layout(layout);
    }
    if (product_ != nullptr) s_.destroy_product(product_);
  }
  Status prepare(int64_t m, int64_t n, int64_t k) {
    const int transposed = kTransposed;
    const int8_t fast = 1;
    int error = s_.create_product(&product_, kComputeF32, kTypeF32);
    if (error == 0) error = s_.set_product(product_, kTransA, &transposed, sizeof transposed);
    if (error == 0) error = s_.set_product(product_, kFastAccumulation, &fast, sizeof fast);
    const auto u = [](int64_t v) { return static_cast<uint64_t>(v); };
    if (error == 0) error = s_.create_layout(&w_, kTypeE4m3, u(k), u(n), k);
    if (error == 0) error = s_.create_layout(&x_, kTypeE4m3, u(k), u(m), k);
    if (error == 0) error = s_.create_layout(&y_, kTypeBf16, u(n), u(m), n);
    Handle preference = nullptr;
    if (error == 0) error = s_.create_preference(&preference);
    if (error == 0) {
      const size_t bytes = kWorkspaceBytes;
      error = s_.set_preference(preference, kMostWorkspace, &bytes, sizeof bytes);
    }
    Choice choice = {};
    int found = 0;
    if (error == 0) {
      error = s_.choose(s_.handle, product_, w_, x_, y_, y_, preference, 1, &choice, &found);
    }
    if (preference != nullptr) s_.destroy_preference(preference);
    if (error != 0 || found == 0) {
      return Status(
          Code::unsupported,
          fmt::format("cuBLASLt has no e4m3 product of {} x {} x {}: error {}", m, n, k, error));
    }
    algorithm_ = choice.algorithm;
    return {};
  }
  Status multiply(const void* x, const void* w, void* y, cudaStream_t stream) const override {
    const float one = 1, zero = 0;
    const int error =
        s_.multiply(s_.handle, product_, &one, w, w_, x, x_, &zero, y, y_, y, y_, &algorithm_,
                    s_.workspace.template as<>(), s_.workspace.bytes(), stream);
    return error == 0 ? Status()
                      : Status(Code::io_error, fmt::format("cublasLtMatmul: error {}", error));
  }

 private:
  State& s_;
  Handle product_ = nullptr, w_ = nullptr, x_ = nullptr, y_ = nullptr;
  Algorithm algorithm_ = {};
};

}  // namespace

Result<std::unique_ptr<CublasFp8::Product>> CublasFp8::plan(int64_t m, int64_t n, int64_t k) {
  auto product = std::make_unique<LtProduct<State>>(*state_);
  NIBBLE_TRY(product->prepare(m, n, k));
  return std::unique_ptr<Product>(std::move(product));
}

}  // namespace nibble::cli
