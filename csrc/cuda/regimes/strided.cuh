// Rows that lie side by side, as the pixels of (N, C, H, W) logits do: a thread has a row, and the
// threads of a warp read a class of neighbouring rows together.
#pragma once

#include "../kernel_launch.h"
#include "../row/coefficients.cuh"
#include "../row/result.cuh"

namespace fused_ce::cuda {

constexpr int kStridedBlock = 256;

// Whether neighbouring rows are neighbours in memory, and their classes not.
inline bool has_strided_classes(const Problem& p) {
  constexpr int64_t kMinRun = 16;  // of rows, or the lanes of a warp would be far apart after all
  const int inner = p.row_dims - 1;
  const auto is_strided = [&](const Operand& o) {
    return !o.data || (o.row_strides[inner] == 1 && o.class_stride != 1);
  };
  return p.rows > 0 && p.rows < (int64_t{1} << 30) && p.row_sizes[inner] >= kMinRun &&
         is_strided(p.input) && is_strided(p.grad);
}

// The gradient of the thread's row at one class.
template <class T, bool kProbabilities, class A>
class ColumnGradient {
 public:
  __device__ __forceinline__ ColumnGradient(const Problem& p, const RowIndex& row,
                                            const RowTarget& target, A max, A rest, double mass,
                                            A target_logit, double scale, const Constants& k)
      : a_(p, row, k.smoothing),
        to_(static_cast<T*>(p.grad.data) + row.offset(p, p.grad)),
        stride_(p.grad.class_stride),
        target_(target.index) {
    const A weight = target.weight<A>(p);
    gradient_ = row_gradient<kProbabilities>(max, rest, mass, target_logit, weight, scale, k);
    if (!kProbabilities)
      target_value_ = target_gradient<true>(max, rest, target_logit, weight, scale, k);
  }

  __device__ __forceinline__ void store(int64_t c, A x) const {
    A value = a_.spreads() ? gradient_.of(x, a_(c)) : gradient_.of(x);
    if (!kProbabilities && c == target_) value = target_value_;
    to_[c * stride_] = narrow<T>(value);
  }

 private:
  Coefficients<kProbabilities, A> a_;
  T* to_;
  int64_t stride_, target_;
  RowGradient<A> gradient_;
  A target_value_ = 0;
};

template <class T>
__device__ __forceinline__ void write_column(const Problem& p, const RowIndex& row, T value) {
  T* to = static_cast<T*>(p.grad.data) + row.offset(p, p.grad);
  for (int64_t c = 0; c < p.classes; c++) to[c * p.grad.class_stride] = value;
}

}  // namespace fused_ce::cuda
