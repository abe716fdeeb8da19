// The definitions behind kernels.h, for the files that compile them.
#pragma once

#include "../rows/parts.h"
#include "../vector/simd.h"
#include "kernels.h"
#include "lane_kernel.h"
#include "row_kernel.h"

namespace fused_ce::cpu {

template <class A, bool kReverse, class Use>
void run_divergence_tiles(const Problem& p, const Divergence& d, const Tiling& tiling,
                          const Threads& threads, const Use& use) {
  simd::with_level([&](auto level) {
    if (divergence_prefers_lanes(p))
      run_tiles<DivergenceLaneKernel<A, level, kReverse>, level>(tiling, threads, use, p, tiling,
                                                                 d);
    else
      run_tiles<DivergenceRowKernel<A, level, kReverse>, level>(tiling, threads, use, p, tiling, d);
  });
}

template <class A, class Use>
void run_divergence_tiles(const Problem& p, const Divergence& d, const Tiling& tiling,
                          const Threads& threads, const Use& use) {
  const auto use_tiles = [&](auto& kernel, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) use(kernel, Tile(p, tiling, t), t);
  };
  if (d.reverse)
    run_divergence_tiles<A, true>(p, d, tiling, threads, use_tiles);
  else
    run_divergence_tiles<A, false>(p, d, tiling, threads, use_tiles);
}

template <class A>
void divergence_tiles(const Problem& p, const Divergence& d, const Tiling& tiling,
                      const Threads& threads, double* tile_losses) {
  run_divergence_tiles<A>(p, d, tiling, threads, [&](auto& kernel, const Tile& tile, int64_t t) {
    tile_losses[t] = kernel.forward(tile);
  });
}

template <class A>
void divergence_backward_tiles(const Problem& p, const Divergence& d, const Tiling& tiling,
                               const Threads& threads) {
  run_divergence_tiles<A>(p, d, tiling, threads,
                          [&](auto& kernel, const Tile& tile, int64_t) { kernel.backward(tile); });
}

}  // namespace fused_ce::cpu
