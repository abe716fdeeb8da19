// The loops over the classes of two rows, or of one class of many, that the compiler turns into
// vectors.
//
// Most rows span less than what exp has normal results for, and have no infinities. Where that is
// known the loops are free of what they would need for those, with the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../divergence.h"
#include "../vector/math.h"
#include "../vector/simd.h"

namespace fused_ce::cpu {

template <bool kIsNormal, class A>
inline A exp_of(A difference) {
  if constexpr (kIsNormal)
    return math::exp_normal(difference);
  else
    return math::exp_nonpositive(difference);
}

// Of one class.
template <bool kIsNormal, class A>
inline DivergenceTerm<A> divergence_term(A first_difference, A second_difference) {
  return {first_difference, second_difference, exp_of<kIsNormal>(first_difference),
          exp_of<kIsNormal>(second_difference)};
}

// The gap of a class for its gradient in reverse; a class without probability has none.
template <class A>
inline A gap_of(A student, A student_difference, A teacher_difference) {
  return student == A(0) ? A(0) : teacher_difference - student_difference;
}

// Calls use(integral_constant) with whether logits that lie so far from their base are normal.
template <class A, class Use>
inline void with_normal_exps(A largest_gap, A factor, const Use& use) {
  if constexpr (std::is_same_v<A, float>)
    if (factor * largest_gap < A(math::kNormalExp)) return use(std::true_type{});
  use(std::false_type{});
}

}  // namespace fused_ce::cpu
