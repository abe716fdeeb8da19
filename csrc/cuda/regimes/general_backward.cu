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
      write_uncounted(p, row, target, p.grad, threads.rank, shape.threads);
      continue;
    }
    if (!kProbabilities && threads.rank == 0) target.check(p);
    A target_logit = 0;
    if (!kProbabilities && p.is_focal()) {
      if (target.in_range(p)) target_logit = RowLogits<T, kMaps>(p, row)[target.index];
      threads.await();  // in place, it may be overwritten from here on
    }
    write_gradient<T, kProbabilities, kMaps>(
        p, row, target, load_max<A>(p, row), load_rest<A>(p, row),
        kProbabilities ? load_mass<A>(p, row) : 0.0, target_logit, k, threads.rank, shape.threads);
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
    const RowTarget target(p, row);
    if (!target.is_counted) {
      write_uncounted(p, row, target, p.target_grad, threads.rank, shape.threads);
      continue;
    }
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

// The gradient of the factor of all logits: that of each mapped logit, times the logit as it is.
template <class T, bool kProbabilities>
__global__ void __launch_bounds__(RowThreads::kBlock, 2)
    scale_backward_kernel(const __grid_constant__ Problem p,
                          const __grid_constant__ BlockSum<> sums, RowThreads::Shape shape) {
  using A = Accumulation<T>;
  auto& warps = *static_cast<double (*)[RowThreads::kBlock / kWarp]>(shared_memory());
  const RowThreads threads(shape);
  const Constants k(p);
  double sum = 0;
  for (int64_t r = threads.first_row(); r < p.rows; r += threads.row_step()) {
    const RowIndex row(p, r);
    const RowTarget target(p, row);
    if (!target.is_counted) {
      sum += target.uncounted_value(p, row);
      continue;
    }
    if (!kProbabilities && threads.rank == 0) target.check(p);
    const RowLogits<T, true> logits(p, row);
    const A target_logit = !kProbabilities && target.in_range(p) ? logits[target.index] : A(0);
    for_gradient<T, kProbabilities, true>(
        p, row, target, load_max<A>(p, row), load_rest<A>(p, row),
        kProbabilities ? load_mass<A>(p, row) : 0.0, target_logit, 1.0, k, threads.rank,
        shape.threads, [&](int64_t c, A gradient) {
          // A masked logit has no gradient, and is infinite.
          if (gradient != A(0)) sum += static_cast<double>(gradient) * logits.unmapped(c);
        });
  }
  sum = sum_lanes<kWarp>(sum);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  double of_block = 0, total;
  for (const double part : warps) of_block += part;
  if (add_blocks(sums, of_block, blockIdx.x, gridDim.x, total) && threadIdx.x == 0)
    *static_cast<double*>(p.scale_grad.data) = total;
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

void scale_backward(const Problem& p, const BlockSum<>& sums, const Device& device, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    const Grid grid{row_blocks(p, device), RowThreads::kBlock,
                    sizeof(double) * (RowThreads::kBlock / kWarp)};
    const auto kernel =
        p.probabilities ? scale_backward_kernel<T, true> : scale_backward_kernel<T, false>;
    launch_kernel(kernel, grid, stream, p, sums, row_shape(p));
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
