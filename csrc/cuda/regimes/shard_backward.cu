// The gradients of a shard, of any layout, from its logits and what rows of the whole vocabulary
// come down to (shard.h). The columns after its classes get a gradient of 0.
#include "../regimes.h"
#include "../row/shard_target.cuh"
#include "general.cuh"

namespace fused_ce::cuda {

namespace {

// A row of the whole vocabulary, from its statistics.
__device__ __forceinline__ double load_number(const Operand& from, const Problem& p,
                                              const RowIndex& row) {
  return static_cast<const double*>(from.data)[row.offset(p, from)];
}

template <bool kProbabilities, class A>
__device__ __forceinline__ RowGradient<A> shard_gradient(double max, double rest, double mass,
                                                         const ShardTarget& target, A target_weight,
                                                         double scale, const Constants& k) {
  const A base = static_cast<A>(base_of(max)), own_scale = static_cast<A>(scale);
  const double factor =
      !kProbabilities && target.is_own()
          ? exact_index_row<>(max, rest, max, static_cast<double>(target_weight), k).exp_factor()
          : probability_row(max, defined_rest(rest, max), mass, k).exp_factor();
  if (!kProbabilities)
    return {base, static_cast<A>(k.spreads() ? factor : scale * factor), own_scale};
  const double lost = factor - static_cast<A>(factor);
  const bool has_rest = k.z_loss != 0.0 && lost - lost == 0.0;  // finite
  return {base, static_cast<A>(factor), own_scale, has_rest ? static_cast<A>(lost) : A(0)};
}

// A thread reads no logit but those whose places it writes.
template <class T, bool kProbabilities, bool kMaps>
__global__ void __launch_bounds__(RowThreads::kBlock, 2)
    shard_backward_kernel(const __grid_constant__ Problem p, const __grid_constant__ Shards s,
                          RowThreads::Shape shape) {
  using A = Accumulation<T>;
  const RowThreads threads(shape);
  const Constants k(p);
  for (int64_t r = threads.first_row(); r < p.rows; r += threads.row_step()) {
    const RowIndex row(p, r);
    const ShardTarget target(p, row);
    if (threads.rank == 0) target.check(p);
    T* grad = static_cast<T*>(p.grad.data) + row.offset(p, p.grad);
    const auto store = [&](int64_t c, A value) {
      grad[c * p.grad.class_stride] = narrow<T>(value);
    };
    for (int64_t c = p.classes + threads.rank; c < p.classes + s.padding; c += shape.threads)
      store(c, A(0));
    if (!target.is_counted) {
      for (int64_t c = threads.rank; c < p.classes; c += shape.threads)
        store(c, target.uncounted_value());
      continue;
    }
    const RowLogits<T, kMaps> logits(p, row);
    const Coefficients<kProbabilities, A> a(p, row, k.smoothing);
    const double scale = row_scale(p, row, k) * logits.factor();
    const double max = load_number(p.row_max, p, row), rest = load_number(p.row_rest, p, row);
    const A weight = target.is_own() ? target.weight<A>(p) : A(1);
    const auto gradient = shard_gradient<kProbabilities>(max, rest, load_number(p.row_mass, p, row),
                                                         target, weight, scale, k);
#pragma unroll 2
    for (int64_t c = threads.rank; c < p.classes; c += shape.threads) {
      const auto [x, slope] = logits.mapped(c);
      A value = kProbabilities ? gradient.of_probability(x, a(c))
                : a.spreads()  ? gradient.of(x, a(c))
                               : gradient.of(x);
      if (!kProbabilities && c == target.index)
        value = static_cast<A>(target_gradient<>(max, rest, static_cast<double>(x),
                                                 static_cast<double>(weight), scale, k));
      store(c, slope * value);
    }
  }
}

template <class T, bool kMaps>
__global__ void __launch_bounds__(RowThreads::kBlock, 2)
    shard_target_backward_kernel(const __grid_constant__ Problem p,
                                 const __grid_constant__ Shards s, RowThreads::Shape shape) {
  using A = Accumulation<T>;
  const RowThreads threads(shape);
  const Constants k(p);
  for (int64_t r = threads.first_row(); r < p.rows; r += threads.row_step()) {
    const RowIndex row(p, r);
    const bool is_counted = ShardTarget(p, row).is_counted;
    const RowLogits<T, kMaps> logits(p, row);
    const double max = load_number(p.row_max, p, row);
    const double rest = defined_rest(load_number(p.row_rest, p, row), max);
    const A log_total = static_cast<A>(log1p_nonnegative(rest)), largest = static_cast<A>(max);
    const A scale = static_cast<A>(row_scale(p, row, k));
    const Smoothing<A> smoothing(k.smoothing);
    const int64_t offset = row.offset(p, p.target_grad);
    for (int64_t c = threads.rank; c < p.classes + s.padding; c += shape.threads) {
      A value = 0;
      if (is_counted && c < p.classes)
        value = scale *
                probability_grad(largest - logits[c], log_total, class_weight<A>(p, c), smoothing);
      store_value(value, p.target_grad, offset + c * p.target_grad.class_stride);
    }
  }
}

}  // namespace

void shard_backward(const Problem& p, const Shards& s, const Device& device, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    const Grid grid{row_blocks(p, device), RowThreads::kBlock};
    with_row_kind(p, [&](auto probabilities, auto maps) {
      const auto kernel = shard_backward_kernel<T, probabilities, maps>;
      launch_kernel(kernel, grid, stream, p, s, row_shape(p));
    });
  });
}

void shard_target_backward(const Problem& p, const Shards& s, const Device& device, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    const Grid grid{row_blocks(p, device), RowThreads::kBlock};
    const auto kernel = p.maps_logits() ? shard_target_backward_kernel<T, true>
                                        : shard_target_backward_kernel<T, false>;
    launch_kernel(kernel, grid, stream, p, s, row_shape(p));
  });
}

}  // namespace fused_ce::cuda
