// The definitions behind row_kernels.h, for the files that compile them.
#pragma once

#include "../vector/simd.h"
#include "lane_kernel.h"
#include "parts.h"
#include "row_kernel.h"
#include "row_kernels.h"
#include "shared_rows.h"

namespace fused_ce::cpu {

bool prefers_lanes(const Problem& p);

template <class A, class Use>
void run_tiles(const Problem& p, const Tiling& tiling, const Threads& threads, const Use& use) {
  simd::with_level([&](auto level) {
    if (prefers_lanes(p))
      run_tiles<LaneKernel<A, level>, level>(tiling, threads, use, p, tiling);
    else
      run_tiles<RowKernel<A, level>, level>(tiling, threads, use, p, tiling);
  });
}

template <class A>
void forward_tiles(const Problem& p, const Tiling& tiling, const Threads& threads,
                   double* tile_losses, TargetScan* scans) {
  run_tiles<A>(p, tiling, threads, [&](auto& kernel, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const Tile tile(p, tiling, t);
      if (scans) scans[t] = scan_tile(p, tile, p.options.weight.data);
      tile_losses[t] = kernel.forward(tile);
    }
  });
}

template <class A>
void backward_tiles(const Problem& p, const Tiling& tiling, const Threads& threads) {
  run_tiles<A>(p, tiling, threads, [&](auto& kernel, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) kernel.backward(Tile(p, tiling, t));
  });
}

template <class A>
void backward_target_tiles(const Problem& p, const Tiling& tiling, const Threads& threads) {
  run_tiles<A>(p, tiling, threads, [&](auto& kernel, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) kernel.backward_target(Tile(p, tiling, t));
  });
}

template <class A>
void backward_scale_tiles(const Problem& p, const Tiling& tiling, const Threads& threads,
                          double* tile_sums) {
  simd::with_level([&](auto level) {
    const auto use = [&](auto& kernel, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        tile_sums[t] = kernel.backward_scale(Tile(p, tiling, t));
    };
    run_tiles<RowKernel<A, level>, level>(tiling, threads, use, p, tiling);
  });
}

template <class A>
void forward_shared(const Problem& p, const Tiling& tiling, const Threads& threads,
                    double* tile_losses) {
  simd::with_level(
      [&](auto level) { SharedRows<A, level>(p, tiling, threads).forward(tile_losses); });
}

template <class A>
void backward_shared(const Problem& p, const Tiling& tiling, const Threads& threads) {
  simd::with_level([&](auto level) { SharedRows<A, level>(p, tiling, threads).backward(); });
}

}  // namespace fused_ce::cpu
