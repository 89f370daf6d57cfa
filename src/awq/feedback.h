// Error feedback: what rounding one input channel wrongly does to the output can partly be undone
// by the channels that come after it. With C = (F + I) D (F + I)^T, F strictly upper triangular and
// D diagonal, rounding channel j of a row w to
//     q_j = round(w_j + sum over i < j of (w_i - q_i) F_ij)
// minimises the output error greedily. This is GPTQ's update written without an inverse (Chee et
// al., "QuIP", 2023, show that the two are the same).
// Not here: the rounding itself (awq/rounding.h).
#pragma once

#include "awq/moments.h"

namespace nibble::awq {

/// F of `moment` + damping * (mean of its diagonal) * I. Only panels' rows above the diagonal block
/// and the strict upper triangle of the diagonal block are defined. A moment that is not positive
/// definite even so, by rounding, gets more damping.
Result<PanelMatrix> feedback_matrix(const PanelMatrix& moment, double damping, int threads);

}  // namespace nibble::awq
