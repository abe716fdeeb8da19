// The loops over exp of floats, in AVX-512's own instructions.
//
// Plain C++ has no word for two of them: a table in a register, which leaves a polynomial of degree
// 3 instead of 6, and a scaling by 2^n that rounds subnormal results itself, so that nobody has to
// look for arguments with such a result. That takes a quarter off the exps of a row. NaN comes out
// as NaN; exp is within 1 ulp of exact (tests/cpu/test_math.py).
#pragma once

#include <cstdint>

#include "../../formula.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FCE_TARGET __attribute__((target(FCE_AVX512)))
#endif

namespace fused_ce::cpu::avx512 {

#if defined(__x86_64__) && defined(__GNUC__)

constexpr int64_t kVector = 16;

// The forms without a mask begin from an undefined vector, of which GCC 12 warns wherever they
// land.
constexpr __mmask16 kAll = 0xffff;

FCE_TARGET inline __m512 zero() { return _mm512_setzero_ps(); }

// exp(x) for x <= 0, or NaN: 2^n exp(r) with n a multiple of 1/16 and |r| <= ln(2)/32, n taken from
// a sum that rounds x log2(e), and found in that sum's low bits (P. Tang, Table-driven
// implementation of the exponential function in IEEE floating-point arithmetic, 1989). The
// polynomial 1 + r + ... is the one whose largest error is least, 0.03 ulp.
FCE_TARGET inline __m512 exp(__m512 x) {
  // 2^(i/16)
  const __m512 powers =
      _mm512_setr_ps(0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fe0p+0f,
                     0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f,
                     0x1.8ace54p+0f, 0x1.9c4918p+0f, 0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f,
                     0x1.ea4afap+0f);
  const __m512 round = _mm512_set1_ps(12582912.0f / 16);
  // exp is 0 there; where one of the two is NaN, the second is taken.
  x = _mm512_maskz_max_ps(kAll, _mm512_set1_ps(-104.0f), x);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504088896341f), round);
  const __m512 n = _mm512_sub_ps(shifted, round);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  const __m512 power = _mm512_maskz_permutexvar_ps(kAll, _mm512_castps_si512(shifted), powers);
  const __m512 p =
      _mm512_fmadd_ps(r, _mm512_set1_ps(1.66670577e-1f), _mm512_set1_ps(5.00016186e-1f));
  const __m512 less_one = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r);
  const __m512 result = _mm512_fmadd_ps(power, less_one, power);
  return _mm512_maskz_scalef_ps(kAll, result, n);  // by 2^floor(n)
}

FCE_TARGET inline float sum_of(__m512 v) {
  v = _mm512_add_ps(v, _mm512_maskz_shuffle_f32x4(kAll, v, v, 0x4e));
  v = _mm512_add_ps(v, _mm512_maskz_shuffle_f32x4(kAll, v, v, 0xb1));
  v = _mm512_add_ps(v, _mm512_maskz_permute_ps(kAll, v, 0x4e));
  v = _mm512_add_ps(v, _mm512_maskz_permute_ps(kAll, v, 0xb1));
  return _mm512_cvtss_f32(v);
}

FCE_TARGET inline __m512 load(const float* from, int64_t i, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, from + i);
}
FCE_TARGET inline __m512 load(float same, int64_t, __mmask16) { return _mm512_set1_ps(same); }

// Calls Step::at for all vectors of n elements, the last with some lanes only.
template <class Step>
FCE_TARGET inline void for_vectors(int64_t n, Step& step) {
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) step.at(i, kAll);
  if (i < n) step.at(i, __mmask16((1u << (n - i)) - 1));
}

template <bool kScaled, bool kHasBase>
struct RowTerms {
  const float* x;
  float factor, base;
  float* terms;
  __m512 sum, ones;

  FCE_TARGET void at(int64_t i, __mmask16 lanes) {
    __m512 difference = _mm512_sub_ps(load(x, i, lanes), _mm512_set1_ps(base));
    if constexpr (kScaled) difference = _mm512_mul_ps(_mm512_set1_ps(factor), difference);
    const __m512 e = exp(difference);
    _mm512_mask_storeu_ps(terms + i, lanes, e);
    if constexpr (kHasBase) {
      const __mmask16 is_base = _mm512_mask_cmp_ps_mask(lanes, difference, zero(), _CMP_EQ_OQ);
      ones = _mm512_mask_add_ps(ones, is_base, ones, _mm512_set1_ps(1.0f));
      lanes &= ~is_base;
    }
    sum = _mm512_mask_add_ps(sum, lanes, sum, e);
  }
};

// Keeps the exp(x[i] - base), or exp(factor (x[i] - base)), and sums them; kHasBase tells that some
// x[i] may be base.
template <bool kScaled, bool kHasBase>
FCE_TARGET inline TermSums<float> keep_terms(const float* x, float factor, int64_t n, float base,
                                             float* terms) {
  RowTerms<kScaled, kHasBase> step{x, factor, base, terms, zero(), zero()};
  for_vectors(n, step);
  return {sum_of(step.sum), sum_of(step.ones)};
}

template <int kClasses>
struct LaneTerms {
  const float* x;
  int64_t x_stride;
  const float* base;
  float* terms;
  int64_t terms_stride;
  float *sums, *ones;

  FCE_TARGET void at(int64_t l, __mmask16 lanes) const {
    const __m512 bases = load(base, l, lanes);
    __m512 sum = zero(), bases_met = zero();
    for (int j = 0; j < kClasses; j++) {
      const __m512 difference = _mm512_sub_ps(load(x + j * x_stride, l, lanes), bases);
      const __m512 e = exp(difference);
      _mm512_mask_storeu_ps(terms + j * terms_stride + l, lanes, e);
      const __mmask16 is_base = _mm512_cmp_ps_mask(difference, zero(), _CMP_EQ_OQ);
      sum = _mm512_mask_add_ps(sum, __mmask16(~is_base), sum, e);
      bases_met = _mm512_mask_add_ps(bases_met, is_base, bases_met, _mm512_set1_ps(1.0f));
    }
    _mm512_mask_storeu_ps(sums + l, lanes, _mm512_add_ps(load(sums, l, lanes), sum));
    _mm512_mask_storeu_ps(ones + l, lanes, _mm512_add_ps(load(ones, l, lanes), bases_met));
  }
};

// The same for kClasses classes of n lanes, lane l of class j being x[j * x_stride + l]; adds to
// the sums of each lane.
template <int kClasses>
FCE_TARGET inline void keep_lane_terms(const float* x, int64_t x_stride, int64_t n,
                                       const float* base, float* terms, int64_t terms_stride,
                                       float* sums, float* ones) {
  const LaneTerms<kClasses> step{x, x_stride, base, terms, terms_stride, sums, ones};
  for_vectors(n, step);
}

template <bool kScaled, class Base>
struct Exps {
  const float* x;
  float factor;
  Base base;
  float* out;

  FCE_TARGET void at(int64_t i, __mmask16 lanes) const {
    const __m512 logits = load(x, i, lanes), bases = load(base, i, lanes);
    const __m512 difference = kScaled ? _mm512_fmsub_ps(logits, _mm512_set1_ps(factor), bases)
                                      : _mm512_sub_ps(logits, bases);
    _mm512_mask_storeu_ps(out + i, lanes, exp(difference));
  }
};

// out[i] = exp(x[i] - base), or exp(factor x[i] - base), or base[i] for base; x and out may be the
// same memory.
template <bool kScaled, class Base>
FCE_TARGET inline void exp_differences(const float* x, float factor, Base base, int64_t n,
                                       float* out) {
  const Exps<kScaled, Base> step{x, factor, base, out};
  for_vectors(n, step);
}

#else

template <bool kScaled, bool kHasBase>
inline TermSums<float> keep_terms(const float*, float, int64_t, float, float*) {
  return {};
}
template <int kClasses>
inline void keep_lane_terms(const float*, int64_t, int64_t, const float*, float*, int64_t, float*,
                            float*) {}
template <bool kScaled, class Base>
inline void exp_differences(const float*, float, Base, int64_t, float*) {}

#endif

}  // namespace fused_ce::cpu::avx512
