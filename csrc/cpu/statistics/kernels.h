// The kernels for row statistics by the type that they compute in, for tiles [begin, end).
//
// Each type is compiled in a file of its own, for two or three instruction sets.
#pragma once

#include "../../statistics_problem.h"
#include "../rows/tiles.h"

namespace fused_ce::cpu {

// The most rows of a tile.
constexpr int64_t kMaxStatisticsRows = 256;

// Cuts the rows as the kernels below want them.
Tiling statistics_tiling(const Problem& p);

// Whether rows are taken side by side. The number of rows has no say in it: a row's bits depend on
// what takes it.
bool statistics_prefer_lanes(const Problem& p);

template <class A>
void statistics_tiles(const Problem& p, const Statistics& s, const Tiling& tiling, int64_t begin,
                      int64_t end);

template <class A>
void statistics_backward_tiles(const Problem& p, const Statistics& s, const Tiling& tiling,
                               int64_t begin, int64_t end);

}  // namespace fused_ce::cpu
