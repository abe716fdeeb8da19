// The sums and the gradient of one row of any layout, whose logits are read one by one.
#pragma once

#include "../row/coefficients.cuh"
#include "row_threads.cuh"

namespace fused_ce::cuda {

// One thread's part of the sums: the classes first, first + step, ...
template <bool kProbabilities, class Logits, class A, class Sums>
__device__ __forceinline__ void add_row(const Logits& row, const Coefficients<kProbabilities, A>& a,
                                        int64_t first, int64_t step, int64_t classes, Sums& sums) {
  constexpr int kUnroll = 4;  // logits on their way at a time
  for (int64_t c = first; c < classes; c += step * kUnroll) {
    A x[kUnroll];
    A max = sums.max;
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      x[i] = c + i * step < classes ? row[c + i * step] : -kInfinity<A>;
      max = larger(max, x[i]);
    }
    sums.template raise<true>(max, Exp{});
    const A base = base_of(max);
    TermSums<A> few;
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      few.add_logit(x[i], base, Exp{});
      if (a.spreads() && c + i * step < classes) few.add_gap(base - x[i], a(c + i * step));
    }
    sums.add(few);
  }
}

// The gradient of a row that does not count.
__device__ __forceinline__ void write_uncounted(const Problem& p, const RowIndex& row,
                                                const RowTarget& target, const Operand& to,
                                                int64_t first, int64_t step) {
  const double value = target.uncounted_value(p, row);
  const int64_t offset = row.offset(p, to);
  for (int64_t c = first; c < p.classes; c += step)
    store_value(value, to, offset + c * to.class_stride);
}

// One thread's part of the gradient of mapped logits, times `factor` and the slope of each:
// use(c, gradient). No logit is read but that of the class in use.
template <class T, bool kProbabilities, bool kMaps, class A, class Use>
__device__ __forceinline__ void for_gradient(const Problem& p, const RowIndex& row,
                                             const RowTarget& target, A max, A rest, double mass,
                                             A target_logit, double factor, const Constants& k,
                                             int64_t first, int64_t step, const Use& use) {
  const RowLogits<T, kMaps> logits(p, row);
  const Coefficients<kProbabilities, A> a(p, row, k.smoothing);
  const double scale = row_scale(p, row, k) * factor;
  const A weight = target.weight<A>(p);
  const auto gradient =
      row_gradient<kProbabilities>(max, rest, mass, target_logit, weight, scale, k);
#pragma unroll 2
  for (int64_t c = first; c < p.classes; c += step) {
    const auto [x, slope] = logits.mapped(c);
    A value = kProbabilities ? gradient.of_probability(x, a(c))
              : a.spreads()  ? gradient.of(x, a(c))
                             : gradient.of(x);
    if (!kProbabilities && c == target.index)
      value = target_gradient<true>(max, rest, x, weight, scale, k);
    use(c, slope * value);
  }
}

template <class T, bool kProbabilities, bool kMaps, class A>
__device__ __forceinline__ void write_gradient(const Problem& p, const RowIndex& row,
                                               const RowTarget& target, A max, A rest, double mass,
                                               A target_logit, const Constants& k, int64_t first,
                                               int64_t step) {
  T* grad = static_cast<T*>(p.grad.data) + row.offset(p, p.grad);
  for_gradient<T, kProbabilities, kMaps>(
      p, row, target, max, rest, mass, target_logit, RowLogits<T, kMaps>(p, row).factor(), k, first,
      step, [&](int64_t c, A value) { grad[c * p.grad.class_stride] = narrow<T>(value); });
}

// Calls use with two integral constants: whether the target is probabilities, and whether logits
// have a map.
template <class Use>
void with_row_kind(const Problem& p, const Use& use) {
  const auto with_target_kind = [&](auto maps) {
    p.probabilities ? use(std::true_type{}, maps) : use(std::false_type{}, maps);
  };
  p.maps_logits() ? with_target_kind(std::true_type{}) : with_target_kind(std::false_type{});
}

}  // namespace fused_ce::cuda
