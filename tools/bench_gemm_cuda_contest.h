// One point of `bench gemm --device cuda`: the contestants at one shape and M are set up, checked,
// timed in turn, and compared.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bench_gemm_cuda_rows.h"
#include "cublas_fp8.h"
#include "cuda_kernel_run.h"
#include "cuda_weights.h"
#include "gemm/cuda/cublas.h"
#include "peer_team.h"

namespace nibble::cli {

/// What of cuBLAS could be opened.
struct CudaBaselines {
  std::unique_ptr<cuda::Cublas> cublas;
  std::unique_ptr<CublasFp8> fp8;

  /// Says on stderr what is missing.
  CudaBaselines(const GemmBenchOptions& options, const cuda::DeviceInfo& device);
};

/// Everything must outlive it.
class CudaContest {
 public:
  CudaContest(const GemmBenchOptions& o, const cuda::DeviceInfo& device, const ColdWeights& weights,
              int64_t m)
      : o_(o), device_(device), weights_(weights), m_(m), sink_(16) {}

  /// What is wrong of one of them goes to `mismatch`; then nothing should be timed.
  Status add_kernels(const SampledColumns& sample, std::string& mismatch);
  void add_baselines(const CudaBaselines& baselines);
  /// After add_kernels(), whose x they get. What fails is kept by `peers`.
  Status add_peers(PeerTeam& peers, CudaBench& bench);
  void measure(const DeviceMonitor& monitor, CudaBench& bench);

 private:
  using Launch = std::function<void(int64_t, cudaStream_t)>;
  CudaRow row(const std::string& kernel, const std::string& mode, Side side) const;
  void add(CudaRow row, int64_t copies, Launch launch);
  void add_kernel(const CudaKernelRun& run);
  void add_dense(cuda::Cublas& cublas, cuda::Cublas::Type type, const char* name);
  void add_fp8(CublasFp8& cublas);

  const GemmBenchOptions& o_;
  const cuda::DeviceInfo& device_;
  const ColdWeights& weights_;
  int64_t m_;
  DeviceMemory sink_;
  std::vector<std::unique_ptr<CudaKernelRun>> runs_;
  std::vector<DeviceMemory> dense_;
  std::unique_ptr<CublasFp8::Product> fp8_;
  std::vector<PeerEntry> entries_;
  std::string x_path_;
  std::vector<CudaRow> rows_;
  std::vector<DeviceContender> contenders_;  // one for each
};

}  // namespace nibble::cli
