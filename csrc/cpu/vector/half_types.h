// The two 16 bit floating types, and their conversion to float and back as integer arithmetic.
//
// Plain code that the compiler turns into vector instructions on any machine. Conversions to a
// half type round to nearest, ties to even, and keep subnormal numbers.
#pragma once

#include <cstdint>

#include "math.h"

namespace fused_ce::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) { return math::bits_as<float>(uint32_t(x.bits) << 16); }

// The multiplication moves the exponent's bias and makes subnormals normal.
inline float to_float(Float16 x) {
  float magnitude = math::bits_as<float>(uint32_t(x.bits & 0x7fffu) << 13) * 0x1p112f;
  uint32_t bits = math::bits_as<uint32_t>(magnitude);
  bits |= magnitude >= 65536.0f ? 0x7f800000u : 0u;
  return math::bits_as<float>(bits | (uint32_t(x.bits & 0x8000u) << 16));
}

template <class T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline double from_float<double>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits = math::bits_as<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  uint32_t bits = math::bits_as<uint32_t>(x);
  uint32_t sign = bits & 0x80000000u;
  uint32_t magnitude = bits ^ sign;
  uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lets the addition itself round a subnormal half into the low bits.
  uint32_t subnormal =
      math::bits_as<uint32_t>(math::bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude >= 0x477ff000u ? special : finite;
  return {static_cast<uint16_t>(half | (sign >> 16))};
}

template <class T>
inline T from_float(double x) {
  return from_float<T>(static_cast<float>(x));
}

template <>
inline double from_float<double>(double x) {
  return x;
}

}  // namespace fused_ce::cpu
