// The mathematics of one row, the only place where it is written; host and device share it.
//
// Every target is a list of coefficients a_c, and with lse = log(sum_c exp(x_c))
//     loss = sum_c a_c (lse - x_c),      d loss / d x_c = A p_c - a_c,      A = sum_c a_c.
// A class index t means a_c = smooth w_c + [c == t] hard w_t; probabilities q mean
// a_c = w_c (hard q_c + smooth); hard = 1 - label_smoothing, smooth = label_smoothing / classes.
// The target's own part, hard w_t, is kept apart: what a class has besides is its coefficient here.
// A z-loss adds z lse^2 to the loss and 2 z lse p_c to the gradient. A focal loss multiplies the
// target's part by (1 - p_t)^gamma. Logits are mapped ones: the options' factor and cap are applied
// where they are loaded. A backend brings the walk over the logits, exp, log1p, tanh and pow.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "problem.h"

namespace fused_ce {

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_huge_val());

// What a number loses as an A; of an infinite one, nothing.
template <class A>
FCE_HOST_DEVICE double lost_as(double value) {
  const double lost = value - static_cast<A>(value);
  return lost - lost == 0.0 ? lost : 0.0;
}

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

// What is done to a logit before all else: a factor, then a soft cap.
template <class A>
struct LogitMap {
  A factor = 1;
  A cap = 0;  // where there is one

  FCE_HOST_DEVICE bool is_identity() const { return factor == A(1) && !bends(); }
  FCE_HOST_DEVICE bool bends() const { return cap > A(0); }

  // The slope is the cap's part of the derivative; the factor is the same for all logits, and
  // belongs to a gradient's scale.
  struct Mapped {
    A logit, slope;
  };

  template <class Tanh>
  FCE_HOST_DEVICE Mapped operator()(A x, const Tanh& tanh) const {
    return bends() ? bent(tanh(part_of_cap(x))) : Mapped{factor * x, A(1)};
  }

  // What the last line consists of, for loops that are free of the question.
  FCE_HOST_DEVICE A part_of_cap(A x) const { return x * (factor / cap); }
  FCE_HOST_DEVICE Mapped bent(A tanh) const { return {cap * tanh, A(1) - tanh * tanh}; }
};

// What all rows have in common.
template <class A>
struct Common {
  A weight_sum = 0;
  A z_loss = 0;  // to be divided by what the other losses are divided by
  A focal_gamma;
  Smoothing<A> smoothing;

  FCE_HOST_DEVICE explicit Common(const Problem& p)
      : focal_gamma(static_cast<A>(p.options.focal_gamma)),
        smoothing(p.options.label_smoothing, p.all_classes()) {}

  FCE_HOST_DEVICE Common(const Problem& p, const Totals& totals) : Common(p) {
    set_totals(p, totals);
  }

  template <class B>
  FCE_HOST_DEVICE explicit Common(const Common<B>& common)
      : weight_sum(static_cast<A>(common.weight_sum)),
        z_loss(static_cast<A>(common.z_loss)),
        focal_gamma(static_cast<A>(common.focal_gamma)),
        smoothing(common.smoothing) {}

  FCE_HOST_DEVICE void set_totals(const Problem& p, const Totals& totals) {
    weight_sum = static_cast<A>(totals.weight_sum);
    const double ratio = totals.denominator == totals.z_denominator
                             ? 1.0
                             : totals.denominator / totals.z_denominator;
    z_loss = static_cast<A>(p.options.z_loss * ratio);
  }

  // Whether classes other than the target have a coefficient where the target is an index.
  FCE_HOST_DEVICE bool spreads() const { return smoothing.smooth != A(0); }
};

// The coefficient of any class where the target is an index.
template <class A>
FCE_HOST_DEVICE A index_coefficient(A weight, Smoothing<A> s) {
  return s.smooth * weight;
}

template <class A>
FCE_HOST_DEVICE A probability_coefficient(A probability, A weight, Smoothing<A> s) {
  return weight * (s.hard * probability + s.smooth);
}

// a_c (base - x_c). A coefficient may be infinite: nothing times that is nothing here, since the
// rest of the class's loss has it too.
template <class A>
FCE_HOST_DEVICE A coefficient_gap(A coefficient, A gap) {
  return gap == A(0) ? A(0) : coefficient * gap;
}

// What logits are taken relative to: their maximum, or 0 where there is none. exp(-inf - 0) is 0.
template <class A>
FCE_HOST_DEVICE A base_of(A max) {
  return max == -kInfinity<A> ? A(0) : max;
}

// Sums over some classes of a row, relative to a base that no logit exceeds. What is equal to the
// base is counted by itself: next to its 1, the small terms of a confident row would be lost.
template <class A, class Total = A>
struct TermSums {
  A rest = 0;      // of exp(x_c - base) over the logits below the base
  A ones = 0;      // the number of logits equal to it
  Total gaps = 0;  // of a_c (base - x_c), where classes have an a_c
  Total mass = 0;  // of a_c

  template <class Exp>
  FCE_HOST_DEVICE void add_logit(A x, A base, const Exp& exp) {
    const A difference = x - base;
    if (difference == A(0))
      ones += A(1);
    else
      rest += exp(difference);
  }

  FCE_HOST_DEVICE void add_gap(A gap, A coefficient) {
    gaps += coefficient_gap(coefficient, gap);
    mass += coefficient;
  }

  // What was summed by itself first: each of many classes added one by one would be rounded to the
  // digits of the sum.
  template <class B, class T>
  FCE_HOST_DEVICE void add(const TermSums<B, T>& few) {
    rest += few.rest;
    ones += few.ones;
    gaps += few.gaps;
    mass += few.mass;
  }
};

// The same relative to the largest of these logits, of the type X: what a row, or any part of it,
// comes down to.
template <class X, class A = X, class Total = A>
struct RowSums : TermSums<A, Total> {
  using TermSums<A, Total>::gaps;
  using TermSums<A, Total>::mass;
  using TermSums<A, Total>::ones;
  using TermSums<A, Total>::rest;

  X max = -kInfinity<X>;

  FCE_HOST_DEVICE bool is_masked() const { return max == -kInfinity<X>; }

  // What its terms are to be multiplied by to be relative to the row's maximum.
  template <class Exp>
  FCE_HOST_DEVICE A decay(X row_max, const Exp& exp) const {
    if (is_masked()) return A(0);
    return exp(-(static_cast<A>(row_max) - static_cast<A>(max)));
  }

  // Makes everything relative to a maximum that is no smaller.
  template <bool kSpreads = true, class Exp>
  FCE_HOST_DEVICE void raise(X new_max, const Exp& exp) {
    if (new_max == max) return;
    const A distance = static_cast<A>(new_max) - static_cast<A>(base_of(max));
    if (!is_masked()) rest = (rest + ones) * exp(-distance);
    ones = 0;
    if (kSpreads && !is_masked() && mass != 0) gaps += mass * distance;
    max = new_max;
  }

  // Takes in another part of the row.
  template <bool kSpreads = true, class Exp>
  FCE_HOST_DEVICE void merge(RowSums part, const Exp& exp) {
    const X larger = max > part.max ? max : part.max;
    raise<kSpreads>(larger, exp);
    part.template raise<kSpreads>(larger, exp);
    this->add(part);
  }

  // Once all parts are in: from here on `rest` is the sum over all classes but one of the largest,
  // which contributes exactly 1, so that lse - max = log1p(rest).
  FCE_HOST_DEVICE void close() {
    if (!is_masked()) rest += ones - A(1);
  }
};

// A row whose sums are closed; on its own, one whose target is a probability for every class. What
// of it a result does not depend on costs nothing: all is inlined.
template <class A>
struct Row {
  A max;
  A rest;
  A log_total;      // log1p(rest), which is lse - max
  A inverse_total;  // 1 / (1 + rest), which is 1 / sum_c exp(x_c - max)
  A mass;           // sum_c of the coefficients
  Common<A> common;

  FCE_HOST_DEVICE Row(A max, A rest, A log_total, A inverse_total, A mass, const Common<A>& common)
      : max(max),
        rest(rest),
        log_total(log_total),
        inverse_total(inverse_total),
        mass(mass),
        common(common) {}

  FCE_HOST_DEVICE A loss(A gaps) const { return gaps + mass * log_total + z_loss(); }

  // What the gradient has of p_c, over sum_c exp(x_c - max): to be multiplied by exp(x_c - max).
  FCE_HOST_DEVICE A exp_factor() const { return (mass + z_slope()) * inverse_total; }

  // Nothing at all without one, however large the logits are.
  FCE_HOST_DEVICE A z_loss() const {
    return common.z_loss == A(0) ? A(0) : common.z_loss * (lse() * lse());
  }

  // Of p_c in the gradient.
  FCE_HOST_DEVICE A z_slope() const {
    return common.z_loss == A(0) ? A(0) : A(2) * common.z_loss * lse();
  }

  FCE_HOST_DEVICE A lse() const { return max + log_total; }
};

// One whose target is a class index. Without smoothing the mass is 0, and the gaps are not looked
// at.
template <class A>
struct IndexRow : Row<A> {
  using Row<A>::common;
  using Row<A>::inverse_total;
  using Row<A>::log_total;
  using Row<A>::mass;
  using Row<A>::rest;
  using Row<A>::z_loss;
  using Row<A>::z_slope;

  A target_gap;  // max - x_t
  A target_exp;  // exp(x_t - max)
  A target_weight;
  // What a focal loss multiplies the target's part by, in the loss and in the gradient.
  A focal_factor = 1, focal_slope = 1;

  FCE_HOST_DEVICE IndexRow(A max, A rest, A log_total, A inverse_total, A target_gap, A target_exp,
                           A target_weight, const Common<A>& common)
      : Row<A>(max, rest, log_total, inverse_total, common.smoothing.smooth * common.weight_sum,
               common),
        target_gap(target_gap),
        target_exp(target_exp),
        target_weight(target_weight) {}

  // The sum of exp(x_c - max) over every class but the target.
  FCE_HOST_DEVICE A others() const {
    return target_gap == A(0) ? rest : A(1) + (rest - target_exp);
  }

  // u^gamma, and u^gamma (1 + gamma p_t ce / u) with u = 1 - p_t and ce = lse - x_t. A row that is
  // certain has u = 0, where ce / u tends to 1; one whose target is impossible has p_t ce = 0.
  template <class Pow>
  FCE_HOST_DEVICE void focus(const Pow& pow) {
    const A p = target_exp * inverse_total, u = others() * inverse_total;
    const A ratio = u == A(0) ? A(1) : (target_gap + log_total) / u;
    focal_factor = pow(u, common.focal_gamma);
    focal_slope = p == A(0) ? focal_factor : focal_factor * (A(1) + common.focal_gamma * p * ratio);
  }

  FCE_HOST_DEVICE A loss(A gaps) const {
    const A hard = this->hard() * focal_factor * (target_gap + log_total);
    return common.spreads() ? hard + Row<A>::loss(gaps) : hard + z_loss();
  }

  FCE_HOST_DEVICE A exp_factor() const {
    return (hard() * focal_slope + mass + z_slope()) * inverse_total;
  }

  // d loss / d x_t; nan for an infinite weight, as A p_t - a_t is.
  FCE_HOST_DEVICE A target_grad() const {
    const A p = target_exp * inverse_total;
    const A target_part = hard() * focal_slope * (others() * inverse_total);
    const A smooth_part = common.smoothing.smooth * (common.weight_sum * p - target_weight);
    return smooth_part - target_part + z_slope() * p;
  }

 private:
  FCE_HOST_DEVICE A hard() const { return common.smoothing.hard * target_weight; }
};

// d loss / d q_c, from the gap max - x_c of that class.
template <class A>
FCE_HOST_DEVICE A probability_grad(A gap, A log_total, A weight, Smoothing<A> s) {
  return s.hard * weight * (gap + log_total);
}

}  // namespace fused_ce
