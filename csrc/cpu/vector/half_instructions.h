// Half types to float and back with instructions that the compiler does not find by itself.
//
// For float16 x86-64 has its own, and the integer arithmetic of half_types.h takes several times as
// long. bfloat16 to float is a shift, for which processors with AVX2 may have one unit; putting
// zeros between the numbers goes to another. All give the same numbers as half_types.h.
#pragma once

#include <cstdint>
#include <limits>

#include "../../operand.h"
#include "extent.h"
#include "half_types.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FCE_HALF_CODE __attribute__((target(FCE_AVX2)))
#endif

namespace fused_ce::cpu {

namespace half {

#if defined(__x86_64__) && defined(__GNUC__)

// AVX-512 has units enough for the compiler's way with bfloat16.
inline bool has_instructions(DType dtype) {
  if (dtype == DType::kFloat16) return simd::level() != simd::Level::kBaseline;
  return dtype == DType::kBFloat16 && simd::level() == simd::Level::kAvx2;
}

constexpr int64_t kVector = 8;

struct Floats {
  __m128 low, high;
};

FCE_HALF_CODE inline Floats load(const BFloat16* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i zero = _mm_setzero_si128();
  return {_mm_castsi128_ps(_mm_unpacklo_epi16(zero, halves)),
          _mm_castsi128_ps(_mm_unpackhi_epi16(zero, halves))};
}
FCE_HALF_CODE inline Floats load(const Float16* from) {
  const __m256 floats = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return {_mm256_castps256_ps128(floats), _mm256_extractf128_ps(floats, 1)};
}

FCE_HALF_CODE inline float load_one(const BFloat16* from) { return to_float(*from); }
FCE_HALF_CODE inline float load_one(const Float16* from) { return _cvtsh_ss(from->bits); }

// To nearest, ties to even: half of the last place that is left is added, less the least bit where
// that place is even.
FCE_HALF_CODE inline __m128i rounded_bits(__m128 x) {
  const __m128 nan = _mm_castsi128_ps(_mm_set1_epi32(0x7fc00000));
  const __m128i bits = _mm_castps_si128(_mm_blendv_ps(x, nan, _mm_cmpunord_ps(x, x)));
  const __m128i last = _mm_and_si128(bits, _mm_set1_epi32(0x10000));
  const __m128i less_one = _mm_cmpeq_epi32(last, _mm_setzero_si128());
  return _mm_srli_epi32(_mm_add_epi32(bits, _mm_add_epi32(_mm_set1_epi32(0x8000), less_one)), 16);
}

FCE_HALF_CODE inline void store(const float* from, BFloat16* to) {
  const __m128i low = rounded_bits(_mm_loadu_ps(from)), high = rounded_bits(_mm_loadu_ps(from + 4));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
}
FCE_HALF_CODE inline void store(const float* from, Float16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}

FCE_HALF_CODE inline BFloat16 one_of(float x, BFloat16) { return from_float<BFloat16>(x); }
FCE_HALF_CODE inline Float16 one_of(float x, Float16) {
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
}

template <class T>
FCE_HALF_CODE inline void load(const T* from, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  for (; stride == 1 && i + kVector <= n; i += kVector) {
    const Floats floats = load(from + i);
    _mm_storeu_ps(to + i, floats.low);
    _mm_storeu_ps(to + i + kVector / 2, floats.high);
  }
  for (; i < n; i++) to[i] = load_one(from + i * stride);
}

// Of adjacent numbers, with the smallest and the largest of them; they have to be stored anyway,
// and are compared on the way.
template <class T>
FCE_HALF_CODE inline Extent<float> load_extent(const T* from, int64_t n, float* to) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  __m128 least = _mm_set1_ps(kInfinity), least_high = least;
  __m128 most = _mm_set1_ps(-kInfinity), most_high = most;
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) {
    const Floats floats = load(from + i);
    _mm_storeu_ps(to + i, floats.low);
    _mm_storeu_ps(to + i + kVector / 2, floats.high);
    // The second one, where the first is NaN.
    least = _mm_min_ps(floats.low, least), least_high = _mm_min_ps(floats.high, least_high);
    most = _mm_max_ps(floats.low, most), most_high = _mm_max_ps(floats.high, most_high);
  }
  float minima[kVector / 2], maxima[kVector / 2];
  _mm_storeu_ps(minima, _mm_min_ps(least, least_high));
  _mm_storeu_ps(maxima, _mm_max_ps(most, most_high));
  Extent<float> all{kInfinity, -kInfinity};
  const auto see = [&](float least, float most) {
    all.min = least < all.min ? least : all.min;
    all.max = most > all.max ? most : all.max;
  };
  for (int k = 0; k < kVector / 2; k++) see(minima[k], maxima[k]);
  for (; i < n; i++) {
    to[i] = load_one(from + i);
    see(to[i], to[i]);
  }
  return all;
}

template <class T>
FCE_HALF_CODE inline void store(const float* from, int64_t n, T* to, int64_t stride) {
  int64_t i = 0;
  for (; stride == 1 && i + kVector <= n; i += kVector) store(from + i, to + i);
  for (; i < n; i++) to[i * stride] = one_of(from[i], T{});
}

#undef FCE_HALF_CODE

#else

inline bool has_instructions(DType) { return false; }
template <class T>
inline void load(const T*, int64_t, int64_t, float*) {}
template <class T>
inline Extent<float> load_extent(const T*, int64_t, float*) {
  return {};
}
template <class T>
inline void store(const float*, int64_t, T*, int64_t) {}

#endif

// Calls f with a pointer of the half type of an operand, at an offset in elements.
template <class F>
inline auto with_pointer(const Operand& operand, int64_t offset, const F& f) {
  if (operand.dtype == DType::kFloat16) return f(static_cast<Float16*>(operand.data) + offset);
  return f(static_cast<BFloat16*>(operand.data) + offset);
}

}  // namespace half
}  // namespace fused_ce::cpu
