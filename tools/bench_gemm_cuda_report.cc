// What `bench gemm --device cuda` prints: tables for people, CSV, JSON.
#include <fmt/format.h>

#include "bench_gemm_cuda_rows.h"
#include "bench_gemm_tables.h"
#include "cli.h"
#include "text.h"

namespace nibble::cli {
namespace {

using cuda::DeviceInfo;
using nlohmann::json;

json to_json(const CudaRow& row, const DeviceInfo& device) {
  const bool ours = row.side == Side::ours;
  json result = {{"mode", row.mode},
                 {"device", device.name},
                 {"m", row.m},
                 {"n", row.n},
                 {"k", row.k},
                 {"group_size", row.group_size},
                 {"us_median", row.samples.median()},
                 {"us_min", row.samples.min()},
                 {"samples_us", row.samples.microseconds},
                 {"tops", row.tops()},
                 {"read_us", row.read_us},
                 {"watts", row.watts},
                 {"sm_mhz", row.sm_mhz},
                 {"checked", row.side != Side::baseline}};
  result[ours ? "kernel" : "peer"] = row.kernel;
  result["plan"] = row.plan.empty() ? json(nullptr) : json(row.plan);
  result["gb_per_s"] = ours ? json(row.gb_per_s()) : json(nullptr);
  // the time of reading the packed weights over the time taken
  result["roofline_share"] = ours ? json(row.read_us / row.samples.median()) : json(nullptr);
  if (row.side == Side::peer) {
    result["bits_per_weight"] = row.bits_per_weight;
    result["product_error"] = row.product_error;
    result["activations"] = row.activations;
  }
  return result;
}

void print_rows(const std::vector<CudaRow>& rows, bool csv) {
  print_head({"kernel", "mode", "M", "N", "K", "g", "us", "min", "TOPS", "GB/s", "over read", "W"},
             csv);
  for (const CudaRow& r : rows) {
    const double us = r.samples.median();
    print_line({printable_text(r.kernel), r.mode, std::to_string(r.m), std::to_string(r.n),
                std::to_string(r.k), std::to_string(r.group_size), fmt::format("{:.2f}", us),
                fmt::format("{:.2f}", r.samples.min()), fmt::format("{:.1f}", r.tops()),
                r.side == Side::ours ? fmt::format("{:.0f}", r.gb_per_s()) : "-",
                fmt::format("{:.2f}x", us / r.read_us), fmt::format("{:.0f}", r.watts)},
               csv);
  }
}

/// The largest error of y of each peer's type, over all points.
void print_errors(const std::vector<CudaRow>& rows) {
  std::vector<const CudaRow*> types;
  for (const CudaRow& row : rows) {
    if (row.side != Side::peer) continue;
    const CudaRow** known = nullptr;
    for (const CudaRow*& type : types) {
      if (type->kernel == row.kernel) known = &type;
    }
    if (known == nullptr) {
      types.push_back(&row);
    } else if (row.product_error > (*known)->product_error) {
      *known = &row;
    }
  }
  fmt::print("\nLargest error of y against fp64 on the checkpoint's weight\n\n");
  print_head({"peer", "bits per weight", "error of y", "tolerance"}, false);
  for (const CudaRow* type : types) {
    print_line({printable_text(type->kernel), fmt::format("{:.2f}", type->bits_per_weight),
                fmt::format("{:.2f} %", 100 * type->product_error),
                fmt::format("{:.2f} %", 100 * peer_tolerance(type->k, type->activations))},
               false);
  }
}

}  // namespace

std::string mode_of_activations(const std::string& activations) {
  if (activations == "int8") return mode_name(Mode::w4a8);
  if (activations == "e4m3") return mode_name(Mode::w4a8_fp8);
  return activations == "16bit" ? mode_name(Mode::w4a16) : "";
}

json cuda_header_json(const DeviceInfo& device, const DeviceMonitor& monitor) {
  const DeviceMonitor::Reading now = monitor.read();
  json header = report_header();
  header["device"] = device.name;
  const std::string driver = monitor.driver();
  header["driver"] = driver.empty() ? json(nullptr) : json(driver);
  header["gpu"] = {{"capability", device.capability},
                   {"multiprocessors", device.multiprocessors},
                   {"l2_bytes", device.l2_bytes},
                   {"memory_bytes", device.memory_bytes},
                   {"sm_mhz", now.sm_mhz},
                   {"memory_mhz", now.memory_mhz},
                   {"watts", now.watts},
                   {"limit_watts", now.limit_watts},
                   {"celsius", now.celsius}};
  return header;
}

std::string cuda_header_text(const DeviceInfo& device, const DeviceMonitor& monitor) {
  const DeviceMonitor::Reading now = monitor.read();
  return fmt::format(
      "{}, compute capability {}.{}, driver {}; at the end SM {:.0f} MHz, memory {:.0f} MHz, "
      "{:.0f} of {:.0f} W, {:.0f} C\n",
      device.name, device.capability / 10, device.capability % 10, monitor.driver(), now.sm_mhz,
      now.memory_mhz, now.watts, now.limit_watts, now.celsius);
}

Status print_cuda_bench(const GemmBenchOptions& o, const DeviceInfo& device,
                        const DeviceMonitor& monitor, const CudaBench& bench,
                        const std::vector<std::string>& failures) {
  constexpr auto kReplace = json::error_handler_t::replace;
  json document = cuda_header_json(device, monitor);
  document["results"] = json::array();
  for (const CudaRow& row : bench.rows) document["results"].push_back(to_json(row, device));
  if (!bench.peers.empty() || !failures.empty()) {
    add_peers_json(document, bench.peers, bench.versus, bench.looks, failures);
  }
  if (o.output == "json") {
    fmt::print("{}\n", document.dump(1, ' ', false, kReplace));
  } else if (o.output == "jsonl") {
    for (const json& row : document["results"]) {
      fmt::print("{}\n", row.dump(-1, ' ', false, kReplace));
    }
  } else if (o.output == "csv") {
    print_rows(bench.rows, true);
  } else {
    fmt::print("{}", cuda_header_text(device, monitor));
    print_peers(bench.peers);
    fmt::print(
        "weights cold; us = median of interleaved rounds; over read: against a kernel that only "
        "reads the packed weights\n\n");
    print_rows(bench.rows, false);
    if (!bench.versus.empty()) {
      print_versus(bench.versus,
                   "Each peer's type with the same activations, and its fastest of all");
      print_errors(bench.rows);
    }
    print_looks(bench.looks);
  }
  return o.json_file.empty() ? Status{} : write_bench_json(o.json_file, document);
}

}  // namespace nibble::cli
