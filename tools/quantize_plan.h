// What `nibble quantize` will do, decided before the first byte is written: which layers it takes,
// the sizes of everything, and whether there is room. Whatever can be refused is refused here, all
// bad layers in one message. Not here: the run itself and the command (quantize.cc), or the
// arithmetic (format/round_to_nearest.h).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "format/checkpoint.h"
#include "format/linear_format.h"

namespace nibble::cli {

constexpr uint64_t kShardBytes = uint64_t{5} << 30;
constexpr int64_t kSnrColumns = 32;  // output channels compared at once, per thread

struct QuantizePlan {
  std::vector<DenseLinear> linears;  // to be quantized
  std::vector<DenseLinear> left;     // linears that stay as they are
  std::vector<std::string> copied;   // names of all tensors that stay as they are
  uint64_t input_bytes = 0, output_bytes = 0, quantized_bytes = 0, parameters = 0;
  uint64_t memory_bytes = 0;  // beside the mapped input
  uint64_t work_bytes = 0;    // on disk beside the output while it is made
};

/// The plan for `checkpoint`, whose layers with a match of one of the regular expressions in `skip`
/// stay as they are. Throws CLI::ValidationError for an expression that is none.
Result<QuantizePlan> make_quantize_plan(const Checkpoint& checkpoint, int64_t group_size,
                                        const std::vector<std::string>& skip);

/// What to know before running `plan`, one sentence each: layers that an engine fuses and that
/// would no longer be alike, and names that another reader would take for more than they are.
std::vector<std::string> notes_on(const QuantizePlan& plan);

/// The parts of "model.layers.0.mlp.down_proj" between the dots.
std::vector<std::string> components(const std::string& name);

/// Refuses an `out` that is `directory` or lies inside it, or exists and is not an empty directory.
Status check_directories(const std::string& directory, const std::string& out);

/// Refuses if the disk of `out`, which need not exist yet, or memory is too small for `plan`.
Status check_room(const QuantizePlan& plan, const std::string& out);

/// Bytes this user may write where `out` will be; nothing if the system does not say.
std::optional<uint64_t> free_disk(const std::string& out);

/// Disk taken while writing: the writer keeps one shard twice while it gives it its header.
uint64_t peak_disk(const QuantizePlan& plan);

}  // namespace nibble::cli
