// The target of a row whose classes are sharded: which of the shard's own classes it is, if any.
#pragma once

#include "../../shard.h"
#include "row.cuh"

namespace fused_ce::cuda {

// As RowTarget, but for what is asked of the whole vocabulary.
struct ShardTarget {
  int64_t target;          // as it is
  int64_t index = -1;      // among the shard's classes, where it is one of them
  bool is_counted = true;  // in whichever shard
  bool is_no_class = false;

  __device__ __forceinline__ ShardTarget(const Problem& p, const RowIndex& row)
      : target(p.probabilities ? -1 : load_index(p.target, row.offset(p, p.target))) {
    if (p.weighs_samples()) is_counted = sample_weight(p, row) != 0.0;
    if (p.probabilities) return;
    is_counted &= target != p.options.ignore_index;
    is_no_class = is_counted && !(target >= 0 && target < p.vocabulary);
    is_counted &= !is_no_class;
    if (is_counted && has_class(p, target)) index = target - p.first_class;
  }

  __device__ __forceinline__ bool is_own() const { return index >= 0; }

  // What the gradient of a row is that is not counted.
  __device__ __forceinline__ float uncounted_value() const {
    return is_no_class ? kNan<float> : 0.0f;
  }

  // Stops the kernel for a target that is no class, unless there may be such.
  __device__ __forceinline__ void check(const Problem& p) const {
    if (!is_no_class || p.allows_bad_targets()) return;
    const int64_t t = target, n_classes = p.vocabulary;
    assert(t >= 0 && t < n_classes);  // as PyTorch words it
  }

  // Of its class, which is one of the shard's.
  template <class A>
  __device__ __forceinline__ A weight(const Problem& p) const {
    return class_weight<A>(p, index);
  }
};

}  // namespace fused_ce::cuda
