// How many digits of an exp a call needs: a float's, or those that are left when every number that
// comes of it is rounded to a half type. A polynomial of two degrees less has the latter.
#pragma once

#include <type_traits>

#include "../../problem.h"

namespace fused_ce::cpu {

enum class Digits { kFloat, kHalf };

inline Digits digits_of(const Operand& result) {
  return size_of(result.dtype) == 2 ? Digits::kHalf : Digits::kFloat;
}

// Of the terms that a loss is the sum of. A loss of another type than its logits has float's
// digits, and what a shard finds is exchanged before anything is rounded.
inline Digits digits_of_terms(const Problem& p) {
  const bool rounds = p.loss.data && !p.is_shard() && digits_of(p.input) == Digits::kHalf;
  return rounds ? digits_of(p.loss) : Digits::kFloat;
}

// Calls f with them as an integral_constant.
template <class F>
void with_digits(Digits digits, const F& f) {
  if (digits == Digits::kHalf) return f(std::integral_constant<Digits, Digits::kHalf>{});
  f(std::integral_constant<Digits, Digits::kFloat>{});
}

}  // namespace fused_ce::cpu
