// The divergence of rows on the CPU, as its callers see it; see ../kernels.h.
#pragma once

#include "../../divergence_problem.h"
#include "../rows/tiles.h"

namespace fused_ce::cpu {

// The loss, and where `p` and `d` have memory for them the statistics, the totals and the gradient.
void find_divergence(Problem& p, const Divergence& d, const Threads& threads);

// p.grad from the logits, the statistics and the totals; it may be the student's logits' memory.
void find_divergence_gradient(Problem& p, const Divergence& d, const Threads& threads);

}  // namespace fused_ce::cpu
