// The kernels for rows by the type that they compute in.
//
// Each function is compiled in a file of its own for each type (row_kernels_*.cpp), since the two
// or three versions for different instruction sets take most of the build's time.
#pragma once

#include "../../problem.h"
#include "targets.h"
#include "tiles.h"

namespace fused_ce::cpu {

// Cuts the rows as the kernels below want them.
Tiling row_tiling(const Problem& p);

// tile_losses[tile] receives the sum of the tile's losses, and scans[tile], unless `scans` is null,
// what scan_tile() finds: an index out of range counts as ignored till then.
template <class A>
void forward_tiles(const Problem& p, const Tiling& tiling, const Threads& threads,
                   double* tile_losses, TargetScan* scans);

template <class A>
void backward_tiles(const Problem& p, const Tiling& tiling, const Threads& threads);

template <class A>
void backward_target_tiles(const Problem& p, const Tiling& tiling, const Threads& threads);

// tile_sums[tile] receives what the tile adds to the gradient of the logits' factor.
template <class A>
void backward_scale_tiles(const Problem& p, const Tiling& tiling, const Threads& threads,
                          double* tile_sums);

// Whether a row may be worth sharing between threads, which the next two do.
bool has_long_rows(const Problem& p);

template <class A>
void forward_shared(const Problem& p, const Tiling& tiling, const Threads& threads,
                    double* tile_losses);

template <class A>
void backward_shared(const Problem& p, const Tiling& tiling, const Threads& threads);

}  // namespace fused_ce::cpu
