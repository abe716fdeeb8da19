// The mathematics of the divergence between two softmax distributions, the only place where it is
// written; see also formula.h.
//
// KL(first || second) = sum_c f_c (log f_c - log s_c) of two rows of logits. With e_c and h_c, the
// exps of each row's differences from its own maximum over the temperature, E = sum_c e_c = 1 +
// rest, H likewise, and the gaps z_c = log h_c - log e_c,
//     KL = log(H / E) - G / E,      G = sum_c e_c z_c.
// Of rows that are nearly equal both terms are as small as z and KL is as small as z^2, so that
// their difference would keep no digit. With the excess X = sum_c e_c (exp(z_c) - 1 - z_c), which
// is H - E - G and has no negative term,
//     KL = X / E - (y - log1p(y)),      y = (G + X) / E = H / E - 1,
// is a difference of what is as small itself. It is the Bregman divergence of sum_c e_c log e_c.
// The gradient of a student's logits, times the temperature, is s_c - f_c where the teacher is the
// first, and f_c (G / E - z_c) where the student is, in reverse.
#pragma once

#include "formula.h"
#include "host_device.h"
#include "statistics.h"

namespace fused_ce {

// Up to here exp(z) - 1 - z is its series: the difference would lose digits.
template <class A>
constexpr A kNearGap = A(0.5);

// The polynomial whose largest relative error, 0.2 ulp, is the least of its degree (Remez).
FCE_HOST_DEVICE float near_excess(float z) {
  float p = 1.987562411e-4f;
  p = p * z + 1.398199751e-3f;
  p = p * z + 8.333452182e-3f;
  p = p * z + 4.166579594e-2f;
  p = p * z + 1.666666546e-1f;
  p = p * z + 0.500000012f;
  return p * (z * z);
}

// The series itself: what comes after it is below an ulp.
FCE_HOST_DEVICE double near_excess(double z) {
  double p = 1.0 / 87178291200.0;
  p = p * z + 1.0 / 6227020800.0;
  p = p * z + 1.0 / 479001600.0;
  p = p * z + 1.0 / 39916800.0;
  p = p * z + 1.0 / 3628800.0;
  p = p * z + 1.0 / 362880.0;
  p = p * z + 1.0 / 40320.0;
  p = p * z + 1.0 / 5040.0;
  p = p * z + 1.0 / 720.0;
  p = p * z + 1.0 / 120.0;
  p = p * z + 1.0 / 24.0;
  p = p * z + 1.0 / 6.0;
  p = p * z + 0.5;
  return p * (z * z);
}

template <class A>
FCE_HOST_DEVICE bool is_near(A gap) {
  return (gap < kNearGap<A>)&(gap > -kNearGap<A>);
}

// y - log1p(y) for |y| <= kNearRatio, as s (y - 2 (atanh(s) / s - 1)) with s = y / (2 + y).
constexpr double kNearRatio = 0.25;

FCE_HOST_DEVICE double less_log1p(double y) {
  const double s = y / (2.0 + y), t = s * s;
  double p = 1.0 / 19.0;
  p = p * t + 1.0 / 17.0;
  p = p * t + 1.0 / 15.0;
  p = p * t + 1.0 / 13.0;
  p = p * t + 1.0 / 11.0;
  p = p * t + 1.0 / 9.0;
  p = p * t + 1.0 / 7.0;
  p = p * t + 1.0 / 5.0;
  p = p * t + 1.0 / 3.0;
  return s * (y - (2.0 * t) * p);
}

// One class: e_c, h_c, z_c and its part of X. What the first distribution finds impossible has no
// part but h_c, whatever z_c is.
template <class A>
struct DivergenceTerm {
  A first, second, gap, excess;

  // The second exp ends in a product. If nothing but sums were made of it, a compiler could join it
  // to them in one loop and not in another, and a row's bits would depend on which takes it.
  FCE_HOST_DEVICE DivergenceTerm(A first_difference, A second_difference, A first, A second_exp)
      : first(first), second(second_exp < A(0) ? A(0) : second_exp) {
    const A z = second_difference - first_difference;
    gap = first == A(0) ? A(0) : z;
    excess = is_near(z) ? first * near_excess(z) : (second - first) - first * gap;
  }
};

// Sums over some classes, relative to bases that no logit of the two rows exceeds. What is equal to
// a base is counted by itself, for the reason that formula.h gives.
template <class A>
struct DivergenceSums {
  A first_rest = 0, first_ones = 0;    // of e_c below the base, and the number of those at it
  A second_rest = 0, second_ones = 0;  // of h_c
  A gaps = 0;                          // of e_c z_c
  A excess = 0;                        // of e_c (exp(z_c) - 1 - z_c)

  FCE_HOST_DEVICE void add_class(A first_difference, A second_difference,
                                 const DivergenceTerm<A>& term) {
    const bool is_first_base = first_difference == A(0);
    const bool is_second_base = second_difference == A(0);
    first_rest += is_first_base ? A(0) : term.first;
    first_ones += is_first_base ? A(1) : A(0);
    second_rest += is_second_base ? A(0) : term.second;
    second_ones += is_second_base ? A(1) : A(0);
    gaps += term.first * term.gap;
    excess += term.excess;
  }

  template <class B>
  FCE_HOST_DEVICE void add(const DivergenceSums<B>& few) {
    first_rest += few.first_rest;
    first_ones += few.first_ones;
    second_rest += few.second_rest;
    second_ones += few.second_ones;
    gaps += few.gaps;
    excess += few.excess;
  }

  // Makes the sums relative to bases that lie these distances (<= 0) above: e_c and h_c become
  // e_c exp(distance) and h_c exp(distance), and every gap grows by what the distances differ.
  FCE_HOST_DEVICE void lower(A first_distance, A first_decay, A second_distance, A second_decay) {
    const A first_total = first_rest + first_ones, second_total = second_rest + second_ones;
    const A growth = second_distance - first_distance;
    const A by_series = near_excess(growth) * second_total + growth * (gaps + excess) + excess;
    const A new_gaps = first_decay * (gaps + growth * first_total);
    const A by_totals = second_decay * second_total - first_decay * first_total - new_gaps;
    // Nothing is left of the first row here, and infinities are to have no part in that.
    const bool is_gone = first_decay == A(0);
    first_rest = first_decay * first_total;
    second_rest = second_decay * second_total;
    first_ones = second_ones = A(0);
    gaps = is_gone ? A(0) : new_gaps;
    excess = is_gone ? second_rest : is_near(growth) ? first_decay * by_series : by_totals;
  }
};

// How far a row's base lies below a new one; `factor` is 1 / temperature. Nothing where it stays.
template <class A>
FCE_HOST_DEVICE A distance_between(A old_max, A new_max, A factor) {
  return old_max == new_max ? A(0) : factor * (old_max - new_max);
}

// The same relative to the largest of these logits, of the type X: what a row, or any part of it,
// comes down to.
template <class X, class A = X>
struct DivergencePart : DivergenceSums<A> {
  X first_max = -kInfinity<X>, second_max = -kInfinity<X>;

  template <class Exp>
  FCE_HOST_DEVICE void raise(X new_first, X new_second, A factor, const Exp& exp) {
    if (new_first == first_max && new_second == second_max) return;
    const A first = distance_between<A>(first_max, new_first, factor);
    const A second = distance_between<A>(second_max, new_second, factor);
    this->lower(first, exp(first), second, exp(second));
    first_max = new_first;
    second_max = new_second;
  }

  // Takes in another part of the row.
  template <class Exp>
  FCE_HOST_DEVICE void merge(DivergencePart part, A factor, const Exp& exp) {
    const X first = first_max > part.first_max ? first_max : part.first_max;
    const X second = second_max > part.second_max ? second_max : part.second_max;
    raise(first, second, factor, exp);
    part.raise(first, second, factor, exp);
    this->add(part);
  }
};

// A row, from its closed sums: a rest is the sum over all classes but one of the largest.
struct DivergenceRow {
  double first_rest, second_rest;
  double first_inverse, second_inverse;  // 1 / E and 1 / H
};

// The divergence, from G and X. It is not negative, but by rounding. A backend brings
// log1p(y, 1 / (1 + y)) for y >= 0.
template <class Log1p>
FCE_HOST_DEVICE double divergence_of(DivergenceRow row, double gaps, double excess,
                                     const Log1p& log1p) {
  const double y = (gaps + excess) * row.first_inverse;
  // Of two products here a compiler would have a choice which to join to the sum.
  const double close = (excess - less_log1p(y) * (1.0 + row.first_rest)) * row.first_inverse;
  // log(H / E), from the larger of the two over the smaller.
  const bool grows = row.second_rest > row.first_rest;
  const double smaller = grows ? row.first_rest : row.second_rest;
  const double difference = row.second_rest - row.first_rest;
  const double surplus =
      (grows ? difference : -difference) * (grows ? row.first_inverse : row.second_inverse);
  const double log =
      log1p(surplus, (1.0 + smaller) * (grows ? row.second_inverse : row.first_inverse));
  const double distant = (grows ? log : -log) - gaps * row.first_inverse;
  const double found = (y < kNearRatio) & (y > -kNearRatio) ? close : distant;
  return found < 0.0 ? 0.0 : found;
}

// The gradient of a row of a student's logits. `scale` is 1 / temperature and whatever else there
// is; lowered() is for terms that are relative to bases below the row's maxima.

// The teacher is the first.
template <class A>
struct DivergenceGradient {
  A by_student, by_teacher, of_largest;

  FCE_HOST_DEVICE static DivergenceGradient of(DivergenceRow row, double scale) {
    const double both = scale * row.first_inverse * row.second_inverse;
    return {static_cast<A>(scale * row.second_inverse), static_cast<A>(-scale * row.first_inverse),
            static_cast<A>(both * (row.first_rest - row.second_rest))};
  }

  // Where both rows have their largest logit the gradient is 1 / H - 1 / E, which the rounding of
  // the two would leave without digits in rows that are certain of the same class.
  FCE_HOST_DEVICE static A at(A student, A teacher, A by_student, A by_teacher, A of_largest) {
    const A difference = by_student * student + by_teacher * teacher;
    return (student == A(1)) & (teacher == A(1)) ? of_largest : difference;
  }

  FCE_HOST_DEVICE A at(A student, A teacher) const {
    return at(student, teacher, by_student, by_teacher, of_largest);
  }

  FCE_HOST_DEVICE DivergenceGradient lowered(A student_decay, A teacher_decay) const {
    const bool has_largest = (student_decay == A(1)) & (teacher_decay == A(1));
    const A student = by_student * student_decay, teacher = by_teacher * teacher_decay;
    return {student, teacher, has_largest ? of_largest : student + teacher};
  }
};

// The student is the first.
template <class A>
struct ReverseDivergenceGradient {
  A mean_gap, by_exp;

  // `mean_gap` is G / E.
  FCE_HOST_DEVICE static ReverseDivergenceGradient of(DivergenceRow row, double mean_gap,
                                                      double scale) {
    return {static_cast<A>(mean_gap), static_cast<A>(scale * row.first_inverse)};
  }

  // The gaps come without a factor, whose rounding would be left where the two cancel.
  FCE_HOST_DEVICE static A at(A student, A gap, A mean_gap, A by_exp) {
    return (by_exp * student) * (mean_gap - gap);
  }

  FCE_HOST_DEVICE A at(A student, A gap) const { return at(student, gap, mean_gap, by_exp); }

  // `growth` is what the gaps grow by; see DivergenceSums::lower().
  FCE_HOST_DEVICE ReverseDivergenceGradient lowered(A student_decay, A growth) const {
    const bool is_gone = student_decay == A(0);
    return {is_gone ? A(0) : mean_gap - growth, is_gone ? A(0) : student_decay * by_exp};
  }
};

}  // namespace fused_ce
