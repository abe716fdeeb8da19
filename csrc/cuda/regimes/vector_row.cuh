// Rows of adjacent classes, taken 16 bytes at a time wherever they begin.
//
// A row of an odd number of classes begins between two 16-byte boundaries. Its first and last few
// elements are then read one by one, each by another thread, and what lies between in packs.
#pragma once

#include "../row/row.cuh"

namespace fused_ce::cuda {

// Whether a tensor's rows may be taken this way.
inline bool has_vector_rows(const Operand& operand) {
  return !operand.data || (operand.class_stride == 1 && operand.dtype != DType::kFloat64);
}
// Positions within a row fit in an int with room to spare.
constexpr int64_t kMaxVectorClasses = 1 << 30;
constexpr int64_t kMaxVectorRows = 1 << 30;

// Whether every row of the gradient is as far from a 16-byte boundary as the logits' is.
inline bool has_aligned_gradient(const Problem& p) {
  if (!p.grad.data) return true;
  const auto differs = [&](int64_t a, int64_t b) { return (a - b) * size_of(p.grad.dtype) % 16; };
  for (int d = 0; d < p.row_dims; d++)
    if (differs(p.input.row_strides[d], p.grad.row_strides[d])) return false;
  return (reinterpret_cast<uintptr_t>(p.input.data) - reinterpret_cast<uintptr_t>(p.grad.data)) %
             16 ==
         0;
}

// What all kernels of such rows ask for.
inline bool has_vector_operands(const Problem& p) {
  return p.rows > 0 && p.rows < kMaxVectorRows && p.row_dims <= 2 && !p.probabilities &&
         !p.maps_logits() && !p.is_focal() && has_vector_rows(p.input) && has_vector_rows(p.grad) &&
         has_aligned_gradient(p) && p.classes <= kMaxVectorClasses;
}

// Of those that take a row alone: weights of all classes would be as much to read as the logits.
inline bool is_vector_problem(const Problem& p) {
  return has_vector_operands(p) && !(p.options.weight.data && p.is_smoothed());
}

// The classes of one row: `head` single ones, `packs` full packs, and single ones up to the end.
template <class T>
struct VectorRow {
  static constexpr int kPack = Pack<T>::kSize;

  int head, packs;

  __device__ __forceinline__ VectorRow(const T* row, int64_t row_classes) {
    const int classes = static_cast<int>(row_classes), past_boundary = misalignment(row);
    head = past_boundary == 0 ? 0 : kPack - past_boundary;
    if (head > classes) head = classes;
    packs = (classes - head) / kPack;
  }

  // The class of the single element that falls to a thread, or -1; to be asked of at least
  // 2 * kPack threads.
  __device__ __forceinline__ int single(int thread, int64_t classes) const {
    if (thread < head) return thread;
    const int last = head + packs * kPack + thread - kPack;
    return thread >= kPack && last < static_cast<int>(classes) ? last : -1;
  }

  // The first class of a pack.
  __device__ __forceinline__ int first(int pack) const { return head + pack * kPack; }

  // Elements since the last 16-byte boundary.
  __device__ __forceinline__ static int misalignment(const T* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  }
};

// Takes in a pack whose logits are no larger than sums.max, whose base is `base`, and where
// `has_max` says so equal to it. With smoothing every class has the same coefficient, which is
// taken for 1 until spread_out(): a register to hold it meanwhile would be one too many.
template <bool kSmoothed, class T>
__device__ __forceinline__ void add_pack(const Pack<T>& pack, float base, bool has_max,
                                         LogitSums<float>& sums) {
  constexpr int kPack = Pack<T>::kSize;
  if (has_max) {  // seldom
#pragma unroll
    for (int j = 0; j < kPack; j++) {
      sums.add_logit(pack[j], base, Exp{});
      if (kSmoothed) sums.gaps += base - pack[j];
    }
  } else {
    float even = 0, odd = 0, differences = 0;
#pragma unroll
    for (int j = 0; j < kPack; j++) {
      const float difference = pack[j] - base;
      (j % 2 ? odd : even) += exp_nonpositive(difference);
      if (kSmoothed) differences += difference;
    }
    sums.rest += even + odd;
    if (kSmoothed) sums.gaps -= differences;
  }
  if (kSmoothed) sums.mass += kPack;
}

// Gives the classes their coefficient.
template <bool kSmoothed>
__device__ __forceinline__ void spread_out(const Problem& p, LogitSums<float>& sums) {
  if (!kSmoothed) return;
  const float coefficient = unweighted_coefficient(p);
  sums.gaps *= coefficient;
  sums.mass *= coefficient;
}

// The gradient of the classes of a pack, the target's being `target_value`. `distance` is that of
// the target from the pack's first class.
template <bool kSmoothed, class T>
__device__ __forceinline__ Pack<T> gradient_pack(const Pack<T>& logits,
                                                 const RowGradient<float>& gradient,
                                                 float coefficient, int distance,
                                                 float target_value, const Unpacking& unpacking) {
  constexpr int kPack = Pack<T>::kSize;
  float values[kPack];
#pragma unroll
  for (int j = 0; j < kPack; j++) {
    const float x = logits.get(j, unpacking);
    values[j] = kSmoothed ? gradient.of(x, coefficient) : gradient.of(x);
  }
  if (static_cast<unsigned>(distance) < static_cast<unsigned>(kPack)) {
#pragma unroll
    for (int j = 0; j < kPack; j++)
      if (j == distance) values[j] = target_value;
  }
  Pack<T> result;
  result.set(values);
  return result;
}

}  // namespace fused_ce::cuda
