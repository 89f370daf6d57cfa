#include "peer.h"

#include <fmt/format.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "text.h"

namespace nibble {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int kProtocol = 1;
constexpr int64_t kCheckedRows = 4, kCheckedColumns = 512;

template <class T>
Status write_file(const std::string& path, const std::vector<T>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(T)));
  file.close();
  if (file) return {};
  return Status(Code::io_error, fmt::format("cannot write {}", path));
}

/// `count` floats of a file, from the float `first` on.
Status read_floats(std::ifstream& file, int64_t first, std::vector<float>& values) {
  file.seekg(first * static_cast<int64_t>(sizeof(float)));
  file.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(float)));
  if (file) return {};
  return Status(Code::io_error, "the file that it wrote is too short");
}

/// Root mean square of differences over that of what is right.
struct Error {
  double difference = 0, right = 0;
  void add(double found, double expected) {
    difference += (found - expected) * (found - expected);
    right += expected * expected;
  }
  double relative() const { return right > 0 ? std::sqrt(difference / right) : difference; }
};

float weight_value(const ref::Weights& w, int64_t n, int64_t k) {
  const int64_t at = n * w.groups + k / w.group_size;
  return (static_cast<float>(w.codes[n * w.k + k]) - static_cast<float>(w.zeros[at])) *
         w.scales[at];
}

/// About `most` of 0 .. count - 1, the first and the last among them.
std::vector<int64_t> spread(int64_t count, int64_t most) {
  std::vector<int64_t> chosen;
  const int64_t size = std::min(count, most);
  for (int64_t i = 0; i < size; ++i) chosen.push_back(size == 1 ? 0 : i * (count - 1) / (size - 1));
  return chosen;
}

}  // namespace

double peer_tolerance(int64_t k, const std::string& activations) {
  if (activations == "e4m3") return 1.1 / 8 / std::sqrt(12.0);
  if (activations == "16bit") return 3.0 / 512;
  const double largest = std::sqrt(2 * std::log(std::max<double>(2, static_cast<double>(k))));
  return 3 * largest / 127 / std::sqrt(12.0);
}

Result<std::unique_ptr<PeerFiles>> PeerFiles::open(const ref::Weights& weights) {
  std::error_code error;
  std::string name = (fs::temp_directory_path(error) / "nibble-peers-XXXXXX").string();
  if (error || ::mkdtemp(name.data()) == nullptr) {
    return Status(Code::io_error, fmt::format("cannot make a directory {}", name));
  }
  std::unique_ptr<PeerFiles> files(new PeerFiles(name, weights));
  files->request_ = {
      {"op", "prepare"}, {"n", weights.n}, {"k", weights.k}, {"group_size", weights.group_size}};
  return files;
}

Result<std::unique_ptr<PeerFiles>> PeerFiles::write(const ref::Weights& weights) {
  Result<std::unique_ptr<PeerFiles>> opened = open(weights);
  if (!opened.ok()) return opened;
  PeerFiles& files = **opened;
  std::vector<float> values(weights.codes.size());
  for (int64_t n = 0; n < weights.n; ++n) {
    for (int64_t k = 0; k < weights.k; ++k) values[n * weights.k + k] = weight_value(weights, n, k);
  }
  NIBBLE_TRY(write_file(files.path("values"), values));
  NIBBLE_TRY(write_file(files.path("codes"), weights.codes));
  NIBBLE_TRY(write_file(files.path("zeros"), weights.zeros));
  NIBBLE_TRY(write_file(files.path("scales"), weights.scales));
  for (const char* form : {"values", "codes", "zeros", "scales"}) {
    files.request_["weights"][form] = files.path(form);
  }
  files.columns_ = spread(weights.n, kCheckedColumns);
  return opened;
}

Result<std::unique_ptr<PeerFiles>> PeerFiles::write(const AwqTensors& checkpoint,
                                                    const ref::Weights& sample,
                                                    std::vector<int64_t> columns) {
  if (checkpoint.scale_dtype != Dtype::f16) {
    return Status(Code::unsupported, fmt::format("scales of {}: peers on a GPU get those of f16",
                                                 dtype_name(checkpoint.scale_dtype)));
  }
  Result<std::unique_ptr<PeerFiles>> opened = open(sample);
  if (!opened.ok()) return opened;
  PeerFiles& files = **opened;
  NIBBLE_TRY(write_file(files.path("qweight"), checkpoint.qweight));
  NIBBLE_TRY(write_file(files.path("qzeros"), checkpoint.qzeros));
  NIBBLE_TRY(write_file(files.path("scales"), checkpoint.scales));
  for (const char* tensor : {"qweight", "qzeros", "scales"}) {
    files.request_["checkpoint"][tensor] = files.path(tensor);
  }
  files.request_["n"] = checkpoint.n;
  files.sampled_ = true;
  files.columns_ = std::move(columns);
  return opened;
}

PeerFiles::~PeerFiles() {
  std::error_code ignored;
  fs::remove_all(directory_, ignored);
}

Result<std::string> PeerFiles::add_input(const std::vector<float>& x, int64_t m) {
  const std::string name = path(fmt::format("x-{}", m));
  if (!fs::exists(name)) NIBBLE_TRY(write_file(name, x));
  return name;
}

Result<json> Peer::ask(const json& request) {
  const std::string operation = request["op"];
  Result<json> answer = process_->ask(request, timeout_);
  if (const Status paused = process_->pause(); answer.ok() && !paused.ok()) answer = paused;
  if (answer.ok()) return answer;
  const std::string name = request.value("type", "");
  const std::string type = name.empty() ? "" : fmt::format(" {}", cli::printable_text(name));
  return Status(answer.status().code(), fmt::format("peer {}, {}{}: {}", label_, operation, type,
                                                    answer.status().message()));
}

Result<std::unique_ptr<Peer>> Peer::start(const std::string& label,
                                          const std::vector<std::string>& argv, int threads,
                                          double timeout_seconds) {
  auto process = PeerProcess::start(argv);
  if (!process.ok()) {
    return Status(process.status().code(),
                  fmt::format("peer {}: {}", label, process.status().message()));
  }
  std::unique_ptr<Peer> peer(new Peer(label, std::move(*process), timeout_seconds));
  Result<json> about = peer->ask({{"op", "hello"}, {"threads", threads}});
  if (!about.ok()) return about.status();
  peer->about_ = std::move(*about);
  if (peer->about_.value("protocol", json()) != kProtocol) {
    return Status(Code::unsupported,
                  fmt::format("peer {} does not speak protocol {}", label, kProtocol));
  }
  return peer;
}

std::string Peer::device() const {
  const auto device = about_.find("device");  // it may be anything
  return device != about_.end() && device->is_string() ? device->get<std::string>() : "cpu";
}

Result<std::vector<PeerType>> Peer::prepare(const PeerFiles& files) {
  Result<json> answer = ask(files.request());
  if (!answer.ok()) return answer.status();
  std::vector<PeerType> types;
  try {
    for (const json& type : answer->at("types")) {
      PeerType& offer = types.emplace_back();
      offer.name = type.at("type");
      offer.bits_per_weight = type.at("bits_per_weight");
      offer.activations = type.value("activations", "");
      const std::vector<std::string> known = {"", "int8", "e4m3", "16bit"};
      if (std::find(known.begin(), known.end(), offer.activations) == known.end()) {
        return Status(
            Code::io_error,
            fmt::format("peer {}, prepare: activations '{}': expected int8, e4m3 or 16bit", label_,
                        cli::printable_text(offer.activations)));
      }
    }
  } catch (const json::exception& error) {
    return Status(Code::io_error, fmt::format("peer {}, prepare: {}", label_, error.what()));
  }
  return types;
}

Status Peer::read_weight(PeerType& type, const PeerFiles& files) {
  const ref::Weights& w = files.weights();
  if (files.sampled()) {
    type.held.clear();
    for (int64_t n = 0; n < w.n; ++n) {
      for (int64_t k = 0; k < w.k; ++k) type.held.push_back(weight_value(w, n, k));
    }
    return {};
  }
  const std::string path = files.path("held");
  fs::remove(path);  // what an earlier answer left must not pass for this one's
  Result<json> done = ask({{"op", "dequantize"}, {"type", type.name}, {"path", path}});
  if (!done.ok()) return done.status();
  std::ifstream file(path, std::ios::binary);
  std::vector<float> column(static_cast<size_t>(w.k));
  Error error;
  type.held.clear();
  for (const int64_t n : files.checked_columns()) {
    if (const Status read = read_floats(file, n * w.k, column); !read.ok()) {
      return Status(read.code(), fmt::format("peer {}, dequantize {}: {}", label_,
                                             cli::printable_text(type.name), read.message()));
    }
    for (int64_t k = 0; k < w.k; ++k) error.add(column[k], weight_value(w, n, k));
    type.held.insert(type.held.end(), column.begin(), column.end());
  }
  type.weight_error = error.relative();
  return {};
}

Status Peer::check(PeerType& type, const std::vector<float>& x, int64_t m, PeerFiles& files) {
  const ref::Weights& w = files.weights();
  const Result<std::string> x_path = files.add_input(x, m);
  if (!x_path.ok()) return x_path.status();
  const std::string y_path = files.path("y");
  fs::remove(y_path);
  const std::vector<int64_t> rows = spread(m, kCheckedRows), &columns = files.checked_columns();
  json request = {{"op", "check"}, {"type", type.name}, {"m", m}, {"x", *x_path}, {"y", y_path}};
  if (files.sampled()) request.update({{"rows", rows}, {"columns", columns}});
  Result<json> done = ask(request);
  if (!done.ok()) return done.status();
  const std::string what =
      fmt::format("peer {}, {}, M={}", label_, cli::printable_text(type.name), m);
  std::ifstream file(y_path, std::ios::binary);
  const size_t size = files.sampled() ? rows.size() * columns.size() : static_cast<size_t>(m * w.n);
  std::vector<float> y(size);
  if (const Status read = read_floats(file, 0, y); !read.ok()) {
    return Status(read.code(), fmt::format("{}: {}", what, read.message()));
  }
  Error error;
  const float* held = type.held.data();
  for (size_t i = 0; i < columns.size(); ++i) {
    for (size_t j = 0; j < rows.size(); ++j) {
      double sum = 0;
      for (int64_t k = 0; k < w.k; ++k) sum += double{held[k]} * double{x[rows[j] * w.k + k]};
      error.add(files.sampled() ? y[j * columns.size() + i] : y[rows[j] * w.n + columns[i]], sum);
    }
    held += w.k;
  }
  const double found = error.relative(), most = peer_tolerance(w.k, type.activations);
  type.product_error = std::max(type.product_error, found);
  const auto candidate = done->find("candidate");  // it may be anything
  const bool says = candidate != done->end() && candidate->is_string();
  type.candidate = says ? candidate->get<std::string>() : "";
  if (found <= most) return {};  // false for NaN
  return Status(Code::corrupt_file, fmt::format("{} is wrong: relative error {:.4f} against fp64 "
                                                "on its own weight, tolerance {:.4f}",
                                                what, found, most));
}

Status Peer::hold(const PeerType& type, int64_t bytes) {
  return ask({{"op", "hold"}, {"type", type.name}, {"bytes", bytes}}).status();
}

Result<std::vector<double>> Peer::run(const PeerType& type, int64_t m, const std::string& x_path,
                                      int repetitions) {
  Result<json> answer = ask(
      {{"op", "run"}, {"type", type.name}, {"m", m}, {"x", x_path}, {"repetitions", repetitions}});
  if (!answer.ok()) return answer.status();
  try {
    std::vector<double> us = answer->at("us");
    const bool sane = std::all_of(us.begin(), us.end(), [](double t) { return t > 0; });
    if (static_cast<int>(us.size()) == repetitions && sane) return us;
  } catch (const json::exception&) {
  }
  return Status(Code::io_error,
                fmt::format("peer {}, run: no times in {}", label_, answer->dump(-1, ' ', true)));
}

}  // namespace nibble
