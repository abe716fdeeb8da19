// Which rows are taken how, and what comes before their tiles; see statistics.h.
#include "statistics.h"

#include <algorithm>
#include <limits>

#include "../kernels.h"
#include "kernels.h"

namespace fused_ce::cpu {

namespace {

// Up to here a row of adjacent classes is faster as a lane among others than on its own.
constexpr int64_t kMaxLaneClasses = 64;

// The smallest distance of two rows.
int64_t row_distance(const Problem& p) {
  int64_t distance = std::numeric_limits<int64_t>::max();
  for (int d = 0; d < p.row_dims; d++)
    if (p.row_sizes[d] > 1) distance = std::min(distance, p.input.row_strides[d]);
  return distance;
}

}  // namespace

bool statistics_prefer_lanes(const Problem& p) {
  if (p.classes <= kMaxLaneClasses) return true;
  return p.input.class_stride != 1 && row_distance(p) < p.input.class_stride;
}

Tiling statistics_tiling(const Problem& p) {
  constexpr int64_t kTileElements = 4096;
  const int64_t rows = statistics_prefer_lanes(p) ? kMaxStatisticsRows : kTileElements / p.classes;
  return make_tiling(p, std::min(rows, kMaxStatisticsRows), p.classes, 1);
}

namespace {

using Tiles = void (*)(const Problem&, const Statistics&, const Tiling&, int64_t, int64_t);

void run_tiles(const Problem& p, const Statistics& s, const Threads& threads, Tiles tiles) {
  if (p.target.data) check_targets(p, threads);
  const Tiling tiling = statistics_tiling(p);
  if (tiling.count == 0) return;
  threads.run(tiling.count, tiling.grain,
              [&](int64_t begin, int64_t end) { tiles(p, s, tiling, begin, end); });
}

}  // namespace

void find_statistics(const Problem& p, const Statistics& s, const Threads& threads) {
  run_tiles(p, s, threads,
            p.accumulates_in_double() ? statistics_tiles<double> : statistics_tiles<float>);
}

void find_statistics_gradient(const Problem& p, const Statistics& s, const Threads& threads) {
  run_tiles(p, s, threads,
            p.accumulates_in_double() ? statistics_backward_tiles<double>
                                      : statistics_backward_tiles<float>);
}

}  // namespace fused_ce::cpu
