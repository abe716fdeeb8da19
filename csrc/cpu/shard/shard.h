// Sharded classes on the CPU, as their callers see them; see ../kernels.h.
#pragma once

#include "../../shard_problem.h"
#include "../rows/tiles.h"

namespace fused_ce::cpu {

// The one packet, from the logits of a shard. Raises nothing about the targets: every process must
// get as far as the exchange.
void pack_shard(const Problem& p, const Shards& s, const Threads& threads);

// The loss, the statistics and the totals, from all packets. Raises std::out_of_range for a target
// that is no class, and std::invalid_argument where the shards do not belong together.
void merge_shards(Problem& p, const Shards& s, const Threads& threads);

// The gradient with respect to the logits, and that with respect to probability targets.
void find_shard_gradient(Problem& p, const Shards& s, const Threads& threads);
void find_shard_target_gradient(Problem& p, const Shards& s, const Threads& threads);

}  // namespace fused_ce::cpu
