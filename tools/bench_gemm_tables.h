// What the reports of `bench gemm` have in common on CPUs and GPUs: lines of tables, and all that
// comes of peers.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench_gemm.h"

namespace nibble::cli {

using Cells = std::vector<std::string>;
void print_line(const Cells& cells, bool csv);
void print_head(const Cells& head, bool csv);

/// What they say of themselves, a line each.
void print_peers(const nlohmann::json& peers);
/// which: the peers' types that are compared with, as a heading.
void print_versus(const std::vector<GemmVersus>& versus, const std::string& which);
/// Those that were not timed in full.
void print_looks(const std::vector<GemmLook>& looks);

void add_peers_json(nlohmann::json& document, const nlohmann::json& peers,
                    const std::vector<GemmVersus>& versus, const std::vector<GemmLook>& looks,
                    const std::vector<std::string>& failures);

}  // namespace nibble::cli
