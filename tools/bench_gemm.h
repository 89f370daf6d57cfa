// What the parts of `bench gemm` pass to each other: what is asked (bench_gemm.cc), what one point
// of the grid gave (bench_gemm_contest.cc), and how it is shown (bench_gemm_report.cc).
#pragma once

#include <string>
#include <vector>

#include "format/linear_format.h"
#include "gemm/cpu/packed_weights.h"
#include "gemm/ref.h"
#include "peer_team.h"
#include "probe_memory.h"
#include "timing.h"

namespace nibble::cli {

struct GemmBenchOptions {
  std::vector<int64_t> m = {1, 8, 64, 512}, n = {4096}, k = {4096};
  int64_t group_size = 128;
  std::vector<std::string> modes = {"w4a16", "w4a8", "w4a4"}, kernels;
  std::string isa;  // empty: no limit
  std::string activations = "token", output = "md", json_file;
  bool symmetric = false;  // w4a4
  std::vector<std::string> peers;
  int peer_types = 3;
  double peer_timeout = 300;
  int threads = 0;
  double seconds = 2.0;
  bool no_baseline = false, explain = false;
  bool plans = false;  // --device cuda: every plan that there is against the one that is chosen
  std::string device = "cpu", cublas;  // cublas: path of the library, or empty

  int used_threads() const;
};

/// One weight in all forms.
struct GemmShape {
  AwqTensors tensors;
  ref::Weights reference;
  PackedWeights packed;
};

enum class Side { ours, baseline, peer };

/// One line of the result: a contestant at one M.
struct GemmRow {
  std::string kernel, mode;
  Side side = Side::ours;
  int64_t m = 0, n = 0, k = 0, group_size = 0;
  size_t bytes = 0;  // the least that must be read and written
  Samples samples;
  double read_gb_per_s = 0;  // these three measured in the same rounds; 0: not measured
  double peak_tops = 0;      // of the kernel's instruction set
  double best_baseline_us = 0;
  double bits_per_weight = 0, weight_error = 0, product_error = 0;  // of a peer's type

  double tops() const { return 2.0 * m * n * k / samples.median() * 1e-6; }
  double gb_per_s() const { return static_cast<double>(bytes) / samples.median() * 1e-3; }
  double roofline_share() const { return read_gb_per_s > 0 ? gb_per_s() / read_gb_per_s : 0; }
  double peak_share() const { return peak_tops > 0 ? tops() / peak_tops : 0; }
};

/// One of our kernels against a type of one peer, the best unless it says otherwise; ratios are the
/// peer's time over ours.
struct GemmVersus {
  std::string kernel, mode, peer, type;
  std::string candidate;  // of what the peer chose among, if it says
  int64_t m = 0, n = 0, k = 0;
  double our_us = 0, peer_us = 0;
  Samples ratios;  // round by round

  double ratio_of_medians() const { return peer_us / our_us; }
};

/// What one round's probes say of the machine while one M was measured.
struct GemmLimits {
  struct Peak {
    std::string loop;
    Samples tops;
  };
  int64_t m = 0, n = 0, k = 0;
  double clock_ghz = 0;  // 0: not measured
  Samples read_gb_per_s;
  std::vector<Peak> peaks;
};

/// A peer's type that was looked at, at one M.
struct GemmLook {
  std::string peer, type;
  int64_t m = 0, n = 0, k = 0;
  double us = 0;
  AfterLook after = AfterLook::slower;
};

struct GemmBench {
  std::vector<GemmRow> rows;
  std::vector<GemmVersus> versus;
  std::vector<GemmLimits> limits;
  std::vector<GemmLook> looks;
  nlohmann::json peers = nlohmann::json::array();  // what they say of themselves
};

/// Measures one M and adds what it gave. A result of ours or of a baseline that is wrong goes to
/// `mismatch`, and nothing is timed.
Status measure_gemm(const GemmBenchOptions& options, const GemmShape& shape, int64_t m,
                    PeerTeam& peers, ReadBandwidthProbe& probe, GemmBench& bench,
                    std::string& mismatch);

/// What no device takes; a group size of -1 stands for K.
Status check_bench_shape(int64_t n, int64_t k, int64_t group_size);

/// Puts the document at `path`, whole or not at all.
Status write_bench_json(const std::string& path, const nlohmann::json& document);

nlohmann::json gemm_bench_json(const GemmBench& bench, const std::vector<std::string>& failures);
/// To stdout, as options.output says.
void print_gemm_bench(const GemmBenchOptions& options, const GemmBench& bench,
                      const std::vector<std::string>& failures);

}  // namespace nibble::cli
