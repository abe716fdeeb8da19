// The sums and the gradient of one row of any layout, whose logits are read one by one.
#pragma once

#include "../row/coefficients.cuh"
#include "row_threads.cuh"

namespace fused_ce::cuda {

// One thread's part of the sums: the classes first, first + step, ...
template <bool kProbabilities, class T, class A>
__device__ __forceinline__ void add_row(const RowLogits<T>& row,
                                        const Coefficients<kProbabilities, A>& a, int64_t first,
                                        int64_t step, int64_t classes,
                                        LogitSums<A, kProbabilities>& sums) {
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

template <class T>
__device__ __forceinline__ void write_zeros(const Problem& p, const RowIndex& row, int64_t first,
                                            int64_t step) {
  T* grad = static_cast<T*>(p.grad.data) + row.offset(p, p.grad);
  for (int64_t c = first; c < p.classes; c += step) grad[c * p.grad.class_stride] = T{};
}

// One thread's part of the gradient. It reads no logit but those whose places it writes.
template <class T, bool kProbabilities, class A>
__device__ __forceinline__ void write_gradient(const Problem& p, const RowIndex& row,
                                               const RowTarget& target, A max, A rest, double mass,
                                               const Constants& k, int64_t first, int64_t step) {
  const RowLogits<T> logits(p, row);
  const Coefficients<kProbabilities, A> a(p, row, k.smoothing);
  const double scale = row_scale(p, row, k);
  const A weight = target.weight<A>(p);
  const RowGradient<A> gradient = kProbabilities ? probability_gradient(max, rest, mass, scale)
                                                 : index_gradient(max, rest, weight, scale, k);
  T* grad = static_cast<T*>(p.grad.data) + row.offset(p, p.grad);
#pragma unroll 2
  for (int64_t c = first; c < p.classes; c += step) {
    const A x = logits[c];
    A value = a.spreads() ? gradient.of(x, a(c)) : gradient.of(x);
    if (!kProbabilities && c == target.index)
      value = target_gradient(max, rest, x, weight, scale, k);
    grad[c * p.grad.class_stride] = narrow<T>(value);
  }
}

}  // namespace fused_ce::cuda
