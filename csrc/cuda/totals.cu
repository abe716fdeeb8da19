// What all rows have in common: the sum of the class weights, and what the mean divides by.
//
// The host never reads it. Where few rows make one block enough, that block also sets the tickets
// of the launch that follows to zero; else a memset does, and the last block of this launch adds
// up.
#include "regimes.h"
#include "row/row.cuh"

namespace fused_ce::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kOneBlockRows = 16384;
constexpr int64_t kEnoughBlocks = 256;

struct Shared {
  double warps[kWarps];
};

// Whether the mean divides by what the rows that count add up to.
__host__ __device__ bool counts_rows(const Problem& p) {
  return p.divides() && !p.options.denominator.data;
}

// The sum over the block, in thread 0; in the others of its warp as well.
__device__ double add_threads(double x, Shared& shared) {
  x = sum_lanes<kWarp>(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x < kWarp)
    x = sum_lanes<kWarp>(threadIdx.x < kWarps ? shared.warps[threadIdx.x] : 0.0);
  return x;
}

template <class A>
__device__ double add_counted_rows(const Problem& p) {
  double counted = 0;
  const int64_t step = gridDim.x * int64_t{kThreads};
#pragma unroll 4
  for (int64_t r = blockIdx.x * int64_t{kThreads} + threadIdx.x; r < p.rows; r += step) {
    const RowTarget target(p, RowIndex(p, r));
    if (!target.is_counted) continue;
    target.check(p);
    counted += target.weight<A>(p);
  }
  return counted;
}

template <class A>
__device__ double add_class_weights(const Problem& p) {
  double sum = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x; c < p.classes; c += kThreads) sum += class_weight<A>(p, c);
  return sum;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    totals_kernel(const __grid_constant__ Problem p, const __grid_constant__ TotalsWork work) {
  Shared& shared = *static_cast<Shared*>(shared_memory());
  if (gridDim.x == 1)
    for (int64_t i = threadIdx.x; i < work.ticket_count; i += kThreads) work.tickets[i] = 0;
  const bool sums_weights = p.options.weight.data && p.is_smoothed();
  double weight_sum = static_cast<double>(p.classes);
  if (sums_weights && blockIdx.x == 0) weight_sum = add_threads(add_class_weights<A>(p), shared);
  double counted = 0;
  if (counts_rows(p)) counted = add_threads(add_counted_rows<A>(p), shared);

  const auto store = [&](double Totals::* total, double x) {
    work.totals->*total = x;
    if (work.kept_totals) work.kept_totals->*total = x;
  };
  if (blockIdx.x == 0 && threadIdx.x == 0) store(&Totals::weight_sum, weight_sum);
  if (threadIdx.x >= kWarp) return;
  double total = counted;
  if (gridDim.x > 1 && !add_blocks(work.weights, counted, blockIdx.x, gridDim.x, total)) return;
  if (threadIdx.x != 0) return;
  // A total weight of zero makes the mean nan, also where smoothing leaves a loss to divide.
  const bool is_undefined = total == 0.0 && p.is_smoothed();
  const double mean = is_undefined ? kNan<double> : total;
  const double given = p.options.denominator.data ? denominator(p) : p.known.denominator;
  store(&Totals::denominator, counts_rows(p) ? mean : given);
}

}  // namespace

bool needs_totals(const Problem& p) {
  if (p.probabilities) return false;
  return counts_rows(p) || (p.options.weight.data && p.is_smoothed());
}

int64_t totals_blocks(const Problem& p) {
  if (p.rows <= kOneBlockRows || !counts_rows(p)) return 1;
  constexpr int64_t kThreadRows = 8;
  const int64_t wanted = ceil_divide(p.rows, kThreads * kThreadRows);
  return wanted < kEnoughBlocks ? wanted : kEnoughBlocks;
}

void find_totals(const Problem& p, const TotalsWork& work, Stream stream) {
  const Grid grid{totals_blocks(p), kThreads, sizeof(Shared)};
  if (p.accumulates_in_double())
    launch_kernel(totals_kernel<double>, grid, stream, p, work);
  else
    launch_kernel(totals_kernel<float>, grid, stream, p, work);
}

}  // namespace fused_ce::cuda
