// The kernels for divergences by the type that they compute in, over tiles that threads share.
//
// Each type is compiled in a file of its own, for two or three instruction sets.
#pragma once

#include "../../divergence_problem.h"
#include "../rows/tiles.h"

namespace fused_ce::cpu {

// The most rows of a tile that are taken side by side, and how many of their classes at a time: no
// more of them than rows of few classes have.
constexpr int64_t kMaxDivergenceLanes = 256;
constexpr int64_t kDivergenceLaneClasses = 64;

// Cuts the rows as the kernels below want them.
Tiling divergence_tiling(const Problem& p);

// Whether rows are taken side by side. The number of rows has no say in it: a row's bits depend on
// what takes it.
bool divergence_prefers_lanes(const Problem& p);

// Leaves the sum of each tile's losses.
template <class A>
void divergence_tiles(const Problem& p, const Divergence& d, const Tiling& tiling,
                      const Threads& threads, double* tile_losses);

template <class A>
void divergence_backward_tiles(const Problem& p, const Divergence& d, const Tiling& tiling,
                               const Threads& threads);

}  // namespace fused_ce::cpu
