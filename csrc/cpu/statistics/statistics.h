// The statistics of rows on the CPU, as their callers see them; see ../kernels.h.
#pragma once

#include "../../statistics_problem.h"
#include "../rows/tiles.h"

namespace fused_ce::cpu {

// What `s` and the statistics of `p` have memory for. Raises std::out_of_range for a target that is
// no class, before anything is written.
void find_statistics(const Problem& p, const Statistics& s, const Threads& threads);

// p.grad from the logits, the statistics and what arrives; it may be the logits' memory.
void find_statistics_gradient(const Problem& p, const Statistics& s, const Threads& threads);

}  // namespace fused_ce::cpu
