// What the parts of `bench gemm --device cuda` pass to each other: what one point of the grid gave
// (bench_gemm_cuda_contest.cc), and how it is shown (bench_gemm_cuda_report.cc).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench_gemm.h"
#include "cuda_bench.h"
#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cli {

/// One line of the result: a contestant at one M.
struct CudaRow {
  std::string kernel, mode;  // of a peer's type: its label in place of a mode
  std::string plan;          // of ours; of a peer, what it chose among, if it says
  Side side = Side::baseline;
  std::string type, activations;  // of a peer: its type, and what that multiplies with
  bool product_alone = true;      // without quantizing x
  int64_t m = 0, n = 0, k = 0, group_size = 0;
  double bytes = 0;  // the least that must be read and written
  Samples samples;
  double read_us = 0;  // of the packed weights alone, in the same rounds
  double watts = 0, sm_mhz = 0;
  double bits_per_weight = 0, product_error = 0;  // of a peer's type

  double tops() const {
    return 2.0 * static_cast<double>(m * n) * static_cast<double>(k) / samples.median() * 1e-6;
  }
  double gb_per_s() const { return bytes / samples.median() * 1e-3; }
};

struct CudaBench {
  std::vector<CudaRow> rows;
  std::vector<GemmVersus> versus;
  std::vector<GemmLook> looks;
  nlohmann::json peers = nlohmann::json::array();  // what they say of themselves
};

/// The problem that is timed for a mode: x and y of bf16.
Problem bench_problem(const GemmBenchOptions& options, Mode mode, int64_t m,
                      const AwqTensors& weight);

/// What a peer's type would be called here: "w4a8", "w4a8-fp8", "w4a16"; empty if it does not say.
std::string mode_of_activations(const std::string& activations);

/// To stdout as options.output says, and to options.json_file.
Status print_cuda_bench(const GemmBenchOptions& options, const cuda::DeviceInfo& device,
                        const DeviceMonitor& monitor, const CudaBench& bench,
                        const std::vector<std::string>& failures);

/// The head of every JSON document about a GPU.
nlohmann::json cuda_header_json(const cuda::DeviceInfo& device, const DeviceMonitor& monitor);
/// The same in a line or two for people.
std::string cuda_header_text(const cuda::DeviceInfo& device, const DeviceMonitor& monitor);

}  // namespace nibble::cli
