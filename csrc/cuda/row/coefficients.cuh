// The coefficients a_c of a row, as the formula defines them.
#pragma once

#include "row.cuh"

namespace fused_ce::cuda {

template <bool kProbabilities, class A>
class Coefficients {
 public:
  __device__ __forceinline__ Coefficients(const Problem& p, const RowIndex& row,
                                          const Smoothing<double>& smoothing)
      : p_(p),
        spreads_(kProbabilities || smoothing.smooth != 0.0),
        smoothing_(smoothing),
        offset_(kProbabilities ? row.offset(p, p.target) : 0) {}

  // Whether classes other than the target have one.
  __device__ __forceinline__ bool spreads() const { return spreads_; }

  // That of class c, but for the target's own part where the target is an index.
  __device__ __forceinline__ A operator()(int64_t c) const {
    const A weight = class_weight<A>(p_, c);
    if constexpr (!kProbabilities) return index_coefficient(weight, smoothing_);
    const A probability = load_value<A>(p_.target, offset_ + c * p_.target.class_stride);
    return probability_coefficient(probability, weight, smoothing_);
  }

 private:
  const Problem& p_;
  bool spreads_;
  Smoothing<A> smoothing_;
  int64_t offset_;
};

}  // namespace fused_ce::cuda
