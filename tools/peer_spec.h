// What `--peers` says: which workers to start, and how.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"

namespace nibble::cli {

struct PeerSpec {
  std::string label;              // "ggml"; "ggml#2" if there are several
  std::vector<std::string> argv;  // what to start
};

/// "ggml=DIR", "NAME=exec:PROGRAM", ...: each the name of a worker of python/nibble_peers and what
/// it needs, or a program that speaks the protocol.
Result<std::vector<PeerSpec>> parse_peers(const std::vector<std::string>& texts);

/// The kinds that parse_peers knows, for --help.
std::string peer_kinds();

}  // namespace nibble::cli
