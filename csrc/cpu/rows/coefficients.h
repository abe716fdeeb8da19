// The coefficients a_c of a run of classes, as the formula defines them, for a kernel's inner loop.
//
// They are the same for all classes, or an array that is filled for the run, so that a loop over
// them is compiled twice and not once for every kind of target.
#pragma once

#include <cstdint>

#include "../../formula.h"
#include "../../problem.h"
#include "../vector/simd.h"

namespace fused_ce::cpu {

// As a function of its own, with a dispatch of its own: a kernel that is inlined as a whole would
// hold several copies.
template <class A>
__attribute__((noinline)) void fill_coefficients(const A* weight, int64_t n, const A* probabilities,
                                                 Smoothing<A> s, A* to) {
  simd::run([&] {
    if (!probabilities) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) to[i] = index_coefficient(weight[i], s);
    } else if (weight) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++)
        to[i] = probability_coefficient(probabilities[i], weight[i], s);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) to[i] = probability_coefficient(probabilities[i], A(1), s);
    }
  });
}

// Calls use(c) with a function c(i), the coefficient of class first + i for i < n; where the target
// is an index (no probabilities), what every class has, but for the target's own part. The
// probabilities may lie in the buffer.
template <class A, class Use>
inline void with_coefficients(const Problem& p, int64_t first, int64_t n, const A* probabilities,
                              Smoothing<A> smoothing, A* buffer, const Use& use) {
  const A* weight = static_cast<const A*>(p.options.weight.data);
  if (!probabilities && !weight) {
    const A coefficient = index_coefficient(A(1), smoothing);
    return use([=](int64_t) { return coefficient; });
  }
  const A* coefficients = probabilities;
  if (!probabilities || weight || p.is_smoothed()) {
    fill_coefficients(weight ? weight + first : nullptr, n, probabilities, smoothing, buffer);
    coefficients = buffer;
  }
  use([=](int64_t i) { return coefficients[i]; });
}

}  // namespace fused_ce::cpu
