// The plan as it is kept in config.json, under quantization_config -> "nibble". Other readers of
// the checkpoint ignore the key and run W4A16.
//
//   {"schema_version": 1,
//    "layers": [{"qkv":     {"mode": "w4a8", "granularity": "token"},
//                "o":       {"mode": "w4a4", "granularity": "group", "symmetric": false,
//                            "clip": 0.95, "wide_groups": {"of": 9, "groups": [0, 4]}},
//                "gate_up": {"mode": "w4a8", "granularity": "static-tensor",
//                            "static_scales": [0.03125]},
//                "down":    {"mode": "w4a16"}}, ...],
//    ...}                            what a plan was made from and which gates it met:
//    tools/plan.cc
//
// Absent keys have LinearSpec's defaults. Everything in "layers" is checked; other keys are not
// read.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "model/config.h"
#include "model/linear.h"

namespace nibble {

inline constexpr int kPlanSchemaVersion = 1;

/// The plan of the "nibble" block of a config.json document. invalid_argument if there is none;
/// corrupt_file, naming the key, if it does not fit `config` or has a schema_version that is not
/// known.
Result<ModelPlan> plan_from_config(const nlohmann::json& document, const ModelConfig& config);

/// Whether `document` has a plan, and whether it has a quantization_config where one could be put: at
/// the top or in the text part.
bool has_plan(const nlohmann::json& document);
bool can_hold_plan(const nlohmann::json& document);

/// The value of "nibble": schema_version and the spec of every layer and slot. What else belongs
/// there (gates met, calibration digest) the caller adds.
nlohmann::json plan_to_json(const ModelPlan& plan);

/// Replaces quantization_config -> "nibble" in `directory`/config.json by `block` and leaves every
/// other key as it is, in its order. The file is replaced at once, or not at all. unsupported if
/// there is no quantization_config to put it in.
Status store_plan(const std::string& directory, const nlohmann::json& block);

/// Input channels of a slot's linears.
int64_t slot_channels(const ModelConfig& config, Slot slot);

}  // namespace nibble
