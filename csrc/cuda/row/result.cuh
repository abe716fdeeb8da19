// Where a forward kernel leaves what it found: losses row by row, or their sum, which the last
// block divides and rounds, once.
#pragma once

#include "block_sum.cuh"
#include "row.cuh"

namespace fused_ce::cuda {

// What a forward kernel is given besides the problem.
struct Result {
  BlockSum<> losses;
  Totals* totals;  // also to be stored here, where nobody has found them on the device
};

// For each row, by one thread.
template <class A, class Index, class Sums>
__device__ __forceinline__ void store_row(const Problem& p, const Index& row, A loss,
                                          const Sums& sums) {
  store_statistics(p, row, sums);
  if (!p.reduces()) store_value(loss, p.loss, row.offset(p, p.loss));
}

// For each block, by its first warp, with the sum of the block's losses in lane 0.
__device__ __forceinline__ void store_block(const Problem& p, const Result& result, double losses,
                                            int64_t block, int64_t blocks) {
  if (block == 0 && threadIdx.x % kWarp == 0 && result.totals)
    *result.totals = {p.known.weight_sum, denominator(p), z_denominator(p)};
  if (!p.reduces()) return;
  double total;
  if (!add_blocks(result.losses, losses, block, blocks, total)) return;
  if (threadIdx.x % kWarp == 0) {
    store_value(total / denominator(p), p.loss, 0);
  }
}

}  // namespace fused_ce::cuda
