#include "peer_team.h"

#include <fmt/format.h>

#include <algorithm>

#include "cli.h"
#include "text.h"

namespace nibble::cli {
namespace {

// As the weights of a model would be: more than what caches keep of them until their next turn.
constexpr int64_t kColdBytes = 300'000'000;

/// The least of a few products, of fewer if they are long: enough to tell types apart.
Result<double> first_look(Peer& peer, const PeerType& type, int64_t m, const std::string& x_path) {
  constexpr double kLongUs = 20'000;
  const Result<std::vector<double>> first = peer.run(type, m, x_path, 2);
  if (!first.ok()) return first.status();
  const double least = std::min((*first)[0], (*first)[1]);
  if (least > kLongUs) return least;
  const Result<std::vector<double>> more = peer.run(type, m, x_path, 6);
  if (!more.ok()) return more.status();
  return std::min(least, *std::min_element(more->begin(), more->end()));
}

}  // namespace

PeerTeam::PeerTeam(const std::vector<PeerSpec>& specs, const std::string& device, int threads,
                   double timeout_seconds) {
  for (const PeerSpec& spec : specs) {
    if (interrupted()) return;
    auto peer = Peer::start(spec.label, spec.argv, threads, timeout_seconds);
    if (!peer.ok()) {
      note(peer.status());
    } else if (const std::string its = (*peer)->device(); its != device) {
      note(Status(Code::unsupported, fmt::format("peer {} is for device {}, this run for {}",
                                                 spec.label, printable_text(its), device)));
    } else {
      peers_.push_back(std::move(*peer));
    }
  }
}

bool PeerTeam::survives(const Status& status) {
  if (status.code() == Code::interrupted) return false;
  note(status);
  return true;
}

Status PeerTeam::prepare(const ref::Weights& weights) {
  return peers_.empty() ? Status{} : offer(PeerFiles::write(weights));
}

Status PeerTeam::prepare(const AwqTensors& checkpoint, const ref::Weights& sample,
                         const std::vector<int64_t>& columns) {
  return peers_.empty() ? Status{} : offer(PeerFiles::write(checkpoint, sample, columns));
}

Status PeerTeam::offer(Result<std::unique_ptr<PeerFiles>> files) {
  offered_.clear();
  if (!files.ok()) return files.status();
  files_ = std::move(*files);
  for (const auto& peer : peers_) {
    if (!peer->alive()) continue;
    Result<std::vector<PeerType>> types = peer->prepare(*files_);
    if (!types.ok()) {
      if (!survives(types.status())) return types.status();
      continue;
    }
    Types of = {peer.get(), {}};
    for (PeerType& type : *types) {
      if (!peer->alive()) break;
      const Status read = peer->read_weight(type, *files_);
      if (read.ok()) {
        of.types.push_back(std::move(type));
      } else if (!survives(read)) {
        return read;
      }
    }
    offered_.push_back(std::move(of));
  }
  return {};
}

Result<std::string> PeerTeam::input_path(const std::vector<float>& x, int64_t m) {
  return files_->add_input(x, m);
}

Result<std::vector<PeerEntry>> PeerTeam::enter(const std::vector<float>& x, int64_t m, int most) {
  std::vector<PeerEntry> all;
  for (Types& offer : offered_) {
    std::vector<PeerEntry> entries;
    for (PeerType& type : offer.types) {
      if (!offer.peer->alive()) break;
      const Status right = offer.peer->check(type, x, m, *files_);
      if (!right.ok()) {
        if (!survives(right)) return right;
        continue;
      }
      const Result<std::string> path = files_->add_input(x, m);
      if (!path.ok()) return path.status();
      const Result<double> us = first_look(*offer.peer, type, m, *path);
      if (us.ok()) {
        entries.push_back({offer.peer, &type, *us});
      } else if (!survives(us.status())) {
        return us.status();
      }
    }
    NIBBLE_TRY(choose(entries, most));
    all.insert(all.end(), entries.begin(), entries.end());
  }
  return all;
}

Status PeerTeam::choose(std::vector<PeerEntry>& entries, int most) {
  std::sort(entries.begin(), entries.end(), [](const PeerEntry& a, const PeerEntry& b) {
    return a.first_look_us < b.first_look_us;
  });
  const size_t count =
      most > 0 ? std::min(entries.size(), static_cast<size_t>(most)) : entries.size();
  for (size_t i = 0; i < count && entries[i].peer->alive(); ++i) {
    const Status held = entries[i].peer->hold(*entries[i].type, kColdBytes);
    if (!held.ok() && !survives(held)) return held;
    entries[i].after = held.ok() ? AfterLook::in_rounds : AfterLook::failed;
  }
  for (PeerEntry& entry : entries) {
    if (!entry.peer->alive()) entry.after = AfterLook::failed;
  }
  return {};
}

std::optional<double> PeerTeam::run(const PeerEntry& entry, int64_t m, const std::string& x_path) {
  if (!entry.peer->alive()) return std::nullopt;
  const Result<std::vector<double>> us = entry.peer->run(*entry.type, m, x_path, 1);
  if (us.ok()) return us->front();
  if (us.status().code() != Code::interrupted) note(us.status());
  return std::nullopt;
}

}  // namespace nibble::cli
