// What the classes of a row, or some of them, come down to, and how such parts are put together.
//
// The parts are those of formula.h. The order of every addition is fixed by the shape of the
// kernel, so results are the same every time.
#pragma once

#include "../../formula.h"
#include "../device/types.cuh"

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

struct Exp {
  template <class A>
  __device__ __forceinline__ A operator()(A x) const {
    return exp_nonpositive(x);
  }
};

struct Tanh {
  __device__ __forceinline__ float operator()(float x) const { return tanhf(x); }
  __device__ __forceinline__ double operator()(double x) const { return tanh(x); }
};

// The mass of probabilities goes into every element of the gradient, and their gaps are the loss.
template <class A, bool kProbabilities = false>
using LogitSums = RowSums<A, A, std::conditional_t<kProbabilities, double, A>>;

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
  sums.template raise<kSpreads>(max_lanes<kLanes>(sums.max), Exp{});
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
    sums.template merge<kSpreads>(parts[first + lane], Exp{});
  }
  add_lanes<kWarp, kSpreads>(sums);
}

}  // namespace fused_ce::cuda
