// The kernels for pointwise losses by the type that they compute in, for tiles [begin, end).
//
// Each type is compiled in a file of its own, for two or three instruction sets.
#pragma once

#include "../../pointwise_problem.h"
#include "../rows/tiles.h"

namespace fused_ce::cpu {

// Elements whose numbers are in buffers at a time: what they take of the first-level cache is less
// than that, and of the stack less than with_stack_room() has (../stack.h).
constexpr int64_t kPointwiseBlock = 1024;

// tile_sums[t] gets the sum of the losses of tile t.
template <class A>
void pointwise_tiles(const Problem& p, const Pointwise& s, const Tiling& tiling, int64_t begin,
                     int64_t end, double* tile_sums);

}  // namespace fused_ce::cpu
