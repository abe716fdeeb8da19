// What the rows of a shard come down to, of any layout: one read of the logits (shard.h).
//
// A warp or a block walks along the row, as in general_forward.cu. A target that is no class is no
// matter here: whether it is an error is for the merge to say, once every process has got there.
#include "../regimes.h"
#include "../row/shard_target.cuh"
#include "general.cuh"

namespace fused_ce::cuda {

namespace {

template <class A>
__device__ __forceinline__ void store_number(double value, const Operand& to, const Problem& p,
                                             const RowIndex& row) {
  static_cast<A*>(to.data)[row.offset(p, to)] = static_cast<A>(value);
}

template <class T, bool kProbabilities, bool kMaps>
__global__ void __launch_bounds__(RowThreads::kBlock, 2)
    shard_forward_kernel(const __grid_constant__ Problem p, RowThreads::Shape shape) {
  using A = Accumulation<T>;
  using Sums = LogitSums<A, true>;  // the mass goes into every element of the gradient
  auto& shared = *static_cast<RowThreads::Shared<Sums>*>(shared_memory());
  const RowThreads threads(shape);
  const Smoothing<double> smoothing(p.options.label_smoothing, p.vocabulary);
  for (int64_t r = threads.first_row(); r < p.rows; r += threads.row_step()) {
    const RowIndex row(p, r);
    const ShardTarget target(p, row);
    Sums sums;
    if (target.is_counted) {
      const RowLogits<T, kMaps> logits(p, row);
      add_row(logits, Coefficients<kProbabilities, A>(p, row, smoothing), threads.rank,
              shape.threads, p.classes, sums);
      threads.add(sums, shared);
      sums.close();
      if (!kProbabilities && threads.rank == 0 && target.is_own()) {
        const double gap = static_cast<double>(base_of(sums.max)) - logits[target.index];
        const double coefficient = smoothing.hard * target.weight<A>(p);
        sums.gaps += coefficient_gap(coefficient, gap);
        sums.mass += coefficient;
      }
    } else {
      sums.max = 0;
    }
    if (threads.rank != 0) continue;
    store_number<A>(sums.max, p.row_max, p, row);
    store_number<A>(sums.rest, p.row_rest, p, row);
    store_number<A>(sums.gaps, p.row_gaps, p, row);
    store_number<A>(sums.mass, p.row_mass, p, row);
  }
}

}  // namespace

void shard_forward(const Problem& p, const Device& device, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    using Shared = RowThreads::Shared<LogitSums<Accumulation<T>, true>>;
    const Grid grid{row_blocks(p, device), RowThreads::kBlock, sizeof(Shared)};
    with_row_kind(p, [&](auto probabilities, auto maps) {
      const auto kernel = shard_forward_kernel<T, probabilities, maps>;
      launch_kernel(kernel, grid, stream, p, row_shape(p));
    });
  });
}

}  // namespace fused_ce::cuda
