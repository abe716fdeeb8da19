// What all rows have in common: the sum of the class weights, and what the mean divides by.
//
// The host never reads it. Where few rows make one block enough, that block also sets the tickets
// of the launch that follows to zero; else a memset does, and the last block of this launch adds
// up. Of sharded classes it is the packets that say what the weights are, and whether the shards
// belong together.
#include "../shard.h"
#include "regimes.h"
#include "row/row.cuh"

namespace fused_ce::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kOneBlockRows = 16384;
constexpr int64_t kEnoughBlocks = 256;

struct Shared {
  CountedRows warps[kWarps];
};

// Whether it matters to the mean which rows count.
__host__ __device__ bool counts_rows(const Problem& p) {
  const bool is_known = p.probabilities && !p.weighs_samples();
  return p.divides() && !is_known &&
         (!p.options.denominator.data || p.options.on_all_ignored == OnAllIgnored::kZero);
}

// The sum over the block, in thread 0; in the others of its warp as well.
__device__ CountedRows add_threads(CountedRows x, Shared& shared) {
  x = sum_lanes<kWarp>(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x < kWarp)
    x = sum_lanes<kWarp>(threadIdx.x < kWarps ? shared.warps[threadIdx.x] : CountedRows{});
  return x;
}

template <class A>
__device__ CountedRows add_counted_rows(const Problem& p) {
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t step = gridDim.x * int64_t{kThreads};
  if (!p.options.weight.data && !p.weighs_samples() && !p.allows_bad_targets()) {
    double rows = 0;
#pragma unroll 4
    for (int64_t r = first; r < p.rows; r += step) {
      const RowTarget target(Plain{}, p, RowIndex(p, r));
      if (!target.is_counted) continue;
      target.check(p);
      rows += 1.0;
    }
    return {rows, rows, rows};
  }
  CountedRows counted;
#pragma unroll 1  // more would take more registers than there are
  for (int64_t r = first; r < p.rows; r += step) {
    const RowIndex row(p, r);
    const RowTarget target(Plain{}, p, row);
    const double of_sample = sample_weight(p, row);
    if (!target.is_counted || of_sample == 0.0) continue;
    // A row whose class is none counts for the mean, as one of weight 1, where there may be such.
    if (!p.allows_bad_targets() && !p.probabilities) target.check(p);
    counted += {of_sample * target.weight<A>(p), of_sample, 1.0};
  }
  return counted;
}

template <class A>
__device__ CountedRows add_class_weights(const Problem& p) {
  double sum = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x; c < p.classes; c += kThreads) sum += class_weight<A>(p, c);
  return {sum, 0.0, 0.0};
}

// Stops the kernel unless what a shard says goes with the one before it and with the first.
__device__ void check_facts(const Problem& p, const ShardFacts& facts, const ShardFacts& first,
                            int64_t begin, bool is_last) {
  const bool is_refused = facts.first_class == kRefused;
  assert(!is_refused && "a rank refused its arguments; its own error says why");
  const bool begins_there = facts.first_class == begin && facts.end_class >= begin;
  assert(begins_there && "the classes of a rank should begin where those before it end");
  const bool has_same_options = facts.options == first.options;
  assert(has_same_options && "the options of a rank differ from those of rank 0");
  const bool has_same_targets = facts.targets == first.targets;
  assert(has_same_targets && "the targets of a rank differ from those of rank 0");
  const bool ends_there = !is_last || facts.end_class == p.vocabulary;
  assert(ends_there && "the shards should end with the last class");
  const int64_t t = facts.bad_target, n_classes = p.vocabulary;
  assert(t >= 0 && t < n_classes);  // as PyTorch words it
}

// What the facts of all shards add up to, for all lanes of a warp.
template <class A>
__device__ ShardScan add_facts(const Problem& p, const ShardPackets& packets) {
  const auto facts_of = [&](int64_t shard) {
    return Packet<A>(packets.data, p.rows, shard).load_facts();
  };
  ShardScan all;
  for (int64_t shard = threadIdx.x % kWarp; shard < packets.count; shard += kWarp) {
    const ShardFacts facts = facts_of(shard);
    const int64_t begin = shard == 0 ? 0 : facts_of(shard - 1).end_class;
    check_facts(p, facts, facts_of(0), begin, shard == packets.count - 1);
    all.target_weights += facts.target_weights;
    all.class_weights += facts.class_weights;
  }
  return sum_lanes<kWarp>(all);
}

template <class A, bool kShards>
__global__ void __launch_bounds__(kThreads, 1)
    totals_kernel(const __grid_constant__ Problem p, const __grid_constant__ TotalsWork work) {
  Shared& shared = *static_cast<Shared*>(shared_memory());
  if (gridDim.x == 1)
    for (int64_t i = threadIdx.x; i < work.ticket_count; i += kThreads) work.tickets[i] = 0;
  const bool sums_weights = !p.probabilities && p.options.weight.data && p.is_smoothed();
  double weight_sum = static_cast<double>(p.classes);
  if (sums_weights && blockIdx.x == 0)
    weight_sum = add_threads(add_class_weights<A>(p), shared).weights;
  CountedRows counted;
  if (counts_rows(p)) counted = add_threads(add_counted_rows<A>(p), shared);

  const auto store = [&](double Totals::* total, double x) {
    work.totals->*total = x;
    if (work.kept_totals) work.kept_totals->*total = x;
  };
  if (!kShards && blockIdx.x == 0 && threadIdx.x == 0) store(&Totals::weight_sum, weight_sum);
  if (threadIdx.x >= kWarp) return;
  CountedRows total = counted;
  if (gridDim.x > 1 && !add_blocks(work.counted, counted, blockIdx.x, gridDim.x, total)) return;
  ShardScan facts;
  if constexpr (kShards) facts = add_facts<A>(p, work.packets);
  if (threadIdx.x != 0) return;
  if constexpr (kShards) {
    store(&Totals::weight_sum, facts.class_weights);
    if (work.packets.has_weights && !p.probabilities) total.weights = facts.target_weights;
  }
  const auto store_denominators = [&](double of_losses, double of_z_losses) {
    store(&Totals::denominator, of_losses);
    store(&Totals::z_denominator, of_z_losses);
  };
  const bool is_zero = p.options.on_all_ignored == OnAllIgnored::kZero && total.rows == 0.0;
  const auto* given = static_cast<const double*>(p.options.denominator.data);
  if (counts_rows(p) && is_zero) {
    store_denominators(1.0, 1.0);
  } else if (given || !counts_rows(p)) {
    const double known = p.known.denominator;
    store_denominators(given ? given[0] : known,
                       given ? given[p.options.denominator.count - 1] : known);
  } else {
    // A total weight of zero makes the mean nan, also where smoothing leaves a loss to divide.
    const bool is_undefined = total.weights == 0.0 && p.is_smoothed();
    store_denominators(is_undefined ? kNan<double> : total.weights, total.samples);
  }
}

}  // namespace

bool needs_totals(const Problem& p) {
  return counts_rows(p) || (!p.probabilities && p.options.weight.data && p.is_smoothed());
}

int64_t totals_blocks(const Problem& p) {
  if (p.rows <= kOneBlockRows || !counts_rows(p)) return 1;
  constexpr int64_t kThreadRows = 8;
  const int64_t wanted = ceil_divide(p.rows, kThreads * kThreadRows);
  return wanted < kEnoughBlocks ? wanted : kEnoughBlocks;
}

void find_totals(const Problem& p, const TotalsWork& work, Stream stream) {
  const Grid grid{totals_blocks(p), kThreads, sizeof(Shared)};
  const auto launch = [&](auto zero) {
    using A = decltype(zero);
    const auto kernel = work.packets.data ? totals_kernel<A, true> : totals_kernel<A, false>;
    launch_kernel(kernel, grid, stream, p, work);
  };
  p.accumulates_in_double() ? launch(double{}) : launch(float{});
}

}  // namespace fused_ce::cuda
