// What the pointwise losses need beside math.h, as straight-line code of the same kind.
//
// log1p(y) for y in [0, 1] is y + y^2 P(y) with the polynomial of degree 8 whose largest relative
// error, 0.09 ulp, is the least of its degree (found with Remez' algorithm): it waits for no
// division, as shorter series of y / (2 + y) do. The logarithm is that of log1p_nonnegative in
// math.h; the error of exp(exponent log(base)) grows with the size of that product.
#pragma once

#include "math.h"

namespace fused_ce::cpu::math {

// Of y in [0, 1], or nan.
template <class A>
struct OnePlus {
  A inverse;  // 1 / (1 + y)
  A log;      // log1p(y)
};

inline OnePlus<float> one_plus(float y) {
  float p = -3.29046859e-3f;
  p = p * y + 2.00862419e-2f;
  p = p * y - 5.74572310e-2f;
  p = p * y + 1.06611282e-1f;
  p = p * y - 1.53448805e-1f;
  p = p * y + 1.96921021e-1f;
  p = p * y - 2.49580190e-1f;
  p = p * y + 3.33304644e-1f;
  p = p * y - 4.99999315e-1f;
  return {1.0f / (1.0f + y), p * (y * y) + y};
}

inline OnePlus<double> one_plus(double y) {
  const double inverse = 1.0 / (1.0 + y);
  return {inverse, log1p_nonnegative(y, inverse)};
}

// log(x) of a positive, normal and finite x.
inline float log_normal(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  uint32_t offset = bits_as<uint32_t>(x) - kSqrtHalf;  // m is in [sqrt(1/2), sqrt(2))
  float n = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  float f = bits_as<float>((offset & 0x007fffffu) + kSqrtHalf) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f - 0.5f;
  return p * (f * f) - n * 2.12194440e-4f + f + n * 0.693359375f;
}

inline double log_normal(double x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdull;
  uint64_t offset = bits_as<uint64_t>(x) - kSqrtHalf;  // m is in [sqrt(1/2), sqrt(2))
  double n = static_cast<double>(static_cast<int32_t>(static_cast<int64_t>(offset) >> 52));
  double f = bits_as<double>((offset & 0x000fffffffffffffull) + kSqrtHalf) - 1.0;
  double s = f / (2.0 + f);
  double z = s * s;
  double p = 1.0 / 23.0;
  p = p * z + 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  return 2.0 * s * z * p + n * 1.42860682030941723212e-6 + 2.0 * s + n * 6.93145751953125e-1;
}

// log(x) to be multiplied by x: any number where x is nan, and 0 where x is less than the normal
// numbers, for x log(x) is then less than anyone can see.
template <class A>
inline A log_or_zero(A x) {
  const A special = x < A(0) ? std::numeric_limits<A>::quiet_NaN() : A(0);
  const A log = log_normal(x);
  return x >= std::numeric_limits<A>::min() ? log : special;
}

// exp(x) of any x. As exp_nonpositive(), but where x is positive the power of two is applied by
// halves, since the largest is none of a float.
inline float exp(float x) {
  const bool is_large = x > 0.0f;
  const float round = 12582912.0f + (is_large ? 126.0f : 191.0f);
  float clamped = x < -104.0f ? -104.0f : x;
  clamped = clamped > 89.0f ? 89.0f : clamped;
  const float shifted = clamped * 1.44269504088896341f + round;
  const float n = shifted - round;
  const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  const float small = x < -103.98f ? 0.0f : 0x1p-64f;
  return exp_reduced(r) * bits_as<float>(bits_as<uint32_t>(shifted) << 23) *
         (is_large ? 2.0f : small);
}

inline double exp(double x) {
  const double e = exp_nonpositive(-std::fabs(x));
  return x > 0.0 ? 1.0 / e : e;
}

// What exp() of is base^exponent, for numbers that are not negative; 0 for an exponent of 0.
template <class A>
inline A log_of_power(A base, A exponent) {
  constexpr A kVeryNegative = sizeof(A) == sizeof(double) ? A(-1e300) : A(-1e30);
  const A log = log_normal(base);
  return exponent * (base < std::numeric_limits<A>::min() ? kVeryNegative : log);
}

}  // namespace fused_ce::cpu::math
