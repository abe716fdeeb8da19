// The definitions behind row_kernels.h, for the files that compile them.
#pragma once

#include "../vector/simd.h"
#include "lane_kernel.h"
#include "row_kernel.h"
#include "row_kernels.h"
#include "shared_rows.h"

namespace fused_ce::cpu {

bool prefers_lanes(const Problem& p);

template <class Kernel>
void run_forward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
                 double* tile_losses, TargetScan* scans) {
  Kernel kernel(p, tiling);
  for (int64_t t = begin; t < end; t++) {
    const Tile tile(p, tiling, t);
    if (scans) scans[t] = scan_tile(p, tile, p.options.weight.data);
    tile_losses[t] = kernel.forward(tile);
  }
}

template <class Kernel>
void run_backward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  Kernel kernel(p, tiling);
  for (int64_t t = begin; t < end; t++) kernel.backward(Tile(p, tiling, t));
}

template <class Kernel>
void run_backward_target(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  Kernel kernel(p, tiling);
  for (int64_t t = begin; t < end; t++) kernel.backward_target(Tile(p, tiling, t));
}

template <class A>
void forward_tiles(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
                   double* tile_losses, TargetScan* scans) {
  simd::with_level([&](auto level) {
    simd::run_as<level>([&] {
      if (prefers_lanes(p))
        run_forward<LaneKernel<A, level>>(p, tiling, begin, end, tile_losses, scans);
      else
        run_forward<RowKernel<A, level>>(p, tiling, begin, end, tile_losses, scans);
    });
  });
}

template <class A>
void backward_tiles(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  simd::with_level([&](auto level) {
    simd::run_as<level>([&] {
      if (prefers_lanes(p))
        run_backward<LaneKernel<A, level>>(p, tiling, begin, end);
      else
        run_backward<RowKernel<A, level>>(p, tiling, begin, end);
    });
  });
}

template <class A>
void backward_target_tiles(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  simd::with_level([&](auto level) {
    simd::run_as<level>([&] {
      if (prefers_lanes(p))
        run_backward_target<LaneKernel<A, level>>(p, tiling, begin, end);
      else
        run_backward_target<RowKernel<A, level>>(p, tiling, begin, end);
    });
  });
}

template <class A>
void backward_scale_tiles(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
                          double* tile_sums) {
  simd::with_level([&](auto level) {
    simd::run_as<level>([&] {
      RowKernel<A, level> kernel(p, tiling);
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
