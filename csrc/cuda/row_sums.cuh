// What the classes of a row, or some of them, come down to, and how such parts are put together.
//
// Logits equal to the largest are counted instead of summed: next to their 1 the sum would lose the
// small terms of a confident row (formula.h). The order of every addition is fixed by the shape of
// the kernel, so results are the same every time.
#pragma once

#include "types.cuh"

namespace fused_ce::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// exp of a number that is not positive.
__device__ __forceinline__ float exp_nonpositive(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return exp2_approximate(x * kLog2E);
}
__device__ __forceinline__ double exp_nonpositive(double x) { return exp(x); }

// What logits are taken relative to: their maximum, or 0 where there is none. exp(-inf - 0) is 0.
template <class A>
__device__ __forceinline__ A base_of(A max) {
  return max == -kInfinity<A> ? A(0) : max;
}

// Sums over classes, relative to a base.
template <class A, class Total = A>
struct TermSums {
  A rest = 0;      // of exp(x - base) over the logits below base
  A ones = 0;      // number of logits equal to it
  Total gaps = 0;  // of a_c (base - x_c), where classes other than the target have an a_c
  Total mass = 0;  // of a_c

  // Takes in a logit that is no larger than the base.
  __device__ __forceinline__ void add(A x, A base) {
    const A lead = x - base;
    if (lead == A(0))
      ones += A(1);
    else
      rest += exp_nonpositive(lead);
  }

  // The same for its coefficient, which may be infinite: nothing times that is nothing here, for
  // raise() still has it in the mass.
  __device__ __forceinline__ void spread(A x, A base, A coefficient) {
    const A gap = base - x;
    gaps += gap == A(0) ? A(0) : coefficient * gap;
    mass += coefficient;
  }

  // What was summed by itself first: a thread may have thousands of classes, and added one by one
  // each would be rounded to the digits of the sum.
  __device__ __forceinline__ void add(const TermSums<A>& few) {
    rest += few.rest;
    ones += few.ones;
    gaps += few.gaps;
    mass += few.mass;
  }
};

// Relative to the largest logit met so far. The mass of probabilities goes into every element of
// the gradient, and their gaps are the loss.
template <class A, bool kProbabilities = false,
          class Total = std::conditional_t<kProbabilities, double, A>>
struct RowSums : TermSums<A, Total> {
  using TermSums<A, Total>::gaps;
  using TermSums<A, Total>::mass;
  using TermSums<A, Total>::ones;
  using TermSums<A, Total>::rest;  // after close() as formula.h has it

  A max = -kInfinity<A>;

  // Makes everything relative to a maximum that is no smaller.
  template <bool kSpreads>
  __device__ __forceinline__ void raise(A new_max) {
    if (new_max == max) return;
    const A distance = new_max - base_of(max);
    rest = max == -kInfinity<A> ? rest : (rest + ones) * exp_nonpositive(-distance);
    ones = 0;
    if (kSpreads && max != -kInfinity<A> && mass != 0) gaps += mass * distance;
    max = new_max;
  }

  // From the sum of all terms to all but one of the largest.
  __device__ __forceinline__ void close() {
    if (max != -kInfinity<A>) rest += ones - A(1);
  }
};

// Over `kLanes` neighbouring lanes, every one of which gets the same bits.
template <int kLanes, class A>
__device__ __forceinline__ A sum_lanes(A x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

template <int kLanes, class A>
__device__ __forceinline__ A max_lanes(A x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x = larger(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

template <int kLanes, bool kSpreads, class Sums>
__device__ __forceinline__ void add_lanes(Sums& sums) {
  sums.template raise<kSpreads>(max_lanes<kLanes>(sums.max));
  sums.rest = sum_lanes<kLanes>(sums.rest);
  sums.ones = sum_lanes<kLanes>(sums.ones);
  if constexpr (kSpreads) {
    sums.gaps = sum_lanes<kLanes>(sums.gaps);
    sums.mass = sum_lanes<kLanes>(sums.mass);
  }
}

// Over the warps that left their sums in `parts`, for all threads, which must have passed a barrier
// since.
template <int kWarps, bool kSpreads, class Sums>
__device__ __forceinline__ void add_parts(const Sums* parts, Sums& sums) {
  sums = {};
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int first = 0; first < kWarps; first += kWarp) {
    if (kWarps - first < kWarp && first + lane >= kWarps) break;
    Sums part = parts[first + lane];
    const auto max = larger(sums.max, part.max);
    sums.template raise<kSpreads>(max);
    part.template raise<kSpreads>(max);
    sums.rest += part.rest;
    sums.ones += part.ones;
    if constexpr (kSpreads) {
      sums.gaps += part.gaps;
      sums.mass += part.mass;
    }
  }
  add_lanes<kWarp, kSpreads>(sums);
}

}  // namespace fused_ce::cuda
