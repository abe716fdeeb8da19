// The mathematics of a row's statistics, the only place where it is written; see also formula.h.
//
// With d_c = factor (x_c - M) for the largest logit M, e_c = exp(d_c), S = sum_c e_c = 1 + rest and
// G = sum_c e_c (-d_c), none of which cancels,
//     log p_c = d_c - log S,      lse = factor M + log S,      entropy = log S + G / S,
//     d x_c = scale (p_c [g_lse - g_log_prob - g_entropy (log p_c + entropy)] + g_log_prob [c =
//     t]).
// The factor is 1 / temperature, and 1 under a soft cap, which is applied to scaled logits before
// anything else; the scale is 1 / temperature, and the map's slope comes on top of it.
#pragma once

#include "formula.h"
#include "host_device.h"

namespace fused_ce {

// exp is 0 from here on. Differences are held here, so that a masked class's 0 log 0 is 0.
template <class A>
constexpr A kLeastDifference = sizeof(A) == sizeof(double) ? A(-746) : A(-104);

// d_c, or nan. A difference of 0 is one of the largest logits; one of infinities is nan.
template <class A>
FCE_HOST_DEVICE A difference_of(A x, A base, A factor) {
  const A difference = factor * (x - base);
  return difference < kLeastDifference<A> ? kLeastDifference<A> : difference;
}

// Sums over some classes of a row, relative to a base that no logit exceeds. What is equal to the
// base is counted by itself, for the reason that formula.h gives.
template <class A>
struct EntropySums {
  A rest = 0;  // of e_c over the logits below the base
  A ones = 0;  // the number of logits equal to it
  A gaps = 0;  // of e_c (-d_c)

  template <bool kGaps = true>
  FCE_HOST_DEVICE void add_class(A difference, A e) {
    const bool is_base = difference == A(0);
    rest += is_base ? A(0) : e;
    ones += is_base ? A(1) : A(0);
    if (kGaps) gaps -= e * difference;
  }

  template <class B>
  FCE_HOST_DEVICE void add(const EntropySums<B>& few) {
    rest += few.rest;
    ones += few.ones;
    gaps += few.gaps;
  }

  // Makes the sums relative to a base that lies `distance` (<= 0) above: every e_c becomes
  // e_c exp(distance), and every d_c gets the distance added.
  FCE_HOST_DEVICE void lower(A distance, A decay) {
    const A total = rest + ones;
    gaps = decay * (gaps - total * distance);
    rest = decay * total;
    ones = A(0);
  }
};

// The same relative to the largest of these logits, of the type X: what a row, or any part of it,
// comes down to.
template <class X, class A = X>
struct StatisticsSums : EntropySums<A> {
  X max = -kInfinity<X>;

  template <class Exp>
  FCE_HOST_DEVICE void raise(X new_max, A factor, const Exp& exp) {
    if (new_max == max) return;
    const A distance = difference_of(static_cast<A>(max), static_cast<A>(new_max), factor);
    this->lower(distance, exp(distance));
    max = new_max;
  }

  // Takes in another part of the row.
  template <class Exp>
  FCE_HOST_DEVICE void merge(StatisticsSums part, A factor, const Exp& exp) {
    const X larger = max > part.max ? max : part.max;
    raise(larger, factor, exp);
    part.raise(larger, factor, exp);
    this->add(part);
  }
};

// The sum of e_c over all classes but one of the largest; nan where the largest is infinite.
template <class A>
FCE_HOST_DEVICE A closed_rest(A max, A rest, A ones) {
  const A zero_or_nan = max - max;
  return zero_or_nan + rest + (ones - A(1));
}

template <class A>
struct StatisticsRow {
  A max;
  A log_total;      // log1p(rest), which is log S
  A inverse_total;  // 1 / S
  A factor;

  FCE_HOST_DEVICE A log_prob(A target_difference) const { return target_difference - log_total; }
  FCE_HOST_DEVICE A entropy(A gaps) const { return log_total + gaps * inverse_total; }
  FCE_HOST_DEVICE A logsumexp() const { return factor * max + log_total; }
};

// What arrives for a row's results, by the names of these; what arrives for nothing is 0.
template <class A>
struct StatisticsGrads {
  A log_prob, entropy, logsumexp;
};

// The gradient of a row's logits, but for the slope of their map.
template <class A>
struct StatisticsGradient {
  A constant, by_difference;

  // `spread` is G / S.
  FCE_HOST_DEVICE StatisticsGradient(const StatisticsGrads<A>& grads, A spread, A inverse_total,
                                     A scale)
      : constant(scale * inverse_total *
                 (grads.logsumexp - grads.log_prob - grads.entropy * spread)),
        by_difference(-scale * inverse_total * grads.entropy) {}

  FCE_HOST_DEVICE StatisticsGradient(A constant, A by_difference)
      : constant(constant), by_difference(by_difference) {}

  // Of any class but the target.
  FCE_HOST_DEVICE A at(A difference, A e) const {
    return e * (constant + by_difference * difference);
  }
};

// Of the target: 1 - p_t is the other classes' part, so that a confident row keeps its digits.
template <class A>
FCE_HOST_DEVICE A target_gradient(const StatisticsGrads<A>& grads, A difference, A e, A rest,
                                  A spread, A inverse_total, A scale) {
  const A others = difference == A(0) ? rest : A(1) + (rest - e);
  const A of_all = grads.logsumexp - grads.entropy * (difference + spread);
  return scale * inverse_total * (grads.log_prob * others + e * of_all);
}

}  // namespace fused_ce
