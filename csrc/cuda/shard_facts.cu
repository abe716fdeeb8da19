// What a shard's packet has besides its rows' sums: facts, of which the host knows some.
//
// The others are what the targets and the class weights add up to, and a hash of them and of the
// options, whose values may be in the device's memory. The host reads none of it.
#include "regimes.h"
#include "row/shard_target.cuh"

namespace fused_ce::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kOneBlockRows = 16384;
constexpr int64_t kEnoughBlocks = 256;

template <class A>
__device__ ShardScan scan_rows(const Problem& p) {
  ShardScan scan;
  const bool counts_bad = counts_bad_targets(p);
  const int64_t step = gridDim.x * int64_t{kThreads};
#pragma unroll 1
  for (int64_t r = blockIdx.x * int64_t{kThreads} + threadIdx.x; r < p.rows; r += step) {
    const RowIndex row(p, r);
    const ShardTarget target(p, row);
    scan.targets += hash_of_target(target.target, row.offset(p, p.row_max));
    if (target.is_own())
      scan.target_weights += sample_weight(p, row) * target.weight<A>(p);
    else if (target.is_no_class && counts_bad)
      scan.target_weights += sample_weight(p, row);
    if (target.is_no_class) scan.bad_target = target.target;
  }
  return scan;
}

template <class A>
__device__ double add_class_weights(const Problem& p) {
  double sum = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x; c < p.classes; c += kThreads) sum += class_weight<A>(p, c);
  return sum;
}

// The sum over the block, in its first warp.
__device__ ShardScan add_threads(ShardScan scan) {
  auto* warps = static_cast<ShardScan*>(shared_memory());
  scan = sum_lanes<kWarp>(scan);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = scan;
  __syncthreads();
  if (threadIdx.x < kWarp)
    scan = sum_lanes<kWarp>(threadIdx.x < kWarps ? warps[threadIdx.x] : ShardScan{});
  return scan;
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    shard_facts_kernel(const __grid_constant__ Problem p, void* packet, ShardHash hash,
                       const __grid_constant__ BlockSum<ShardScan> sums) {
  ShardScan scan;
  if (!p.probabilities) {
    scan = scan_rows<A>(p);
    if (p.is_smoothed() && blockIdx.x == 0) scan.class_weights = add_class_weights<A>(p);
    scan = add_threads(scan);
  }
  if (threadIdx.x >= kWarp) return;
  ShardScan all = scan;
  if (gridDim.x > 1 && !add_blocks(sums, scan, blockIdx.x, gridDim.x, all)) return;
  if (threadIdx.x != 0) return;
  ShardFacts facts;
  facts.target_weights = all.target_weights;
  facts.class_weights = all.class_weights;
  facts.first_class = p.first_class;
  facts.end_class = p.first_class + p.classes;
  facts.bad_target = p.allows_bad_targets() ? 0 : all.bad_target;
  facts.options = hash_of_options(hash, p.options);
  facts.targets = static_cast<uint32_t>(all.targets >> 32);
  Packet<A>(packet, p.rows, 0).store_facts(facts);
}

}  // namespace

int64_t shard_facts_blocks(const Problem& p) {
  if (p.rows <= kOneBlockRows || p.probabilities) return 1;
  constexpr int64_t kThreadRows = 8;
  const int64_t wanted = ceil_divide(p.rows, kThreads * kThreadRows);
  return wanted < kEnoughBlocks ? wanted : kEnoughBlocks;
}

void store_shard_facts(const Problem& p, const Shards& s, const BlockSum<ShardScan>& sums,
                       Stream stream) {
  const Grid grid{shard_facts_blocks(p), kThreads, kWarps * sizeof(ShardScan)};
  const auto kernel =
      p.accumulates_in_double() ? shard_facts_kernel<double> : shard_facts_kernel<float>;
  launch_kernel(kernel, grid, stream, p, s.packets, hash_of_numbers(p, s), sums);
}

}  // namespace fused_ce::cuda
