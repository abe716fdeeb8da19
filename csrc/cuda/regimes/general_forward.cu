// The loss of any problem at all: whatever the strides, the types and the kind of target.
//
// A warp or a block walks along the row for the sums, taking the maximum as it comes, and a second
// time for the gradient; by then most of the row is in the cache. The other kernels serve narrower
// cases faster.
#include "../regimes.h"
#include "general.cuh"

namespace fused_ce::cuda {

namespace {

template <class T, bool kProbabilities, bool kMaps>
__global__ void __launch_bounds__(RowThreads::kBlock, 2)
    general_forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Result result,
                           RowThreads::Shape shape) {
  using A = Accumulation<T>;
  using Sums = LogitSums<A, kProbabilities>;
  auto& shared = *static_cast<RowThreads::Shared<Sums>*>(shared_memory());
  const RowThreads threads(shape);
  const Constants k(p);
  double losses = 0;
  for (int64_t r = threads.first_row(); r < p.rows; r += threads.row_step()) {
    const RowIndex row(p, r);
    const RowTarget target(p, row);
    if (!target.is_counted) {
      if (p.grad.data) write_uncounted(p, row, target, p.grad, threads.rank, shape.threads);
      if (threads.rank == 0) {
        const A loss = target.uncounted_value(p, row);
        store_row(p, row, loss, Sums{});
        losses += loss;
      }
      continue;
    }
    const RowLogits<T, kMaps> logits(p, row);
    if (!kProbabilities && threads.rank == 0) target.check(p);
    // By all threads: in place, one of them writes where it is before others are through.
    const A target_logit = !kProbabilities && target.in_range(p) ? logits[target.index] : A(0);
    Sums sums;
    add_row(logits, Coefficients<kProbabilities, A>(p, row, k.smoothing), threads.rank,
            shape.threads, p.classes, sums);
    threads.add(sums, shared);
    sums.close();
    if (threads.rank == 0) {
      const auto loss =
          row_loss<kProbabilities, true>(p, row, sums, target_logit, target.weight<A>(p), k);
      store_row(p, row, loss, sums);
      losses += loss;
    }
    if (p.grad.data)
      write_gradient<T, kProbabilities, kMaps>(p, row, target, sums.max, sums.rest, sums.mass,
                                               target_logit, k, threads.rank, shape.threads);
  }
  threads.finish(p, result, losses, shared);
}

}  // namespace

int64_t general_blocks(const Problem& p, const Device& device) { return row_blocks(p, device); }

void general_forward(const Problem& p, const Result& result, const Device& device, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    using Larger = RowThreads::Shared<LogitSums<Accumulation<T>, true>>;
    const Grid grid{row_blocks(p, device), RowThreads::kBlock, sizeof(Larger)};
    with_row_kind(p, [&](auto probabilities, auto maps) {
      const auto kernel = general_forward_kernel<T, probabilities, maps>;
      launch_kernel(kernel, grid, stream, p, result, row_shape(p));
    });
  });
}

}  // namespace fused_ce::cuda
