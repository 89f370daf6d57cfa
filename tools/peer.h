// Another library's matrix product, in a process of its own, as `bench gemm` sees it: which types
// it offers for a shape, whether they are right, and how long one product takes. The lines that go
// to and fro are documented in docs/peers.md.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "format/quant_matrix.h"
#include "gemm/ref.h"
#include "peer_process.h"

namespace nibble {

/// One weight on disk in the forms that workers ask for, and inputs; removed when it ends. What is
/// passed to write() must outlive it.
class PeerFiles {
 public:
  /// For a worker on the CPU: the weight unpacked.
  static Result<std::unique_ptr<PeerFiles>> write(const ref::Weights& weights);
  /// For a worker on a GPU: the tensors of a checkpoint as they are, scales of f16. `sample` are
  /// those of its columns, `columns`, that products are checked on.
  static Result<std::unique_ptr<PeerFiles>> write(const AwqTensors& checkpoint,
                                                  const ref::Weights& sample,
                                                  std::vector<int64_t> columns);
  ~PeerFiles();
  PeerFiles(const PeerFiles&) = delete;
  PeerFiles& operator=(const PeerFiles&) = delete;

  /// x (m, k); the path, which names the same bytes as long as this lives.
  Result<std::string> add_input(const std::vector<float>& x, int64_t m);
  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  /// What `prepare` asks: n, k, group_size, and paths.
  const nlohmann::json& request() const { return request_; }
  /// All columns; or, if sampled(), those of checked_columns() alone.
  const ref::Weights& weights() const { return weights_; }
  bool sampled() const { return sampled_; }
  const std::vector<int64_t>& checked_columns() const { return columns_; }

 private:
  PeerFiles(std::string directory, const ref::Weights& weights)
      : directory_(std::move(directory)), weights_(weights) {}
  static Result<std::unique_ptr<PeerFiles>> open(const ref::Weights& weights);
  std::string directory_;
  const ref::Weights& weights_;
  nlohmann::json request_;
  bool sampled_ = false;
  std::vector<int64_t> columns_;
};

struct PeerType {
  std::string name;         // "q4_0/AMX"
  std::string activations;  // "16bit", "int8" or "e4m3"; empty if it does not say
  double bits_per_weight = 0;
  double weight_error = 0;   // of the weight as this type holds it, relative, root mean square
  double product_error = 0;  // largest so far of y against fp64 on that weight
  std::string candidate;    // what it chose among, at the M checked last; empty if it has no choice
  std::vector<float> held;  // columns of that weight to check against: (checked columns, k)
};

/// What a type's activations may cost, relative. int8, or not said: rounding a normally distributed
/// row with one scale for all of its K values errs by max / 127 / sqrt(12), max growing as
/// sqrt(2 ln K); three times that, for activations in smaller blocks or finer types err less. e4m3:
/// steps of 1/8 of a power of two err by 1/8 / sqrt(12) at most, and a tenth for what else is
/// rounded. 16bit: weights, sums and y in bf16, 2^-9 each.
double peer_tolerance(int64_t k, const std::string& activations = "");

class Peer {
 public:
  /// `label` is unique in the run. A worker that does not start, or speaks another protocol, fails;
  /// one that takes longer than the timeout for an answer counts as hung.
  static Result<std::unique_ptr<Peer>> start(const std::string& label,
                                             const std::vector<std::string>& argv, int threads,
                                             double timeout_seconds);

  const std::string& label() const { return label_; }
  std::string device() const;                             // "cpu", "cuda"
  const nlohmann::json& about() const { return about_; }  // its answer to hello
  bool alive() const { return process_->alive(); }

  /// The next shape: from here on the types of the answer are meant. Forgets the one before.
  Result<std::vector<PeerType>> prepare(const PeerFiles& files);
  /// Fills in `held` and the weight's error. Of a checkpoint, `held` is its own weight: a type that
  /// holds another fails its check.
  Status read_weight(PeerType& type, const PeerFiles& files);
  /// One product of `type`, compared with fp64 on what it holds. Fails if it is wrong.
  Status check(PeerType& type, const std::vector<float>& x, int64_t m, PeerFiles& files);
  /// Copies of the weight, `bytes` in all, to be used in turn.
  Status hold(const PeerType& type, int64_t bytes);
  /// Microseconds of each of `repetitions` products, by the worker's clock.
  Result<std::vector<double>> run(const PeerType& type, int64_t m, const std::string& x_path,
                                  int repetitions);

 private:
  Peer(std::string label, std::unique_ptr<PeerProcess> process, double timeout_seconds)
      : label_(std::move(label)), process_(std::move(process)), timeout_(timeout_seconds) {}
  /// Pauses it afterwards; messages name the peer and what it was asked.
  Result<nlohmann::json> ask(const nlohmann::json& request);

  std::string label_;
  std::unique_ptr<PeerProcess> process_;
  double timeout_;  // seconds for one answer
  nlohmann::json about_;
};

}  // namespace nibble
