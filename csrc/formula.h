// The mathematics of one row, the only place where it is written; host and device share it.
//
// Every target is a list of coefficients a_c, and with lse = log(sum_c exp(x_c))
//     loss = sum_c a_c (lse - x_c),      d loss / d x_c = A p_c - a_c,      A = sum_c a_c.
// A class index t means a_c = smooth w_c + [c == t] hard w_t; probabilities q mean
// a_c = w_c (hard q_c + smooth); hard = 1 - label_smoothing, smooth = label_smoothing / classes.
// A backend brings x relative to the row's maximum M, the sums over the row, exp and log1p.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FCE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FCE_HOST_DEVICE inline
#endif

namespace fused_ce {

template <class A>
struct Smoothing {
  A hard;
  A smooth;

  FCE_HOST_DEVICE Smoothing(double label_smoothing, int64_t classes)
      : hard(static_cast<A>(1.0 - label_smoothing)),
        smooth(static_cast<A>(label_smoothing / static_cast<double>(classes))) {}

  template <class B>
  FCE_HOST_DEVICE explicit Smoothing(const Smoothing<B>& s)
      : hard(static_cast<A>(s.hard)), smooth(static_cast<A>(s.smooth)) {}
};

template <class A>
FCE_HOST_DEVICE A probability_coefficient(A probability, A weight, Smoothing<A> s) {
  return weight * (s.hard * probability + s.smooth);
}

// A row whose target is a class index. `rest` sums exp(x_c - M) over all classes but one of the
// largest, which contributes exactly 1: next to that 1, what a confident row has besides would be
// lost, and lse - M = log1p(rest) with it.
template <class A>
struct IndexRow {
  A rest;
  A target_gap;  // M - x_t
  A target_exp;  // exp(x_t - M)
  A target_weight;
  A inverse_total;

  FCE_HOST_DEVICE IndexRow(A rest, A target_gap, A target_exp, A target_weight)
      : IndexRow(rest, target_gap, target_exp, target_weight, A(1) / (A(1) + rest)) {}

  // For a backend with a cheaper way to `inverse_total`, 1 / (1 + rest).
  FCE_HOST_DEVICE IndexRow(A rest, A target_gap, A target_exp, A target_weight, A inverse_total)
      : rest(rest),
        target_gap(target_gap),
        target_exp(target_exp),
        target_weight(target_weight),
        inverse_total(inverse_total) {}

  // The sum of exp(x_c - M) over every class but the target.
  FCE_HOST_DEVICE A others() const {
    return target_gap == A(0) ? rest : A(1) + (rest - target_exp);
  }

  // `gaps` is sum_c w_c (M - x_c), read only when there is smoothing.
  FCE_HOST_DEVICE A loss(A log_total, A gaps, A weight_sum, Smoothing<A> s) const {
    A loss = s.hard * target_weight * (target_gap + log_total);
    return s.smooth == A(0) ? loss : loss + s.smooth * (gaps + weight_sum * log_total);
  }

  // A / sum_c exp(x_c - M), so that A p_c is this times exp(x_c - M).
  FCE_HOST_DEVICE A exp_factor(A weight_sum, Smoothing<A> s) const {
    return (s.hard * target_weight + s.smooth * weight_sum) * inverse_total;
  }

  FCE_HOST_DEVICE A target_grad(A weight_sum, Smoothing<A> s) const {
    A hard_part = s.hard * target_weight * (others() * inverse_total);
    return s.smooth * (weight_sum * (target_exp * inverse_total) - target_weight) - hard_part;
  }
};

// A row whose target is a probability for every class.
template <class A>
struct ProbabilityRow {
  A rest;  // as for IndexRow
  A mass;  // sum_c a_c
  A inverse_total;

  FCE_HOST_DEVICE ProbabilityRow(A rest, A mass)
      : ProbabilityRow(rest, mass, A(1) / (A(1) + rest)) {}

  FCE_HOST_DEVICE ProbabilityRow(A rest, A mass, A inverse_total)
      : rest(rest), mass(mass), inverse_total(inverse_total) {}

  // `gaps` is sum_c a_c (M - x_c).
  FCE_HOST_DEVICE A loss(A log_total, A gaps) const { return gaps + mass * log_total; }

  FCE_HOST_DEVICE A exp_factor() const { return mass * inverse_total; }
};

// d loss / d q_c, from the gap M - x_c of that class.
template <class A>
FCE_HOST_DEVICE A probability_grad(A gap, A log_total, A weight, Smoothing<A> s) {
  return s.hard * weight * (gap + log_total);
}

}  // namespace fused_ce
