// The loops of the row statistics in AVX-512's own instructions, on the exp of exp_avx512.h.
#pragma once

#include <cstdint>

#include "../../statistics.h"
#include "../vector/exp_avx512.h"

namespace fused_ce::cpu::avx512 {

#if defined(__x86_64__) && defined(__GNUC__)

// As difference_of() in statistics.h; of a nan and a number the second is taken.
FCE_TARGET inline __m512 difference_of(__m512 x, __m512 base, __m512 factor) {
  const __m512 difference = _mm512_mul_ps(factor, _mm512_sub_ps(x, base));
  return _mm512_maskz_max_ps(kAll, _mm512_set1_ps(kLeastDifference<float>), difference);
}

// The sums of one class, or of one vector of them, in each lane.
template <bool kHasBase, bool kGaps>
struct VectorSums {
  __m512 rest, ones, gaps;

  FCE_TARGET void add(__m512 difference, __m512 e, __mmask16 lanes) {
    if constexpr (kGaps) gaps = _mm512_mask3_fnmadd_ps(e, difference, gaps, lanes);
    if constexpr (kHasBase) {
      const __mmask16 is_base = _mm512_mask_cmp_ps_mask(lanes, difference, zero(), _CMP_EQ_OQ);
      ones = _mm512_mask_add_ps(ones, is_base, ones, _mm512_set1_ps(1.0f));
      lanes &= ~is_base;
    }
    rest = _mm512_mask_add_ps(rest, lanes, rest, e);
  }
};

template <bool kHasBase, bool kGaps>
struct RowEntropy {
  const float* x;
  float base, factor;
  VectorSums<kHasBase, kGaps> sums;

  FCE_TARGET void at(int64_t i, __mmask16 lanes) {
    const __m512 difference =
        difference_of(load(x, i, lanes), _mm512_set1_ps(base), _mm512_set1_ps(factor));
    sums.add(difference, exp(difference), lanes);
  }
};

// kHasBase tells that some x[i] may be the base.
template <bool kHasBase, bool kGaps>
FCE_TARGET inline EntropySums<float> sum_row(const float* x, int64_t n, float base, float factor) {
  RowEntropy<kHasBase, kGaps> step{x, base, factor, {zero(), zero(), zero()}};
  for_vectors(n, step);
  return {sum_of(step.sums.rest), sum_of(step.sums.ones), sum_of(step.sums.gaps)};
}

template <int kClasses, bool kGaps>
struct LaneEntropy {
  const float* x;
  int64_t x_stride;
  const float* base;
  float factor;
  float *rest, *ones, *gaps;

  FCE_TARGET void at(int64_t l, __mmask16 lanes) const {
    const __m512 bases = load(base, l, lanes), factors = _mm512_set1_ps(factor);
    VectorSums<true, kGaps> sums{load(rest, l, lanes), load(ones, l, lanes), zero()};
    if constexpr (kGaps) sums.gaps = load(gaps, l, lanes);
    for (int j = 0; j < kClasses; j++) {
      const __m512 difference = difference_of(load(x + j * x_stride, l, lanes), bases, factors);
      sums.add(difference, exp(difference), lanes);
    }
    _mm512_mask_storeu_ps(rest + l, lanes, sums.rest);
    _mm512_mask_storeu_ps(ones + l, lanes, sums.ones);
    if constexpr (kGaps) _mm512_mask_storeu_ps(gaps + l, lanes, sums.gaps);
  }
};

// Adds kClasses classes of n lanes to the lanes' sums; lane l of class j is x[j * x_stride + l].
template <int kClasses, bool kGaps>
FCE_TARGET inline void sum_lanes(const float* x, int64_t x_stride, int64_t n, const float* base,
                                 float factor, float* rest, float* ones, float* gaps) {
  const LaneEntropy<kClasses, kGaps> step{x, x_stride, base, factor, rest, ones, gaps};
  for_vectors(n, step);
}

// Of a row the base and the gradient are numbers, of lanes beside each other one for each.
template <class Number>
struct Gradients {
  const float* x;
  Number base;
  float factor;
  Number constant, by_difference;
  float* out;

  FCE_TARGET void at(int64_t i, __mmask16 lanes) const {
    const __m512 difference =
        difference_of(load(x, i, lanes), load(base, i, lanes), _mm512_set1_ps(factor));
    const __m512 of_p =
        _mm512_fmadd_ps(load(by_difference, i, lanes), difference, load(constant, i, lanes));
    _mm512_mask_storeu_ps(out + i, lanes, _mm512_mul_ps(exp(difference), of_p));
  }
};

// x and out may be the same memory.
template <class Number>
FCE_TARGET inline void write_gradients(const float* x, Number base, float factor, Number constant,
                                       Number by_difference, int64_t n, float* out) {
  const Gradients<Number> step{x, base, factor, constant, by_difference, out};
  for_vectors(n, step);
}

#else

template <bool kHasBase, bool kGaps>
inline EntropySums<float> sum_row(const float*, int64_t, float, float) {
  return {};
}
template <int kClasses, bool kGaps>
inline void sum_lanes(const float*, int64_t, int64_t, const float*, float, float*, float*, float*) {
}
template <class Number>
inline void write_gradients(const float*, Number, float, Number, Number, int64_t, float*) {}

#endif

}  // namespace fused_ce::cpu::avx512
