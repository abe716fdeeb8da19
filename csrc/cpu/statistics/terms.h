// A class's difference and its exp, for the loops that the compiler turns into vectors.
//
// Most rows span less than what exp has normal results for. Where that is known, an exp in float
// takes a third fewer instructions, with the same bits.
#pragma once

#include <type_traits>

#include "../../statistics.h"
#include "../vector/math.h"
#include "../vector/simd.h"

namespace fused_ce::cpu {

template <class A>
struct Term {
  A difference, e;
};

template <bool kIsNormal, class A>
inline Term<A> term_of(A x, A base, A factor) {
  if constexpr (kIsNormal) {
    const A difference = factor * (x - base);
    return {difference, math::exp_normal(difference)};
  } else {
    const A difference = difference_of(x, base, factor);
    return {difference, math::exp_nonpositive(difference)};
  }
}

// Whether kernels of this type and level should find out; others have no use for it.
template <class A, simd::Level kLevel>
constexpr bool kTellsNormal = std::is_same_v<A, float> && kLevel != simd::Level::kAvx512;

// Calls use(integral_constant) with whether logits that lie so far from their base are normal.
template <class A, simd::Level kLevel, class Use>
inline void with_normality(A largest_gap, A factor, const Use& use) {
  if constexpr (kTellsNormal<A, kLevel>)
    if (factor * largest_gap < A(math::kNormalExp)) return use(std::true_type{});
  use(std::false_type{});
}

}  // namespace fused_ce::cpu
