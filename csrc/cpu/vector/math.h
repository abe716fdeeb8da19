// exp, log1p and tanh as straight-line code that the compiler turns into vector instructions.
//
// Range reduction as in Cephes (S. Moshier, Methods and Programs for Mathematical Functions, 1989):
// exp(x) = 2^n exp(r), |r| <= ln(2)/2, with ln(2) in two parts; log1p(y) = log(u) + (y - (u-1))/u
// for u = 1 + y, the second term giving back what rounding u lost; tanh(x) is a polynomial, in
// double a rational function, for small |x|, and 1 - 2 e / (1 + e), e = exp(-2 |x|), for others.
// NaN comes out as NaN. Measured: exp is within 0.9 ulp of exact in float (1.2 without fused
// multiply-add) and 1.1 in double, log1p and tanh within 2 (tests/cpu/test_math.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace fused_ce::cpu::math {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// exp_normal is exp(x) for -kNormalExp < x <= 0, or NaN: no result is subnormal, which saves float
// some instructions.
constexpr float kNormalExp = 87;

// For |r| <= ln(2)/2: the polynomial 1 + r + ... whose largest relative error, 0.03 ulp, is the
// least of its degree (found with Remez' algorithm).
inline float exp_reduced(float r) {
  float p = 1.38145402e-3f;
  p = p * r + 8.36874511e-3f;
  p = p * r + 4.16683908e-2f;
  p = p * r + 1.66665204e-1f;
  p = p * r + 4.99999934e-1f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// 2^(n + kShift) exp(r) for x = n ln(2) + r. Adding 1.5 * 2^23 rounds to an integer, which is then
// found in the low bits and, with the bias 127, is the exponent of a power of two. A multiplication
// applies it: added to the bits of a NaN it could make a number of them.
template <int kShift>
inline float exp_scaled(float x) {
  constexpr float kRound = 12582912.0f + 127.0f + kShift;
  float shifted = x * 1.44269504088896341f + kRound;
  float n = shifted - kRound;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  return exp_reduced(r) * bits_as<float>(bits_as<uint32_t>(shifted) << 23);
}

inline float exp_normal(float x) { return exp_scaled<0>(x); }

// exp(x) for x <= 0, or NaN. Scaling by 2^(n+64), then by 2^-64, rounds a subnormal result once;
// below the smallest of them the second factor is 0, so -inf gives 0 without slow underflow.
inline float exp_nonpositive(float x) {
  return exp_scaled<64>(x < -104.0f ? -104.0f : x) * (x < -103.98f ? 0.0f : 0x1p-64f);
}

inline double exp_nonpositive(double x) {
  double clamped = x < -746.0 ? -746.0 : x;
  double shifted = clamped * 1.4426950408889634074 + 6755399441055744.0;
  double n = shifted - 6755399441055744.0;
  double r = clamped - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  double power = bits_as<double>((bits_as<uint64_t>(shifted) << 52) + ((512ull + 1023ull) << 52));
  return p * power * (x < -745.2 ? 0.0 : 0x1p-512);
}

inline double exp_normal(double x) { return exp_nonpositive(x); }

// log1p(y) for 0 <= y < inf, or NaN; `inverse` is 1 / (1 + y), which callers have. In float the
// polynomial is Cephes' logf's.
inline float log1p_nonnegative(float y, float inverse) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  float u = 1.0f + y;
  uint32_t offset = bits_as<uint32_t>(u) - kSqrtHalf;  // m is in [sqrt(1/2), sqrt(2))
  float n = static_cast<float>(static_cast<int32_t>(offset >> 23));
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
  float lost = (y - (u - 1.0f)) * inverse;
  float log = p * (f * f) + (lost - n * 2.12194440e-4f) + f + n * 0.693359375f;
  return y == y ? log : y;
}

// In double, log(m) = 2 atanh(s) with s = (m - 1) / (m + 1), as a series.
inline double log1p_nonnegative(double y, double inverse) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdull;
  double u = 1.0 + y;
  uint64_t offset = bits_as<uint64_t>(u) - kSqrtHalf;  // m is in [sqrt(1/2), sqrt(2))
  double n = static_cast<double>(static_cast<int32_t>(offset >> 52));
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
  double lost = (y - (u - 1.0)) * inverse;
  double log = 2.0 * s * z * p + (n * 1.42860682030941723212e-6 + lost) + 2.0 * s;
  return y == y ? log + n * 6.93145751953125e-1 : y;
}

constexpr double kSmallTanh = 0.625;

inline float tanh(float x) {
  float a = std::fabs(x), z = a * a, zz = z * z;
  float p = (2.06390887954e-2f - 5.70498872745e-3f * z) * zz +
            (1.33314422036e-1f - 5.37397155531e-2f * z);
  p = p * z - 3.33332819422e-1f;
  float e = exp_normal(-2.0f * (10.0f < a ? 10.0f : a));  // from 9.02 on tanh is 1
  float small = p * (z * a) + a, other = 1.0f - 2.0f * e / (1.0f + e);
  return std::copysign(a < static_cast<float>(kSmallTanh) ? small : other, x);
}

inline double tanh(double x) {
  double a = std::fabs(x), z = a * a;
  double p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z;
  double q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z;
  p = (p - 1.61468768441708447952e3) / (q + 4.84406305325125486048e3);
  double e = exp_nonpositive(-2.0 * a);
  double small = p * z * a + a, other = 1.0 - 2.0 * e / (1.0 + e);
  return std::copysign(a < kSmallTanh ? small : other, x);
}

}  // namespace fused_ce::cpu::math
