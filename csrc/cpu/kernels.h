// The CPU kernels as their callers see them: plain data in, tiles [begin, end) of the work done.
//
// Registration hands tiles to threads; a kernel never starts one. Each function needs the tiling
// that the matching function below made for the same problem.
#pragma once

#include <cstdint>
#include <functional>

#include "../problem.h"
#include "targets.h"
#include "tiles.h"

namespace fused_ce::cpu {

Tiling scan_tiling(const Problem& p);
Tiling row_tiling(const Problem& p);

// Sums the weights of the counted targets into scans[tile] and notes the first one out of range.
void scan_targets(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
                  TargetScan* scans);

// Sum of all class weights, or the number of classes where there are none.
double sum_weights(const Problem& p);

// Losses, and where the problem has memory for them the row statistics and the gradient for a
// grad_output of 1. tile_losses[tile] receives the sum of the tile's losses, and scans[tile],
// unless `scans` is null, what scan_targets would find: an index out of range counts as ignored
// till then.
void forward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
             double* tile_losses, TargetScan* scans);

// The gradient with respect to the logits, from the logits and the row statistics.
void backward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end);

// The same two for rows that are each worth sharing between threads: parallel_for calls its
// function for parts of [0, count) that together make up all of it.
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>&)>;
bool has_long_rows(const Problem& p);
void forward_shared(const Problem& p, const Tiling& tiling, const ParallelFor& parallel_for,
                    double* tile_losses);
void backward_shared(const Problem& p, const Tiling& tiling, const ParallelFor& parallel_for);

// The gradient with respect to probability targets.
void backward_target(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end);

// Multiplies elements by a factor, in blocks [begin, end) of scale_blocks(). A zero stays one, even
// times nan: it may be the gradient of an ignored row.
int64_t scale_blocks(const Elements& elements);
void scale(const Elements& elements, double factor, int64_t begin, int64_t end);

const char* instruction_set();

}  // namespace fused_ce::cpu
