// The loops over exp of floats, in AVX2's own instructions, four vectors in step.
//
// An exp is a chain of a dozen instructions, each of which waits for the one before. A compiler
// writes the chains one after another, and a processor that looks a hundred instructions ahead has
// three in work; here it meets four at a time. A table of four powers in a register saves two
// degrees of the polynomial. Where every result is rounded to a half type, a polynomial of fewer
// digits serves. NaN comes out as NaN; exp is within 1.2 ulp of exact, or has 17 bits and more
// (tests/cpu/test_math.py).
#pragma once

#include <cstdint>

#include "../../formula.h"
#include "digits.h"
#include "math.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FCE_AVX2_CODE __attribute__((target(FCE_AVX2)))
// Under a sanitizer, whose checks of every access take a compiler minutes, a loop is compiled once
// for each of its forms; elsewhere once more wherever it is called, which saves 5 %.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FCE_AVX2_LOOP __attribute__((target(FCE_AVX2), flatten, noinline))
#else
#define FCE_AVX2_LOOP FCE_AVX2_CODE
#endif
#define FCE_EACH _Pragma("GCC unroll 4") for (int k = 0; k < kTogether; k++)
#endif

namespace fused_ce::cpu::avx2 {

#if defined(__x86_64__) && defined(__GNUC__)

constexpr int64_t kVector = 8;
// Vectors in step; with more of them the registers do not suffice.
constexpr int kMost = 4;

template <int kTogether>
using Vectors = __m256[kTogether];

FCE_AVX2_CODE inline __m256 all(float value) { return _mm256_set1_ps(value); }
FCE_AVX2_CODE inline __m256i bits_of(__m256 v) { return _mm256_castps_si256(v); }
FCE_AVX2_CODE inline __m256 of_bits(__m256i v) { return _mm256_castsi256_ps(v); }

// exp(x), in its place, for -kNormalExp < x <= 0, or NaN.
//
// To a float's digits as 2^n exp(r) with n a multiple of 1/4 and |r| <= ln(2)/8, as exp_avx512.h
// has it. The table's entries lack the two bits of n that the shift leaves below the exponent.
template <Digits kDigits, int kTogether>
FCE_AVX2_CODE inline void exp_normal(Vectors<kTogether>& x) {
  Vectors<kTogether> n, p, power;
  if constexpr (kDigits == Digits::kFloat) {
    const __m128i quarters = _mm_setr_epi32(0x3f800000, 0x3f9837f0 - (1 << 21),
                                            0x3fb504f3 - (2 << 21), 0x3fd744fd - (3 << 21));
    const __m256 powers = of_bits(_mm256_broadcastsi128_si256(quarters));
    const __m256 round = all(12582912.0f / 4);
    FCE_EACH power[k] = _mm256_fmadd_ps(x[k], all(1.44269504088896341f), round);
    FCE_EACH n[k] = _mm256_sub_ps(power[k], round);
    FCE_EACH x[k] = _mm256_fnmadd_ps(n[k], all(0.693359375f), x[k]);
    FCE_EACH x[k] = _mm256_fmadd_ps(n[k], all(2.12194440e-4f), x[k]);
    FCE_EACH power[k] =
        of_bits(_mm256_add_epi32(bits_of(_mm256_permutevar_ps(powers, bits_of(power[k]))),
                                 _mm256_slli_epi32(bits_of(power[k]), 21)));
    FCE_EACH p[k] = _mm256_fmadd_ps(x[k], all(4.16417085e-2f), all(1.66721135e-1f));
    FCE_EACH p[k] = _mm256_fmadd_ps(x[k], p[k], all(5.00000179e-1f));
    FCE_EACH p[k] = _mm256_fmadd_ps(x[k], p[k], all(1.0f));
    FCE_EACH x[k] = _mm256_mul_ps(x[k], power[k]);
    FCE_EACH x[k] = _mm256_fmadd_ps(x[k], p[k], power[k]);
  } else {
    // 2^(n + f) with |f| <= 1/2; exactly 1 at 0, so that equal terms cancel.
    const __m256 round = all(12582912.0f + 127.0f);
    FCE_EACH x[k] = _mm256_mul_ps(x[k], all(1.44269504088896341f));
    FCE_EACH power[k] = _mm256_add_ps(x[k], round);
    FCE_EACH n[k] = _mm256_sub_ps(power[k], round);
    FCE_EACH x[k] = _mm256_sub_ps(x[k], n[k]);
    FCE_EACH power[k] = of_bits(_mm256_slli_epi32(bits_of(power[k]), 23));
    FCE_EACH p[k] = _mm256_fmadd_ps(x[k], all(9.58277751e-3f), all(5.59072122e-2f));
    FCE_EACH p[k] = _mm256_fmadd_ps(x[k], p[k], all(2.40241051e-1f));
    FCE_EACH p[k] = _mm256_fmadd_ps(x[k], p[k], all(6.93124115e-1f));
    FCE_EACH p[k] = _mm256_fmadd_ps(x[k], p[k], all(1.0f));
    FCE_EACH x[k] = _mm256_mul_ps(p[k], power[k]);
  }
}

__attribute__((target(FCE_AVX2), noinline, cold)) inline void exp_rare(float* x, int n) {
  for (int i = 0; i < n; i++) x[i] = math::exp_nonpositive(x[i]);
}

// The same for all x <= 0, or NaN.
template <Digits kDigits, int kTogether>
FCE_AVX2_CODE inline void exp(Vectors<kTogether>& x) {
  // Of a NaN and a number, the number is the smaller one.
  __m256 least = all(0.0f);
  FCE_EACH least = _mm256_min_ps(x[k], least);
  const __m256 rare = _mm256_cmp_ps(least, all(-math::kNormalExp), _CMP_LE_OQ);
  if (__builtin_expect(_mm256_movemask_ps(rare) == 0, 1)) return exp_normal<kDigits, kTogether>(x);
  float each[kTogether * kVector];
  FCE_EACH _mm256_storeu_ps(each + k * kVector, x[k]);
  exp_rare(each, kTogether * kVector);
  FCE_EACH x[k] = _mm256_loadu_ps(each + k * kVector);
}

// Of a vector whose last elements may lie behind the end of a run, all or the first few.
struct Whole {
  FCE_AVX2_CODE __m256 load(const float* from) const { return _mm256_loadu_ps(from); }
  FCE_AVX2_CODE void store(float* to, __m256 v) const { _mm256_storeu_ps(to, v); }
  FCE_AVX2_CODE __m256 keep(__m256 v) const { return v; }
};
struct First {
  int64_t count;

  FCE_AVX2_CODE __m256i lanes() const {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  FCE_AVX2_CODE __m256 load(const float* from) const { return _mm256_maskload_ps(from, lanes()); }
  // One by one: AMD's processors take some forty instructions for a store under a mask.
  FCE_AVX2_CODE void store(float* to, __m256 v) const {
    float each[kVector];
    _mm256_storeu_ps(each, v);
    for (int64_t i = 0; i < count; i++) to[i] = each[i];
  }
  FCE_AVX2_CODE __m256 keep(__m256 v) const { return _mm256_and_ps(v, of_bits(lanes())); }
};

template <class Lanes>
FCE_AVX2_CODE inline __m256 load(const float* from, int64_t i, Lanes lanes) {
  return lanes.load(from + i);
}
template <class Lanes>
FCE_AVX2_CODE inline __m256 load(float same, int64_t, Lanes) {
  return all(same);
}

FCE_AVX2_CODE inline float sum_of(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

FCE_AVX2_LOOP inline float max_of(const float* x, int64_t n) {
  // The second one, where the first is NaN.
  __m256 max = all(-kInfinity<float>), other = max;
  int64_t i = 0;
  for (; i + 2 * kVector <= n; i += 2 * kVector) {
    max = _mm256_max_ps(_mm256_loadu_ps(x + i), max);
    other = _mm256_max_ps(_mm256_loadu_ps(x + i + kVector), other);
  }
  max = _mm256_max_ps(max, other);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  float largest = _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
  for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// Calls step.at for all vectors of n elements: some together, then one by one, the last in part.
template <class Step>
FCE_AVX2_CODE inline void for_vectors(int64_t n, Step& step) {
  int64_t i = 0;
  for (; i + kMost * kVector <= n; i += kMost * kVector) step.template at<kMost>(i, Whole{});
  for (; i + kVector <= n; i += kVector) step.template at<1>(i, Whole{});
  if (i < n) step.template at<1>(i, First{n - i});
}

template <Digits kDigits, bool kScaled, bool kHasBase, bool kKeeps>
struct RowTerms {
  const float* x;
  float factor, base;
  float* terms;
  __m256 sum, ones;

  template <int kTogether, class Lanes>
  FCE_AVX2_CODE void at(int64_t i, Lanes lanes) {
    Vectors<kTogether> e, is_base;
    FCE_EACH e[k] = _mm256_sub_ps(load(x, i + k * kVector, lanes), all(base));
    if constexpr (kScaled) FCE_EACH e[k] = _mm256_mul_ps(all(factor), e[k]);
    if constexpr (kHasBase) FCE_EACH is_base[k] = _mm256_cmp_ps(e[k], all(0.0f), _CMP_EQ_OQ);
    exp<kDigits, kTogether>(e);
    if constexpr (kKeeps) FCE_EACH lanes.store(terms + i + k * kVector, e[k]);
    if constexpr (kHasBase) {
      FCE_EACH ones = _mm256_add_ps(ones, lanes.keep(_mm256_and_ps(is_base[k], all(1.0f))));
      FCE_EACH e[k] = _mm256_andnot_ps(is_base[k], e[k]);
    }
    FCE_EACH sum = _mm256_add_ps(sum, lanes.keep(e[k]));
  }
};

// Sums the exp(x[i] - base), or exp(factor (x[i] - base)), and keeps them where kKeeps is; kHasBase
// tells that some x[i] may be base.
template <Digits kDigits, bool kScaled, bool kHasBase, bool kKeeps>
FCE_AVX2_LOOP inline TermSums<float> sum_terms(const float* x, float factor, int64_t n, float base,
                                               float* terms) {
  RowTerms<kDigits, kScaled, kHasBase, kKeeps> step{x, factor, base, terms, all(0.0f), all(0.0f)};
  for_vectors(n, step);
  return {sum_of(step.sum), sum_of(step.ones)};
}

// Of kTogether classes: one vector of lanes at a time.
template <Digits kDigits, int kTogether>
struct LaneTerms {
  const float* x;
  int64_t x_stride;
  const float* base;
  float* terms;
  int64_t terms_stride;
  float *sums, *ones;

  template <class Lanes>
  FCE_AVX2_CODE void at(int64_t l, Lanes lanes) const {
    Vectors<kTogether> e, is_base;
    const __m256 bases = load(base, l, lanes);
    FCE_EACH e[k] = _mm256_sub_ps(load(x + k * x_stride, l, lanes), bases);
    FCE_EACH is_base[k] = _mm256_cmp_ps(e[k], all(0.0f), _CMP_EQ_OQ);
    exp<kDigits, kTogether>(e);
    FCE_EACH lanes.store(terms + k * terms_stride + l, e[k]);
    __m256 sum = load(sums, l, lanes), bases_met = load(ones, l, lanes);
    FCE_EACH sum = _mm256_add_ps(sum, _mm256_andnot_ps(is_base[k], e[k]));
    FCE_EACH bases_met = _mm256_add_ps(bases_met, _mm256_and_ps(is_base[k], all(1.0f)));
    lanes.store(sums + l, sum);
    lanes.store(ones + l, bases_met);
  }
};

// Keeps and sums those of kClasses classes of n lanes, lane l of class j being x[j * x_stride + l];
// adds to the sums of each lane.
template <Digits kDigits, int kClasses>
FCE_AVX2_LOOP inline void keep_lane_terms(const float* x, int64_t x_stride, int64_t n,
                                          const float* base, float* terms, int64_t terms_stride,
                                          float* sums, float* ones) {
  const LaneTerms<kDigits, kClasses> step{x, x_stride, base, terms, terms_stride, sums, ones};
  int64_t l = 0;
  for (; l + kVector <= n; l += kVector) step.at(l, Whole{});
  if (l < n) step.at(l, First{n - l});
}

template <Digits kDigits, bool kScaled, class Base>
struct Exps {
  const float* x;
  float factor;
  Base base;
  float* out;

  template <int kTogether, class Lanes>
  FCE_AVX2_CODE void at(int64_t i, Lanes lanes) const {
    Vectors<kTogether> e;
    FCE_EACH {
      const __m256 logits = load(x, i + k * kVector, lanes);
      const __m256 bases = load(base, i + k * kVector, lanes);
      e[k] = kScaled ? _mm256_fmsub_ps(logits, all(factor), bases) : _mm256_sub_ps(logits, bases);
    }
    exp<kDigits, kTogether>(e);
    FCE_EACH lanes.store(out + i + k * kVector, e[k]);
  }
};

// out[i] = exp(x[i] - base), or exp(factor x[i] - base), or base[i] for base; x and out may be the
// same memory.
template <Digits kDigits, bool kScaled, class Base>
FCE_AVX2_LOOP inline void exp_differences(const float* x, float factor, Base base, int64_t n,
                                          float* out) {
  const Exps<kDigits, kScaled, Base> step{x, factor, base, out};
  for_vectors(n, step);
}

#undef FCE_EACH
#undef FCE_AVX2_LOOP
#undef FCE_AVX2_CODE

#else

inline float max_of(const float*, int64_t) { return 0; }
template <Digits, bool kScaled, bool kHasBase, bool kKeeps>
inline TermSums<float> sum_terms(const float*, float, int64_t, float, float*) {
  return {};
}
template <Digits, int kClasses>
inline void keep_lane_terms(const float*, int64_t, int64_t, const float*, float*, int64_t, float*,
                            float*) {}
template <Digits, bool kScaled, class Base>
inline void exp_differences(const float*, float, Base, int64_t, float*) {}

#endif

}  // namespace fused_ce::cpu::avx2
