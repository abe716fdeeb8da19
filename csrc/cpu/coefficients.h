// The coefficients a_c of a run of classes, as the formula defines them, for a kernel's inner loop.
//
// Which of the four shapes it is depends on the problem alone; with_coefficients decides outside
// the loop and compiles the loop once for each.
#pragma once

#include <cstdint>

#include "../formula.h"
#include "../problem.h"

namespace fused_ce::cpu {

// Calls use(c) with a function c(i) for the classes first + i: the coefficient a_c of the row's
// probabilities, or the class weight, which smoothing shares out, where the target is an index.
template <class A, class Use>
inline void with_coefficients(const Problem& p, int64_t first, const A* probabilities,
                              Smoothing<A> smoothing, const Use& use) {
  const A* weight = static_cast<const A*>(p.options.weight.data);
  if (weight) weight += first;
  if (probabilities && weight) {
    use([=](int64_t i) { return probability_coefficient(probabilities[i], weight[i], smoothing); });
  } else if (probabilities) {
    use([=](int64_t i) { return probability_coefficient(probabilities[i], A(1), smoothing); });
  } else if (weight) {
    use([=](int64_t i) { return weight[i]; });
  } else {
    use([](int64_t) { return A(1); });
  }
}

}  // namespace fused_ce::cpu
