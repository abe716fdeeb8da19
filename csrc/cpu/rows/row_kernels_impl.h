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

// Calls use(kernel, begin, end) for all tiles, compiled once for one level of simd.h.
template <class Kernel, simd::Level kLevel, class Use>
void run_tiles(const Problem& p, const Tiling& tiling, const Threads& threads, const Use& use) {
  const auto use_at_level = [&](Kernel& kernel, int64_t begin, int64_t end) {
    simd::run_as<kLevel>([&] { use(kernel, begin, end); });
  };
  if (tiling.count == 0) return;
  if (!is_shared(tiling))
    return with_stack_room([&] {
      Kernel kernel(p, tiling);
      use_at_level(kernel, 0, tiling.count);
    });
  Kernels<Kernel> kernels(p, tiling);
  run_parts(threads, tiling.count, tiling.grain, [&](int64_t begin, int64_t end) {
    kernels.lend([&](Kernel& kernel) { use_at_level(kernel, begin, end); });
  });
}

template <class A, class Use>
void run_tiles(const Problem& p, const Tiling& tiling, const Threads& threads, const Use& use) {
  simd::with_level([&](auto level) {
    if (prefers_lanes(p))
      run_tiles<LaneKernel<A, level>, level>(p, tiling, threads, use);
    else
      run_tiles<RowKernel<A, level>, level>(p, tiling, threads, use);
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
    run_tiles<RowKernel<A, level>, level>(
        p, tiling, threads, [&](auto& kernel, int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; t++)
            tile_sums[t] = kernel.backward_scale(Tile(p, tiling, t));
        });
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
