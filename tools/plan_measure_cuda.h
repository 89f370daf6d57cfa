// How long the products of a slot take on the first GPU, for `nibble plan --device cuda`.
#pragma once

#include "plan_measure.h"

namespace nibble::cli {

/// x and y of `type` (f16 or bf16); random weights of the slot's shape. unsupported in a build
/// without CUDA.
Result<SlotTimer> cuda_slot_timer(Dtype type);

}  // namespace nibble::cli
