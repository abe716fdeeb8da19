// Short rows that lie one after another, many of them to a block.
//
// Together they are one stretch of memory, which the block copies into shared memory 16 bytes at a
// time; where rows begin within it does not matter. A few neighbouring lanes then have a row each,
// and take its classes from shared memory. The gradient goes back the same way.
#pragma once

#include "../kernel_launch.h"
#include "../row/result.cuh"
#include "vector_row.cuh"

namespace fused_ce::cuda {

constexpr int64_t kMaxTileClasses = 256;

// `kLanes` lanes to a row, and at most `kTerms` classes to a lane.
template <class T, int kLanes_, int kTerms_>
class RowTile {
 public:
  static constexpr int kBlock = 256;
  static constexpr int kLanes = kLanes_, kTerms = kTerms_;
  static constexpr int kRows = kBlock / kLanes;

  struct Shared {
    // A pack more than the rows, whose first need not lie at a multiple of 16 bytes.
    alignas(16) T logits[kRows * kLanes * kTerms + Pack<T>::kSize];
    double losses[kBlock / kWarp];
  };

  __device__ __forceinline__ RowTile(const Problem& p, Shared& shared, int64_t tile)
      : classes_(static_cast<int>(p.classes)),
        rounds_((classes_ + kLanes - 1) / kLanes),
        row_(threadIdx.x / kLanes),
        lane_(threadIdx.x % kLanes),
        start_(row_ % rounds_),
        first_row_(tile * kRows) {
    const int64_t left = p.rows - first_row_;
    rows_ = left < kRows ? static_cast<int>(left) : kRows;
    const T* from = static_cast<const T*>(p.input.data) + first_row_ * classes_;
    logits_ = shared.logits + VectorRow<T>::misalignment(from);
  }

  __device__ __forceinline__ bool has_row() const { return row_ < rows_; }
  __device__ __forceinline__ bool leads() const { return lane_ == 0; }
  __device__ __forceinline__ int64_t row() const { return first_row_ + row_; }

  // The logit of the thread's row at a class.
  __device__ __forceinline__ float logit(int64_t c) const {
    return widen(logits_[row_ * classes_ + c]);
  }

  __device__ __forceinline__ float target_logit(const Problem& p, const RowTarget& target) const {
    return has_row() && target.is_counted && target.in_range(p) ? logit(target.index) : 0.0f;
  }

  // Calls use(c) for the thread's classes c in its row. Rows begin at different classes, since
  // those of a stride of many banks would be in each other's way.
  template <class Use>
  __device__ __forceinline__ void for_classes(const Use& use) const {
#pragma unroll 4  // all of them would take more registers than there are
    for (int i = 0; i < kTerms; i++) {
      if (i >= rounds_) break;
      const int round = start_ + i < rounds_ ? start_ + i : start_ + i - rounds_;
      const int c = lane_ + round * kLanes;
      if (c < classes_ && has_row()) use(c);
    }
  }

  __device__ __forceinline__ void set(int c, float value) const {
    logits_[row_ * classes_ + c] = narrow<T>(value);
  }

  // By the whole block; a barrier must follow, or come before.
  __device__ __forceinline__ void load(const Problem& p) const {
    const T* from = static_cast<const T*>(p.input.data) + first_row_ * classes_;
    const VectorRow<T> all(from, rows_ * classes_);
    for (int i = threadIdx.x; i < all.packs; i += kBlock)
      *pack_at(all.first(i)) = Pack<T>::load(from + all.first(i));
    const int single = all.single(threadIdx.x, rows_ * classes_);
    if (single >= 0) logits_[single] = from[single];
  }

  __device__ __forceinline__ void store(const Problem& p) const {
    T* to = static_cast<T*>(p.grad.data) + first_row_ * classes_;
    const VectorRow<T> all(to, rows_ * classes_);
    for (int i = threadIdx.x; i < all.packs; i += kBlock)
      pack_at(all.first(i))->store(to + all.first(i));
    const int single = all.single(threadIdx.x, rows_ * classes_);
    if (single >= 0) to[single] = logits_[single];
  }

 private:
  __device__ __forceinline__ Pack<T>* pack_at(int element) const {
    return reinterpret_cast<Pack<T>*>(logits_ + element);
  }

  int classes_, rounds_, row_, lane_, start_, rows_;
  int64_t first_row_;
  T* logits_;
};

// Writes the gradient over the logits in shared memory.
template <class Tile>
__device__ __forceinline__ void differentiate_tile(const Problem& p, const Tile& tile,
                                                   const RowTarget& target, float uncounted,
                                                   float max, float rest, double scale,
                                                   const Constants& k) {
  const float weight = target.weight<float>(p);
  const RowGradient<float> gradient = index_gradient(max, rest, max, weight, scale, k);
  const float target_value =
      target_gradient(max, rest, tile.target_logit(p, target), weight, scale, k);
  const bool spreads = k.spreads();
  __syncwarp();  // all lanes have read the target's logit
  tile.for_classes([&](int c) {
    const float x = tile.logit(c);
    float value = spreads ? gradient.of(x, class_coefficient<float>(p, c, k)) : gradient.of(x);
    if (c == target.index) value = target_value;
    tile.set(c, target.is_counted ? value : uncounted);
  });
}

// Calls use(lanes, terms), two integral constants, for the number of classes.
template <class Use>
void with_tile_shape(const Problem& p, const Use& use) {
  const std::integral_constant<int, 8> terms;
  if (p.classes <= 8) return use(std::integral_constant<int, 1>{}, terms);
  if (p.classes <= 16) return use(std::integral_constant<int, 2>{}, terms);
  if (p.classes <= 32) return use(std::integral_constant<int, 4>{}, terms);
  if (p.classes <= 64) return use(std::integral_constant<int, 8>{}, terms);
  if (p.classes <= 128) return use(std::integral_constant<int, 16>{}, terms);
  use(std::integral_constant<int, 32>{}, terms);
}

}  // namespace fused_ce::cuda
