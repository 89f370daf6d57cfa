// `verify --device cuda`.
#pragma once

#include <string>
#include <vector>

#include "layer_check.h"

namespace nibble::cli {

/// Every layer and mode on GPU 0, compared with the oracle and with fp64; prints a table or JSON.
/// model_failures, of the model as a whole, are printed and counted too. Of several modes, those
/// that no kernel takes are skipped, with their reasons.
/// Exit code; without a GPU, or in a build without CUDA, says why and gives kExitUnsupported.
int verify_on_cuda(const std::vector<LayerToCheck>& layers,
                   const std::vector<std::string>& model_failures, const CheckOptions& options,
                   bool as_json);

}  // namespace nibble::cli
