// nibble bench gemm --device cuda: the kernels that are planned (or named) over a grid of shapes,
// beside cuBLAS, a kernel that only reads the same bytes, and other libraries, in turn.
#include "bench_gemm_cuda.h"

#include <fmt/format.h>

#include "bench_gemm_cuda_contest.h"
#include "bench_gemm_cuda_sweep.h"
#include "cli.h"

namespace nibble::cli {
namespace {

using cuda::DeviceInfo;

/// What stays the same over the grid.
struct Grid {
  const GemmBenchOptions& o;
  const DeviceInfo& device;
  const DeviceMonitor& monitor;
  const CudaBaselines& baselines;
  PeerTeam& peers;
};

/// All M of one shape.
Status measure_shape(const Grid& grid, int64_t n, int64_t k, CudaBench& bench,
                     std::string& mismatch) {
  const GemmBenchOptions& o = grid.o;
  NIBBLE_TRY(check_bench_shape(n, k, o.group_size));
  const int64_t group_size = o.group_size == -1 ? k : o.group_size;
  const Result<ColdWeights> weights = make_cold_weights(grid.device, n, k, group_size);
  if (!weights.ok()) return weights.status();
  const SampledColumns sample = sample_columns(weights->tensors);
  NIBBLE_TRY(grid.peers.prepare(weights->tensors, sample.weights, sample.columns));
  for (const int64_t m : o.m) {
    CudaContest contest(o, grid.device, *weights, m);
    NIBBLE_TRY(contest.add_kernels(sample, mismatch));
    if (!mismatch.empty()) return {};
    contest.add_baselines(grid.baselines);
    NIBBLE_TRY(contest.add_peers(grid.peers, bench));
    contest.measure(grid.monitor, bench);
    if (interrupted()) return Status(Code::interrupted, "interrupted");
  }
  return {};
}

Status measure_grid(const Grid& grid, CudaBench& bench, std::string& mismatch) {
  for (const int64_t n : grid.o.n) {
    for (const int64_t k : grid.o.k) {
      NIBBLE_TRY(measure_shape(grid, n, k, bench, mismatch));
      if (!mismatch.empty()) return {};
    }
  }
  return {};
}

}  // namespace

int run_cuda_gemm_bench(const GemmBenchOptions& o) {
  const Result<DeviceInfo> device = cuda::device_info(0);
  if (!device.ok()) return fail(device.status());
  const DeviceMonitor monitor(device->ordinal);
  if (o.plans) return run_cuda_plan_sweep(o, *device, monitor);
  const Result<std::vector<PeerSpec>> specs = parse_peers(o.peers);
  if (!specs.ok()) return fail(specs.status());
  PeerTeam peers(*specs, o.device, o.used_threads(), o.peer_timeout);
  CudaBench bench;
  for (const auto& peer : peers.peers()) {
    bench.peers.push_back({{"label", peer->label()}, {"about", peer->about()}});
  }
  const CudaBaselines baselines(o, *device);
  std::string mismatch;
  const Status status = measure_grid({o, *device, monitor, baselines, peers}, bench, mismatch);
  if (!status.ok()) return fail(status);
  if (!mismatch.empty()) {
    fmt::print(stderr, "nibble: check failed: {}\n", mismatch);
    return kExitFailed;
  }
  const Status written = print_cuda_bench(o, *device, monitor, bench, peers.failures());
  if (!written.ok()) return fail(written);
  std::fflush(stdout);
  for (const std::string& failure : peers.failures()) {
    fmt::print(stderr, "nibble: error: {}\n", failure);
  }
  return peers.failures().empty() ? kExitOk : kExitFailed;
}

}  // namespace nibble::cli
