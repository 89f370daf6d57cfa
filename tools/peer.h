// Another library's matrix product, in a process of its own, as `bench gemm` sees it: which types
// it offers for a shape, whether they are right, and how long one product takes. The lines that go
// to and fro are documented in docs/peers.md.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gemm/ref.h"
#include "peer_process.h"

namespace nibble {

/// One weight on disk in the forms that workers ask for, and inputs; removed when it ends.
class PeerFiles {
 public:
  static Result<std::unique_ptr<PeerFiles>> write(const ref::Weights& weights);
  ~PeerFiles();
  PeerFiles(const PeerFiles&) = delete;
  PeerFiles& operator=(const PeerFiles&) = delete;

  /// x (m, k); the path, which names the same bytes as long as this lives.
  Result<std::string> add_input(const std::vector<float>& x, int64_t m);
  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  const ref::Weights& weights() const { return weights_; }

 private:
  PeerFiles(std::string directory, const ref::Weights& weights)
      : directory_(std::move(directory)), weights_(weights) {}
  std::string directory_;
  const ref::Weights& weights_;
};

struct PeerType {
  std::string name;  // "q4_0/AMX"
  double bits_per_weight = 0;
  double weight_error = 0;   // of the weight as this type holds it, relative, root mean square
  double product_error = 0;  // largest so far of y against fp64 on that weight
  std::vector<float> held;   // columns of that weight to check against: (checked columns, k)
};

/// What 8-bit activations may cost, relative: rounding a normally distributed row with one scale
/// for all of its K values errs by max / 127 / sqrt(12), max growing as sqrt(2 ln K); three times
/// that, for activations in smaller blocks or finer types err less.
double peer_tolerance(int64_t k);

class Peer {
 public:
  /// `label` is unique in the run. A worker that does not start, or speaks another protocol, fails;
  /// one that takes longer than the timeout for an answer counts as hung.
  static Result<std::unique_ptr<Peer>> start(const std::string& label,
                                             const std::vector<std::string>& argv, int threads,
                                             double timeout_seconds);

  const std::string& label() const { return label_; }
  const nlohmann::json& about() const { return about_; }  // its answer to hello
  bool alive() const { return process_->alive(); }

  /// The next shape: from here on the types of the answer are meant. Forgets the one before.
  Result<std::vector<PeerType>> prepare(const PeerFiles& files);
  /// Fills in `held` and the weight's error.
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
