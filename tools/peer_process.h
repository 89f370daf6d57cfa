// A worker process that answers one JSON object per line with one per line, and all that can go
// wrong with it: it does not start, dies, hangs, answers garbage. Not here: what the lines mean
// (peer.h).
#pragma once

#include <sys/types.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"

namespace nibble {

class PeerProcess {
 public:
  /// Starts argv[0], found in PATH, with our stderr. It dies with this process.
  static Result<std::unique_ptr<PeerProcess>> start(const std::vector<std::string>& argv);
  ~PeerProcess();  // says bye, waits a moment, kills
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;

  /// One request, one answer. {"error": text} becomes a Status, and the worker lives on; after any
  /// other failure it is killed, and every later call says the same. Ctrl-C ends the wait.
  Result<nlohmann::json> ask(const nlohmann::json& request, double timeout_seconds);
  bool alive() const { return pid_ > 0; }

  /// Stops and continues all its threads, so that none spins while something else is timed. One
  /// that does not stop is killed.
  Status pause();
  void resume();

 private:
  PeerProcess(pid_t pid, int to, int from) : pid_(pid), to_(to), from_(from) {}
  Status send(const std::string& line, double deadline);
  Result<std::string> receive(double deadline);
  Status wait_ready(int fd, short events, double deadline);
  Status give_up(const std::string& reason);  // kills; the reason for all later calls
  /// An end of a pipe was closed: gives up with how the worker ended, if it does within a moment.
  Status closed(const char* what);
  /// If it ends before the deadline (looks at least once): ends what else runs in its process group
  /// and says how it ended. The only place where its number is given back to the system.
  std::optional<std::string> reap(double deadline);

  pid_t pid_;
  int to_, from_;
  bool paused_ = false;
  std::string received_, reason_;
};

}  // namespace nibble
