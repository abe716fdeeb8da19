// Which rows are taken how, what their mean divides by, and its sum; see divergence.h.
#include "divergence.h"

#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "../statistics/kernels.h"
#include "kernels.h"

namespace fused_ce::cpu {

// As for row statistics, whose exps are as many.
bool divergence_prefers_lanes(const Problem& p) { return statistics_prefer_lanes(p); }

Tiling divergence_tiling(const Problem& p) {
  // Of lanes so many that what is kept of them stays in the cache; fewer than the least would read
  // too little of each class at a time.
  constexpr int64_t kTileElements = 4096, kLaneElements = 4096, kLeastLanes = 64;
  const int64_t elements = divergence_prefers_lanes(p) ? kLaneElements : kTileElements;
  int64_t rows = elements / p.classes;
  if (divergence_prefers_lanes(p))
    rows = std::clamp(rows / 16 * 16, kLeastLanes, kMaxDivergenceLanes);
  return make_tiling(p, std::min(rows, kMaxDivergenceLanes), 3 * p.classes);
}

void find_divergence(Problem& p, const Divergence& d, const Threads& threads) {
  find_denominators(p, threads);
  const Tiling tiling = divergence_tiling(p);
  std::vector<double> tile_losses(tiling.count);
  const auto tiles = d.in_double ? divergence_tiles<double> : divergence_tiles<float>;
  tiles(p, d, tiling, threads, tile_losses.data());
  if (p.totals) *p.totals = p.known;
  if (p.reduces()) store_loss(p, tile_losses);
}

void find_divergence_gradient(Problem& p, const Divergence& d, const Threads& threads) {
  p.known = *p.totals;
  const auto tiles =
      d.in_double ? divergence_backward_tiles<double> : divergence_backward_tiles<float>;
  tiles(p, d, divergence_tiling(p), threads);
}

}  // namespace fused_ce::cpu
