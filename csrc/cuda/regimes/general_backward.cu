// The gradient of any problem at all, from the logits and the row statistics.
#include "../regimes.h"
#include "general.cuh"

namespace fused_ce::cuda {

namespace {

template <class T, bool kProbabilities, bool kMaps>
__global__ void __launch_bounds__(RowThreads::kBlock, 2)
    general_backward_kernel(const __grid_constant__ Problem p, When when, RowThreads::Shape shape) {
  using A = Accumulation<T>;
  if (when == When::kUnlessGradOutputIsOne && grad_output_is_one(p)) return;
  const RowThreads threads(shape);
  const Constants k(p);
  for (int64_t r = threads.first_row(); r < p.rows; r += threads.row_step()) {
    const RowIndex row(p, r);
    const RowTarget target(p, row);
    if (!target.is_counted) {
      write_zeros<T>(p, row, threads.rank, shape.threads);
      continue;
    }
    if (!kProbabilities && threads.rank == 0) target.check(p);
    write_gradient<T, kProbabilities, kMaps>(
        p, row, target, load_max<A>(p, row), load_rest<A>(p, row),
        kProbabilities ? load_mass<A>(p, row) : 0.0, k, threads.rank, shape.threads);
  }
}

template <class T, bool kMaps>
__global__ void __launch_bounds__(RowThreads::kBlock, 2)
    target_backward_kernel(const __grid_constant__ Problem p, RowThreads::Shape shape) {
  using A = Accumulation<T>;
  const RowThreads threads(shape);
  const Constants k(p);
  for (int64_t r = threads.first_row(); r < p.rows; r += threads.row_step()) {
    const RowIndex row(p, r);
    const RowLogits<T, kMaps> logits(p, row);
    const A max = load_max<A>(p, row);
    const A log_total = log1p_nonnegative(defined_rest(load_rest<A>(p, row), max));
    const A scale = static_cast<A>(row_scale(p, row, k));
    const Smoothing<A> smoothing(k.smoothing);
    const int64_t offset = row.offset(p, p.target_grad);
    for (int64_t c = threads.rank; c < p.classes; c += shape.threads) {
      const A value =
          probability_grad(max - logits[c], log_total, class_weight<A>(p, c), smoothing);
      store_value(scale * value, p.target_grad, offset + c * p.target_grad.class_stride);
    }
  }
}

}  // namespace

void general_backward(const Problem& p, const Device& device, When when, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    const Grid grid{row_blocks(p, device), RowThreads::kBlock};
    with_row_kind(p, [&](auto probabilities, auto maps) {
      const auto kernel = general_backward_kernel<T, probabilities, maps>;
      launch_kernel(kernel, grid, stream, p, when, row_shape(p));
    });
  });
}

void target_backward(const Problem& p, const Device& device, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    const Grid grid{row_blocks(p, device), RowThreads::kBlock};
    using T = decltype(zero);
    const auto kernel =
        p.maps_logits() ? target_backward_kernel<T, true> : target_backward_kernel<T, false>;
    launch_kernel(kernel, grid, stream, p, row_shape(p));
  });
}

}  // namespace fused_ce::cuda
