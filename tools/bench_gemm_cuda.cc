// nibble bench gemm --device cuda: the kernels that are planned (or named) over a grid of shapes,
// beside cuBLAS and a kernel that only reads the same bytes, in turn. Weights are random and rotate
// through more copies than L2 holds; each sample is a CUDA graph of many launches; results are
// compared with the oracle on sampled rows and columns before anything is timed.
#include "bench_gemm_cuda.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <random>

#include "cli.h"
#include "cublas_fp8.h"
#include "cuda_bench.h"
#include "cuda_oracle.h"
#include "cuda_probe.h"
#include "cuda_weights.h"
#include "gemm/cuda/cublas.h"
#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cli {
namespace {

using cuda::Cublas;
using cuda::DeviceInfo;
using cuda::DeviceWeights;
using nlohmann::json;

constexpr uint64_t kSeed = 1;

struct CudaRow {
  std::string kernel, mode, plan;
  bool ours = false;
  int64_t m = 0, n = 0, k = 0, group_size = 0;
  double bytes = 0;  // the least that must be read and written
  Samples samples;
  double read_us = 0;  // of the packed weights alone, in the same rounds
  double watts = 0, sm_mhz = 0;

  double tops() const {
    return 2.0 * static_cast<double>(m * n) * static_cast<double>(k) / samples.median() * 1e-6;
  }
  double gb_per_s() const { return bytes / samples.median() * 1e-3; }
};

/// Some columns of a weight: 8 from each of up to 16 places.
struct Sample {
  std::vector<int64_t> words;  // of 8 columns
  AwqTensors tensors;
};

Sample sample_columns(const AwqTensors& all) {
  Sample sample;
  const int64_t words = all.n / 8, count = std::min<int64_t>(words, 16);
  for (int64_t i = 0; i < count; ++i) {
    sample.words.push_back(count == 1 ? 0 : i * (words - 1) / (count - 1));
  }
  AwqTensors& t = sample.tensors;
  t.k = all.k;
  t.n = 8 * count;
  t.group_size = all.group_size;
  t.scale_dtype = all.scale_dtype;
  for (int64_t k = 0; k < all.k; ++k) {
    for (const int64_t word : sample.words) t.qweight.push_back(all.qweight[k * words + word]);
  }
  for (int64_t g = 0; g < all.k / all.group_size; ++g) {
    for (const int64_t word : sample.words) {
      t.qzeros.push_back(all.qzeros[g * words + word]);
      for (int64_t c = 0; c < 8; ++c) t.scales.push_back(all.scales[g * all.n + word * 8 + c]);
    }
  }
  return sample;
}

/// Everything one kernel needs at one M.
struct KernelRun {
  cuda::Plan plan;
  DeviceMemory x, y, workspace;

  explicit KernelRun(const cuda::Plan& p)
      : plan(p),
        x(static_cast<size_t>(p.problem.m * p.problem.k * 2)),
        y(static_cast<size_t>(p.problem.m * p.problem.n * 2)),
        workspace(p.workspace_bytes) {
    check_cuda(launch_fill_normal(x.as<>(), p.problem.m * p.problem.k, kSeed, true, nullptr), "x");
    check_cuda(cudaDeviceSynchronize(), "x");
  }

  Status whole(const DeviceWeights& weights, cudaStream_t stream) const {
    return cuda::run_gemm(plan, {x.as<>(), plan.problem.k}, weights, y.as<>(), plan.problem.n,
                          workspace.as<>(), stream);
  }
  Status product(const DeviceWeights& weights, cudaStream_t stream) const {
    return cuda::run_gemm_quantized(plan, cuda::workspace_operand(plan, workspace.as<>()), weights,
                                    y.as<>(), plan.problem.n, workspace.as<>(), stream);
  }
};

template <class T>
std::vector<T> download(const DeviceMemory& from, int64_t offset, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  check_cuda(cudaMemcpy(values.data(), from.as<T>() + offset, values.size() * sizeof(T),
                        cudaMemcpyDeviceToHost),
             "cudaMemcpy");
  return values;
}

/// Empty, or how one row of the result differs from the oracle by more than rounding can do.
std::string check_row(const KernelRun& run, const Sample& sample, const ref::Weights& weights,
                      int64_t row) {
  const Problem& p = run.plan.problem;
  const auto x = download<uint16_t>(run.x, row * p.k, p.k);
  const auto y = download<uint16_t>(run.y, row * p.n, p.n);
  std::vector<int64_t> columns;
  for (const int64_t word : sample.words) {
    for (int64_t c = 0; c < 8; ++c) columns.push_back(word * 8 + c);
  }
  return compare_cuda_row(run.plan, weights, x.data(), y.data(), columns, nullptr, row);
}

std::string check_kernel(const KernelRun& run, const Sample& sample, const ref::Weights& weights) {
  const int64_t m = run.plan.problem.m, count = std::min<int64_t>(m, 4);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = count == 1 ? 0 : i * (m - 1) / (count - 1);
    if (std::string text = check_row(run, sample, weights, row); !text.empty()) return text;
  }
  return "";
}

/// What is timed at one point of the grid.
class Point {
 public:
  Point(const GemmBenchOptions& o, const DeviceInfo& device, const ColdWeights& weights, int64_t m)
      : o_(o), device_(device), weights_(weights), m_(m), sink_(16) {}

  Status add_kernels(const Sample& sample, const ref::Weights& reference, std::string& mismatch);
  void add_cublas(Cublas& cublas);
  void add_fp8(CublasFp8& cublas);
  void measure(const DeviceMonitor& monitor, std::vector<CudaRow>& rows);

 private:
  Problem problem(Mode mode) const {
    return {.m = m_,
            .n = weights_.tensors.n,
            .k = weights_.tensors.k,
            .group_size = weights_.tensors.group_size,
            .mode = mode,
            .x_dtype = Dtype::bf16,
            .y_dtype = Dtype::bf16,
            .granularity = mode == Mode::w4a16 ? Granularity::token
                                               : granularities_by_name().at(o_.activations),
            .symmetric = mode != Mode::w4a4 || o_.symmetric};
  }
  void add(const std::string& kernel, const std::string& mode, const cuda::Plan* plan,
           int64_t copies, std::function<void(int64_t, cudaStream_t)> launch);
  void add_dense(Cublas& cublas, Cublas::Type type, const char* name);

  const GemmBenchOptions& o_;
  const DeviceInfo& device_;
  const ColdWeights& weights_;
  int64_t m_;
  DeviceMemory sink_;
  std::vector<std::unique_ptr<KernelRun>> runs_;
  std::vector<DeviceMemory> dense_;
  std::unique_ptr<CublasFp8::Product> fp8_;
  std::vector<CudaRow> rows_;
  std::vector<DeviceContender> contenders_;
};

void Point::add(const std::string& kernel, const std::string& mode, const cuda::Plan* plan,
                int64_t copies, std::function<void(int64_t, cudaStream_t)> launch) {
  CudaRow row;
  row.kernel = kernel;
  row.mode = mode;
  row.plan = plan == nullptr ? "" : plan->describe();
  row.ours = plan != nullptr;
  row.m = m_;
  row.n = weights_.tensors.n;
  row.k = weights_.tensors.k;
  row.group_size = weights_.tensors.group_size;
  const int64_t x_bytes = mode == mode_name(Mode::w4a16) ? 2 : 1;  // of an element
  row.bytes =
      static_cast<double>(weights_.copies[0].bytes() + x_bytes * m_ * row.k + 2 * m_ * row.n);
  rows_.push_back(row);
  contenders_.push_back({kernel, std::move(launch), copies});
}

void check_status(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

Status Point::add_kernels(const Sample& sample, const ref::Weights& reference,
                          std::string& mismatch) {
  std::vector<std::pair<Mode, const char*>> wanted;
  for (const std::string& mode : o_.modes) {
    const Mode value = modes_by_name().at(mode);
    for (const std::string& name : o_.kernels) wanted.emplace_back(value, name.c_str());
    if (o_.kernels.empty()) wanted.emplace_back(value, nullptr);
  }
  const auto copies = static_cast<int64_t>(weights_.copies.size());
  for (const auto& [mode, name] : wanted) {
    const Result<cuda::Plan> plan = cuda::plan_gemm(problem(mode), device_, name);
    if (!plan.ok() && wanted.size() > 1 && plan.status().code() == Code::unsupported) {
      fmt::print(stderr, "nibble: left out: {}\n", plan.status().message());
      continue;
    }
    if (!plan.ok()) return plan.status();
    if (o_.explain) fmt::print(stderr, "{}\n", plan->describe());
    runs_.push_back(std::make_unique<KernelRun>(*plan));
    const KernelRun& run = *runs_.back();
    NIBBLE_TRY(run.whole(weights_.copies[0], nullptr));
    check_cuda(cudaDeviceSynchronize(), plan->kernel_name());
    mismatch = check_kernel(run, sample, reference);
    if (!mismatch.empty()) {
      mismatch = fmt::format("{}: {}", plan->describe(), mismatch);
      return {};
    }
    const auto& weights = weights_.copies;
    const bool quantizes = mode != Mode::w4a16;
    if (quantizes) {
      add(plan->kernel_name(), mode_name(mode), &*plan, copies,
          [&run, &weights, copies](int64_t i, cudaStream_t stream) {
            check_status(run.product(weights[i % copies], stream));
          });
    }
    add(fmt::format("{}{}", quantizes ? "quantize + " : "", plan->kernel_name()), mode_name(mode),
        &*plan, copies, [&run, &weights, copies](int64_t i, cudaStream_t stream) {
          check_status(run.whole(weights[i % copies], stream));
        });
  }
  const int64_t bytes = weights_.copies[0].layout().bytes();
  add("read", "read", nullptr, copies, [this, bytes, copies](int64_t i, cudaStream_t stream) {
    check_cuda(launch_read(weights_.copies[i % copies].slabs(), bytes, sink_.as<uint32_t>(),
                           device_.multiprocessors, stream),
               "read");
  });
  return {};
}

void Point::add_dense(Cublas& cublas, Cublas::Type type, const char* name) {
  const int64_t n = weights_.tensors.n, k = weights_.tensors.k;
  const int64_t element = type == Cublas::Type::f16 ? 2 : 1, bytes = n * k * element;
  const int64_t copies = (kColdBytes + bytes - 1) / bytes;
  dense_.emplace_back(static_cast<size_t>(bytes * copies));
  const auto* w = dense_.back().as<const std::byte>();
  dense_.emplace_back(static_cast<size_t>(m_ * k * element));
  void* x = dense_.back().as<>();
  dense_.emplace_back(static_cast<size_t>(m_ * n * 4));
  void* y = dense_.back().as<>();
  if (type == Cublas::Type::f16) {
    check_cuda(launch_fill_normal(const_cast<std::byte*>(w), n * k * copies, kSeed, false, nullptr),
               name);
    check_cuda(launch_fill_normal(x, m_ * k, kSeed, false, nullptr), name);
  } else {
    check_cuda(launch_fill_words(const_cast<std::byte*>(w), bytes * copies, kSeed, nullptr), name);
    check_cuda(launch_fill_words(x, m_ * k, kSeed, nullptr), name);
  }
  const bool works = cublas.multiply(type, x, w, y, n, m_, n, k, nullptr).ok();
  check_cuda(cudaDeviceSynchronize(), name);
  if (!works) return;  // int8 wants M in multiples of 4
  add(name, "matmul only", nullptr, copies,
      [&cublas, type, x, w, y, n, k, bytes, copies, this](int64_t i, cudaStream_t stream) {
        const Status status =
            cublas.multiply(type, x, w + i % copies * bytes, y, n, m_, n, k, stream);
        if (!status.ok()) throw std::runtime_error(status.message());
      });
}

void Point::add_cublas(Cublas& cublas) {
  dense_.reserve(9);
  add_dense(cublas, Cublas::Type::f16, "cublas-f16");
  add_dense(cublas, Cublas::Type::int8, "cublas-int8");
}

void Point::add_fp8(CublasFp8& cublas) {
  constexpr uint32_t kBelow2 = 0xbfbfbfbfu;  // e4m3 without the exponent's first bit: no NaN
  const int64_t n = weights_.tensors.n, k = weights_.tensors.k, bytes = n * k;
  const int64_t copies = (kColdBytes + bytes - 1) / bytes;
  Result<std::unique_ptr<CublasFp8::Product>> product = cublas.plan(m_, n, k);
  if (!product.ok()) {
    fmt::print(stderr, "nibble: left out: {}\n", product.status().message());
    return;
  }
  fp8_ = std::move(*product);
  dense_.emplace_back(static_cast<size_t>(bytes * copies));
  auto* w = dense_.back().as<std::byte>();
  dense_.emplace_back(static_cast<size_t>(m_ * k));
  void* x = dense_.back().as<>();
  dense_.emplace_back(static_cast<size_t>(m_ * n * 2));
  void* y = dense_.back().as<>();
  check_cuda(launch_fill_words(w, bytes * copies, kSeed, nullptr, kBelow2), "cublas-fp8");
  check_cuda(launch_fill_words(x, m_ * k, kSeed, nullptr, kBelow2), "cublas-fp8");
  add("cublas-fp8", "matmul only", nullptr, copies,
      [this, x, w, y, bytes, copies](int64_t i, cudaStream_t stream) {
        check_status(fp8_->multiply(x, w + i % copies * bytes, y, stream));
      });
}

void Point::measure(const DeviceMonitor& monitor, std::vector<CudaRow>& rows) {
  Samples watts, clock;
  time_on_device(contenders_, o_.seconds, [&] {
    const DeviceMonitor::Reading now = monitor.read();
    watts.microseconds.push_back(now.watts);
    clock.microseconds.push_back(now.sm_mhz);
  });
  double read_us = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].mode == "read") read_us = contenders_[i].samples.median();
  }
  for (size_t i = 0; i < rows_.size(); ++i) {
    rows_[i].samples = contenders_[i].samples;
    rows_[i].read_us = read_us;
    rows_[i].watts = watts.median();
    rows_[i].sm_mhz = clock.median();
    rows.push_back(std::move(rows_[i]));
  }
}

// ---- output -------------------------------------------------------------------------------------

json to_json(const CudaRow& row, const DeviceInfo& device) {
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
                 {"checked", row.ours}};
  result[row.ours ? "kernel" : "peer"] = row.kernel;
  result["plan"] = row.ours ? json(row.plan) : json(nullptr);
  result["gb_per_s"] = row.ours ? json(row.gb_per_s()) : json(nullptr);
  // the time of reading the packed weights over the time taken
  result["roofline_share"] = row.ours ? json(row.read_us / row.samples.median()) : json(nullptr);
  return result;
}

json header_json(const DeviceInfo& device, const DeviceMonitor& monitor) {
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

void print_rows(const std::vector<CudaRow>& rows, bool csv) {
  const char* separator = csv ? "," : " | ";
  const auto line = [&](const std::vector<std::string>& cells) {
    const std::string text = fmt::format("{}", fmt::join(cells, separator));
    fmt::print("{}\n", csv ? text : "| " + text + " |");
  };
  line({"kernel", "mode", "M", "N", "K", "g", "us", "min", "TOPS", "GB/s", "over read", "W"});
  if (!csv) fmt::print("|---|---|---|---|---|---|---|---|---|---|---|---|\n");
  for (const CudaRow& r : rows) {
    const double us = r.samples.median();
    line({r.kernel, r.mode, std::to_string(r.m), std::to_string(r.n), std::to_string(r.k),
          std::to_string(r.group_size), fmt::format("{:.2f}", us),
          fmt::format("{:.2f}", r.samples.min()), fmt::format("{:.1f}", r.tops()),
          r.ours ? fmt::format("{:.0f}", r.gb_per_s()) : "-",
          fmt::format("{:.2f}x", us / r.read_us), fmt::format("{:.0f}", r.watts)});
  }
}

Status print_all(const GemmBenchOptions& o, const DeviceInfo& device, const DeviceMonitor& monitor,
                 const std::vector<CudaRow>& rows) {
  constexpr auto kReplace = json::error_handler_t::replace;
  json document = header_json(device, monitor);
  document["results"] = json::array();
  for (const CudaRow& row : rows) document["results"].push_back(to_json(row, device));
  if (o.output == "json") {
    fmt::print("{}\n", document.dump(1, ' ', false, kReplace));
  } else if (o.output == "jsonl") {
    for (const json& row : document["results"]) {
      fmt::print("{}\n", row.dump(-1, ' ', false, kReplace));
    }
  } else {
    if (o.output == "md") {
      const DeviceMonitor::Reading now = monitor.read();
      fmt::print(
          "{}, compute capability {}.{}, driver {}; at the end SM {:.0f} MHz, memory {:.0f} MHz, "
          "{:.0f} of {:.0f} W, {:.0f} C\nweights cold; us = median of interleaved rounds; over "
          "read: against a kernel that only reads the packed weights\n\n",
          device.name, device.capability / 10, device.capability % 10, monitor.driver(), now.sm_mhz,
          now.memory_mhz, now.watts, now.limit_watts, now.celsius);
    }
    print_rows(rows, o.output == "csv");
  }
  return o.json_file.empty() ? Status{} : write_bench_json(o.json_file, document);
}

/// What of cuBLAS could be opened.
struct Baselines {
  std::unique_ptr<Cublas> cublas;
  std::unique_ptr<CublasFp8> fp8;

  Baselines(const GemmBenchOptions& o, const DeviceInfo& device) {
    if (o.no_baseline) return;
    keep(Cublas::open(device, o.cublas), cublas);
    if (device.capability >= 89) keep(CublasFp8::open(o.cublas), fp8);  // which has e4m3
  }

 private:
  template <class T>
  static void keep(Result<std::unique_ptr<T>> opened, std::unique_ptr<T>& to) {
    if (opened.ok()) {
      to = std::move(*opened);
    } else {
      fmt::print(stderr, "nibble: without a baseline: {}\n", opened.status().message());
    }
  }
};

/// All M of one shape.
Status measure_shape(const GemmBenchOptions& o, const DeviceInfo& device,
                     const Baselines& baselines, const DeviceMonitor& monitor, int64_t n, int64_t k,
                     std::vector<CudaRow>& rows, std::string& mismatch) {
  NIBBLE_TRY(check_bench_shape(n, k, o.group_size));
  const int64_t group_size = o.group_size == -1 ? k : o.group_size;
  const Result<ColdWeights> weights = make_cold_weights(device, n, k, group_size);
  if (!weights.ok()) return weights.status();
  const Sample sample = sample_columns(weights->tensors);
  const ref::Weights reference = ref::unpack(sample.tensors.view());
  for (const int64_t m : o.m) {
    Point point(o, device, *weights, m);
    NIBBLE_TRY(point.add_kernels(sample, reference, mismatch));
    if (!mismatch.empty()) return {};
    if (baselines.cublas != nullptr) point.add_cublas(*baselines.cublas);
    if (baselines.fp8 != nullptr) point.add_fp8(*baselines.fp8);
    point.measure(monitor, rows);
    if (interrupted()) return Status(Code::interrupted, "interrupted");
  }
  return {};
}

}  // namespace

int run_cuda_gemm_bench(const GemmBenchOptions& options) {
  const Result<DeviceInfo> device = cuda::device_info(0);
  if (!device.ok()) return fail(device.status());
  const DeviceMonitor monitor(device->ordinal);
  const Baselines baselines(options, *device);
  std::vector<CudaRow> rows;
  for (const int64_t n : options.n) {
    for (const int64_t k : options.k) {
      std::string mismatch;
      const Status status =
          measure_shape(options, *device, baselines, monitor, n, k, rows, mismatch);
      if (!status.ok()) return fail(status);
      if (!mismatch.empty()) {
        fmt::print(stderr, "nibble: check failed: {}\n", mismatch);
        return kExitFailed;
      }
    }
  }
  const Status written = print_all(options, *device, monitor, rows);
  return written.ok() ? kExitOk : fail(written);
}

}  // namespace nibble::cli
