// The rows of the whole vocabulary, from the packets of all its shards, each row by one thread, in
// the order of the shards and in double (shard.h).
#include "../../shard.h"
#include "../regimes.h"

namespace fused_ce::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / kWarp;

// What a row comes down to; zeros for one that does not count.
struct MergedRow {
  double max = 0, rest = 0, mass = 0, loss = 0;
};

template <class A>
__device__ __forceinline__ MergedRow merge_row(const Problem& p, const Shards& s, int64_t row,
                                               const Constants& k) {
  RowSums<double> sums;
#pragma unroll 2
  for (int64_t shard = 0; shard < s.count; shard++)
    Packet<A>(s.packets, p.rows, shard).merge_into(sums, row, Exp{});
  sums.close();
  const double rest = defined_rest(sums.rest, sums.max);
  const double loss = probability_row(sums.max, rest, sums.mass, k).loss(sums.gaps);
  return {sums.max, sums.rest, sums.mass, loss};
}

__device__ __forceinline__ void store_number(double value, const Operand& to, const Problem& p,
                                             const RowIndex& row) {
  static_cast<double*>(to.data)[row.offset(p, to)] = value;
}

// In the first warp of the block.
__device__ __forceinline__ double add_losses(double losses) {
  auto* warps = static_cast<double*>(shared_memory());
  losses = sum_lanes<kWarp>(losses);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = losses;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return sum_lanes<kWarp>(lane < kWarps ? warps[lane] : 0.0);
}

template <class A>
__global__ void __launch_bounds__(kBlock, 2)
    shard_merge_kernel(const __grid_constant__ Problem p, const __grid_constant__ Shards s,
                       const __grid_constant__ Result result) {
  const Constants k(p);
  const int64_t step = gridDim.x * int64_t{kBlock};
  double losses = 0;
  for (int64_t r = blockIdx.x * int64_t{kBlock} + threadIdx.x; r < p.rows; r += step) {
    const RowIndex row(p, r);
    const RowTarget target(p, row);
    MergedRow merged;
    if (target.is_counted) {
      if (!p.probabilities) target.check(p);
      merged = merge_row<A>(p, s, row.offset(p, p.row_max), k);
      merged.loss *= sample_weight(p, row);
    } else {
      merged.loss = target.uncounted_value(p, row);
    }
    store_number(merged.max, s.max, p, row);
    store_number(merged.rest, s.rest, p, row);
    store_number(merged.mass, s.mass, p, row);
    if (!p.reduces()) store_value(merged.loss, p.loss, row.offset(p, p.loss));
    losses += merged.loss;
  }
  losses = add_losses(losses);
  if (threadIdx.x < kWarp) store_block(p, result, losses, blockIdx.x, gridDim.x);
}

}  // namespace

// Even without rows it is one: there is a mean to be written.
int64_t shard_merge_blocks(const Problem& p, const Device& device) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t wanted = ceil_divide(p.rows, kBlock);
  const int64_t most = device.multiprocessors * kBlocksPerMultiprocessor;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

void shard_merge(const Problem& p, const Shards& s, const Result& result, const Device& device,
                 Stream stream) {
  const Grid grid{shard_merge_blocks(p, device), kBlock, kWarps * sizeof(double)};
  const auto kernel =
      p.accumulates_in_double() ? shard_merge_kernel<double> : shard_merge_kernel<float>;
  launch_kernel(kernel, grid, stream, p, s, result);
}

}  // namespace fused_ce::cuda
