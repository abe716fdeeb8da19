// Float16 to float and back with the instructions that x86-64 has for it.
//
// The compiler does not know them for a type of our own, and the integer arithmetic of
// half_types.h takes several times as long. Both give the same numbers.
#pragma once

#include <cstdint>

#include "half_types.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace fused_ce::cpu::half {

#if defined(__x86_64__) && defined(__GNUC__)

inline bool has_instructions() { return simd::level() != simd::Level::kBaseline; }

constexpr int64_t kVector = 8;

__attribute__((target(FCE_AVX2))) inline void load(const Float16* from, int64_t stride, int64_t n,
                                                   float* to) {
  int64_t i = 0;
  for (; stride == 1 && i + kVector <= n; i += kVector)
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; i++) to[i] = _cvtsh_ss(from[i * stride].bits);
}

__attribute__((target(FCE_AVX2))) inline void store(const float* from, int64_t n, Float16* to,
                                                    int64_t stride) {
  int64_t i = 0;
  for (; stride == 1 && i + kVector <= n; i += kVector)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; i++) to[i * stride].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

#else

inline bool has_instructions() { return false; }
inline void load(const Float16*, int64_t, int64_t, float*) {}
inline void store(const float*, int64_t, Float16*, int64_t) {}

#endif

}  // namespace fused_ce::cpu::half
