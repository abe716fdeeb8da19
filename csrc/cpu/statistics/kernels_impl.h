// The definitions behind kernels.h, for the files that compile them.
#pragma once

#include "../vector/simd.h"
#include "kernels.h"
#include "lane_kernel.h"
#include "row_kernel.h"

namespace fused_ce::cpu {

// Calls use(kernel) with the kernel for the problem.
template <class A, class Use>
void with_statistics_kernel(const Problem& p, const Statistics& s, const Use& use) {
  simd::with_level([&](auto level) {
    simd::run_as<level>([&] {
      if (statistics_prefer_lanes(p)) {
        StatisticsLaneKernel<A, level> kernel(p, s);
        use(kernel);
      } else {
        StatisticsRowKernel<A, level> kernel(p, s);
        use(kernel);
      }
    });
  });
}

template <class A>
void statistics_tiles(const Problem& p, const Statistics& s, const Tiling& tiling, int64_t begin,
                      int64_t end) {
  with_statistics_kernel<A>(p, s, [&](auto& kernel) {
    for (int64_t t = begin; t < end; t++) kernel.forward(Tile(p, tiling, t));
  });
}

template <class A>
void statistics_backward_tiles(const Problem& p, const Statistics& s, const Tiling& tiling,
                               int64_t begin, int64_t end) {
  with_statistics_kernel<A>(p, s, [&](auto& kernel) {
    for (int64_t t = begin; t < end; t++) kernel.backward(Tile(p, tiling, t));
  });
}

}  // namespace fused_ce::cpu
