// The peers of one run of `bench gemm`: starts them, hands them each shape, checks what they offer,
// and picks the types that are worth timing in full. Whatever fails is kept as a sentence; the run
// goes on without it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "peer.h"
#include "peer_spec.h"

namespace nibble::cli {

/// What follows a first look at a type.
enum class AfterLook {
  slower,     // than others of its peer: not timed further
  in_rounds,  // among the fastest of its peer: timed in full
  failed,     // the peer died, or could not hold its weights
};

/// A type of a peer for one shape and M.
struct PeerEntry {
  Peer* peer = nullptr;
  PeerType* type = nullptr;
  double first_look_us = 0;  // the least of a few products, before the rounds
  AfterLook after = AfterLook::slower;
};

class PeerTeam {
 public:
  /// A peer that does not start, or is not for `device` ("cpu", "cuda"), is a failure of the run,
  /// not its end. Ctrl-C starts no more.
  PeerTeam(const std::vector<PeerSpec>& specs, const std::string& device, int threads,
           double timeout_seconds);

  const std::vector<std::unique_ptr<Peer>>& peers() const { return peers_; }
  /// What went wrong so far, in the order it happened; the death of a peer once.
  const std::vector<std::string>& failures() const { return failures_; }
  void note(const Status& failure) { failures_.push_back(failure.message()); }

  /// The next shape. What is passed must live until the next one.
  Status prepare(const ref::Weights& weights);
  /// The same of a GPU: see PeerFiles::write.
  Status prepare(const AwqTensors& checkpoint, const ref::Weights& sample,
                 const std::vector<int64_t>& columns);
  /// Every type that is right at this M, and of each peer the `most` fastest (0: all) ready for
  /// rounds: their weights held in enough copies to be cold.
  Result<std::vector<PeerEntry>> enter(const std::vector<float>& x, int64_t m, int most);
  /// Microseconds of one product; nothing if it failed, which is noted, or its peer is dead.
  std::optional<double> run(const PeerEntry& entry, int64_t m, const std::string& x_path);
  Result<std::string> input_path(const std::vector<float>& x, int64_t m);

  struct Types {
    Peer* peer;
    std::vector<PeerType> types;  // that take the shape
  };
  const std::vector<Types>& offered() const { return offered_; }

 private:
  /// True if there is nothing to report but a failed peer; false ends the run (Ctrl-C).
  bool survives(const Status& status);
  Status offer(Result<std::unique_ptr<PeerFiles>> files);
  /// Readies the `most` fastest (0: all) of one peer's entries for rounds, the fastest first.
  Status choose(std::vector<PeerEntry>& entries, int most);

  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<Types> offered_;
  std::unique_ptr<PeerFiles> files_;
  std::vector<std::string> failures_;
};

}  // namespace nibble::cli
