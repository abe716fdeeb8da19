// The logits' map (formula.h) over a run of them.
//
// Kernels compute on mapped logits: whatever reads logits maps them on their way into a buffer, so
// where there is a map no logits are used where they lie. Compiled by itself, for every kernel.
#pragma once

#include <cstdint>

#include "../../formula.h"

namespace fused_ce::cpu {

template <class A>
LogitMap<A> logit_map(const Problem& p);

// To where they come from, or elsewhere.
template <class A>
void map_logits(const LogitMap<A>& map, const A* logits, int64_t n, A* mapped);

// With their slopes, for a map that bends.
template <class A>
void map_logits(const LogitMap<A>& map, const A* logits, int64_t n, A* mapped, A* slopes);

}  // namespace fused_ce::cpu
