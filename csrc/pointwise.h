// The mathematics of one element of a pointwise loss, the only place where it is written.
//
// With s(x) = 1 / (1 + exp(-x)), sp(x) = log(1 + exp(x)) = max(x, 0) + l, l = log1p(exp(-|x|)),
//   binary cross entropy    (1 - y) sp(x) + w y sp(-x),   slope (1 - y) s(x) - w y s(-x);
//   sigmoid focal           a u^g ce,   a = alpha y + (1 - alpha) (1 - y),
//                           u = (1 - y) s(x) + y s(-x),   ce the first with w = 1,
//                           slope a [u^g ce' + g u^(g - 1) (1 - 2 y) s(x) s(-x) ce];
//   Kullback-Leibler        y (log y - x),   slope -y;   or of log y, with y its exp.
// s(-|x|) is exp(-|x|) s(|x|): no difference of nearly equal numbers, so a confident element keeps
// its digits, and one of +-inf has the limit. A backend brings the functions of its type A.
#pragma once

#include <cmath>

#include "host_device.h"
#include "pointwise_problem.h"

namespace fused_ce {

// Of one element: its loss, and the derivative of that by the input.
template <class A>
struct Element {
  A loss, slope;
};

// Nothing times an infinity is nothing: where a factor is 0, the other has no part in the loss.
template <class A>
FCE_HOST_DEVICE A product_or_zero(A factor, A value) {
  return factor == A(0) ? A(0) : factor * value;
}

// A factor of all slopes, in two parts, so that what a float loses of it is no error of theirs. The
// first is rounded towards 0, and the second is no less than 2^-40 of it, which changes no product:
// of one sign, they make one infinity of an infinite slope.
template <class A>
class Scale {
 public:
  FCE_HOST_DEVICE explicit Scale(double scale) : value_(static_cast<A>(scale)) {
    if constexpr (!kHasRest) return;
    const bool is_beyond = value_ > A(0) ? value_ > scale : value_ < scale;
    if (is_beyond) value_ *= A(1) - A(0x1p-24f);
    const A least = value_ * A(0x1p-40f);
    const A rest = static_cast<A>(scale - value_);  // of an infinite scale, nan
    const bool is_more = value_ > A(0) ? rest > least : rest < least;
    rest_ = is_more ? rest : least;
  }

  FCE_HOST_DEVICE A operator*(A slope) const {
    if constexpr (!kHasRest) return value_ * slope;
    return value_ * slope + rest_ * slope;
  }

 private:
  static constexpr bool kHasRest = sizeof(A) < sizeof(double);

  A value_, rest_ = 0;
};

// The scale of a call; load(operand) gives the only number of one.
template <class Load>
FCE_HOST_DEVICE double scale_of(const Problem& p, const Pointwise& s, const Load& load) {
  const double scale = 1.0 / s.denominator;
  return p.reduces() && p.grad_output.data ? scale * load(p.grad_output) : scale;
}

// s(x), s(-x) and l, from one exp.
template <class A>
struct Logistic {
  A magnitude;  // |x|
  A positive, negative;
  A log1p;

  template <class Math>
  FCE_HOST_DEVICE Logistic(A x, const Math& math) {
    magnitude = math.abs(x);
    const A e = math.exp_nonpositive(-magnitude);
    const auto [inverse, log] = math.one_plus(e);
    // The larger one as a difference has less of the error of 1 + exp(-|x|), which was rounded.
    const A smaller = e * inverse, larger = A(1) - smaller;
    positive = x > A(0) ? larger : smaller;
    negative = x > A(0) ? smaller : larger;
    log1p = log;
  }
};

// The two halves of a binary cross entropy: what class 0 and class 1 have for a share in it.
template <class A>
FCE_HOST_DEVICE Element<A> cross_entropy_of(A x, const Logistic<A>& s, A of_zero, A of_one,
                                            A of_both) {
  const A of_magnitude = x > A(0) ? of_zero : of_one;
  return {product_or_zero(of_magnitude, s.magnitude) + of_both * s.log1p,
          of_zero * s.positive - of_one * s.negative};
}

template <class A, bool kHasPosWeight>
struct BinaryCrossEntropy {
  static constexpr bool kIsLogistic = true, kWeighsTarget = kHasPosWeight, kTakesPower = false;

  explicit BinaryCrossEntropy(const Pointwise&) {}

  template <class Math>
  FCE_HOST_DEVICE Element<A> operator()(A x, A y, A pos_weight, const Math& math) const {
    const A of_one = kHasPosWeight ? pos_weight * y : y, of_zero = A(1) - y;
    const A of_both = kHasPosWeight ? of_zero + of_one : A(1);
    return cross_entropy_of(x, Logistic<A>(x, math), of_zero, of_one, of_both);
  }
};

// A gamma of 2, which is the usual one, takes no pow.
template <class A, bool kIsSquare>
struct SigmoidFocal {
  static constexpr bool kIsLogistic = true, kWeighsTarget = false, kTakesPower = !kIsSquare;

  A alpha, other_alpha;  // of class 1 and of class 0
  A gamma;
  A of_negative;  // the power's sign where u is negative, which takes a target outside [0, 1]

  explicit SigmoidFocal(const Pointwise& s)
      : alpha(static_cast<A>(s.alpha < 0.0 ? 1.0 : s.alpha)),
        other_alpha(static_cast<A>(s.alpha < 0.0 ? 1.0 : 1.0 - s.alpha)),
        gamma(static_cast<A>(s.gamma)) {
    const bool is_whole = std::floor(s.gamma) == s.gamma;
    const bool is_even = std::floor(s.gamma / 2) == s.gamma / 2;
    of_negative = is_even ? A(1) : is_whole ? A(-1) : static_cast<A>(__builtin_nan(""));
  }

  // The probability of what the target is not, whose power is taken.
  FCE_HOST_DEVICE A base_of(const Logistic<A>& s, A y) const {
    return (A(1) - y) * s.positive + y * s.negative;
  }

  template <class Math>
  FCE_HOST_DEVICE A power_of(A u, const Math& math) const {
    if constexpr (kIsSquare) return u * u;
    const A power = math.pow_nonnegative(math.abs(u), gamma);
    return u < A(0) ? of_negative * power : power;
  }

  template <class Math>
  FCE_HOST_DEVICE Element<A> operator()(A x, A y, A, const Math& math) const {
    const Logistic<A> s(x, math);
    const A not_y = A(1) - y;
    const Element<A> ce = cross_entropy_of(x, s, not_y, y, A(1));
    const A u = base_of(s, y);
    const A power = power_of(u, math);
    // The derivative of the power by u; at 0, where for gamma < 1 it is infinite, s(x) s(-x) is 0.
    const A rise = kIsSquare ? A(2) * u : u == A(0) ? A(0) : gamma * power / u;
    const A both = s.positive * s.negative;
    const A weight = alpha * y + other_alpha * not_y;
    const A of_power = product_or_zero(rise * both, ce.loss) * (not_y - y);
    return {weight * product_or_zero(power, ce.loss), weight * (power * ce.slope + of_power)};
  }
};

template <class A>
struct KlDivergence {
  static constexpr bool kIsLogistic = false, kWeighsTarget = false, kTakesPower = false;

  explicit KlDivergence(const Pointwise&) {}

  template <class Math>
  FCE_HOST_DEVICE Element<A> operator()(A x, A y, A, const Math& math) const {
    return {y * (math.log_or_zero(y) - x), -y};  // 0 log 0 is 0, and 0 (-inf) is nan
  }
};

template <class A>
struct KlDivergenceOfLogs {
  static constexpr bool kIsLogistic = false, kWeighsTarget = false, kTakesPower = false;

  explicit KlDivergenceOfLogs(const Pointwise&) {}

  template <class Math>
  FCE_HOST_DEVICE Element<A> operator()(A x, A y, A, const Math& math) const {
    const A p = math.exp(y);
    return {p * (y - x), -p};
  }
};

// Calls use with the loss of a call.
template <class A, class Use>
void with_pointwise_loss(const Pointwise& s, const Use& use) {
  switch (s.loss) {
    case PointwiseLoss::kBinaryCrossEntropy:
      if (s.pos_weight.data) return use(BinaryCrossEntropy<A, true>(s));
      return use(BinaryCrossEntropy<A, false>(s));
    case PointwiseLoss::kSigmoidFocal:
      if (s.gamma == 2.0) return use(SigmoidFocal<A, true>(s));
      return use(SigmoidFocal<A, false>(s));
    case PointwiseLoss::kKlDivergence:
      return use(KlDivergence<A>(s));
    case PointwiseLoss::kKlDivergenceOfLogs:
      return use(KlDivergenceOfLogs<A>(s));
  }
}

}  // namespace fused_ce
