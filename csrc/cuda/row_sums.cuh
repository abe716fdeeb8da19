// What the classes of a row, or some of them, come down to, and how such parts are put together.
//
// Everything is relative to the largest logit met so far. Logits equal to it are counted instead of
// summed: next to their 1 the sum would lose the small terms of a confident row (formula.h). The
// order of every addition is fixed by the shape of the kernel, so results are the same every time.
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

template <class A>
struct RowSums {
  A max = -kInfinity<A>;
  A rest = 0;  // sum of exp(x - max) over the logits below max; afterwards as formula.h has it
  A ones = 0;  // number of logits equal to max
  A gaps = 0;  // sum of a_c (max - x_c), where classes other than the target have an a_c
  A mass = 0;  // sum of a_c

  // Makes everything relative to a maximum that is no smaller.
  template <bool kSpreads>
  __device__ __forceinline__ void raise(A new_max) {
    if (new_max == max) return;
    const A distance = new_max - base_of(max);
    rest = max == -kInfinity<A> ? rest : (rest + ones) * exp_nonpositive(-distance);
    ones = 0;
    if (kSpreads && max != -kInfinity<A> && mass != A(0)) gaps += mass * distance;
    max = new_max;
  }

  // Takes in a logit that is no larger than max, whose base is `base`.
  __device__ __forceinline__ void add(A x, A base) {
    const A lead = x - base;
    if (lead == A(0))
      ones += A(1);
    else
      rest += exp_nonpositive(lead);
  }

  // The same for its coefficient.
  __device__ __forceinline__ void spread(A x, A base, A coefficient) {
    gaps += coefficient * (base - x);
    mass += coefficient;
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

template <int kLanes, bool kSpreads, class A>
__device__ __forceinline__ void add_lanes(RowSums<A>& sums) {
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
template <int kWarps, bool kSpreads, class A>
__device__ __forceinline__ void add_parts(const RowSums<A>* parts, RowSums<A>& sums) {
  sums = {};
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int first = 0; first < kWarps; first += kWarp) {
    if (kWarps - first < kWarp && first + lane >= kWarps) break;
    RowSums<A> part = parts[first + lane];
    const A max = larger(sums.max, part.max);
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
