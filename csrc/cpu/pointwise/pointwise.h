// The pointwise losses on the CPU, as their callers see them; see ../kernels.h.
#pragma once

#include "../../pointwise_problem.h"
#include "../rows/tiles.h"

namespace fused_ce::cpu {

// The loss and the gradient, each where `p` has memory for it; that of the gradient may be the
// input's.
void evaluate_pointwise(const Problem& p, const Pointwise& s, const Threads& threads);

}  // namespace fused_ce::cpu
