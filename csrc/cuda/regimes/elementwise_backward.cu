// The gradient with respect to logits of adjacent classes, element by element, from the statistics
// of their rows: the one read and one write that it takes.
//
// A warp or a block has a stretch of a row at a time.
#include "../kernel_launch.h"
#include "../regimes.h"
#include "vector_row.cuh"

namespace fused_ce::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kPacks = 4;

// A stretch of a row: as many packs as its threads take at a time, and with the first of them the
// single elements at the row's ends.
struct Stretches {
  int threads;  // of one stretch: a warp or the block
  int per_row;
  int64_t count;
};

// The target's logit, which no thread but the one whose place it is may read: in place, the others
// may find the gradient there.
template <class T>
__device__ __forceinline__ float element(const Pack<T> (&packs)[kPacks], int distance, int step) {
  float x = 0;
#pragma unroll
  for (int i = 0; i < kPacks; i++)
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; j++)
      if (distance == i * step + j) x = packs[i][j];
  return x;
}

// Rows that are not plain take more registers than four blocks of a multiprocessor have.
template <class T, bool kSmoothed, bool kPlain>
__global__ void __launch_bounds__(kBlock, kPlain ? kResidentBlocks : kResidentBlocks - 1)
    elementwise_backward_kernel(const __grid_constant__ Problem p, When when, Stretches stretches,
                                const Unpacking unpacking) {
  if (when == When::kUnlessGradOutputIsOne && grad_output_is_one(p)) return;
  constexpr int kPack = Pack<T>::kSize;
  const int thread = threadIdx.x % stretches.threads;
  const int per_block = kBlock / stretches.threads;
  for (int64_t s = blockIdx.x * int64_t{per_block} + threadIdx.x / stretches.threads;
       s < stretches.count; s += gridDim.x * int64_t{per_block}) {
    const int64_t r = divide(s, stretches.per_row);
    const int stretch = static_cast<int>(s - r * stretches.per_row);
    const ShortRowIndex index(p, r);
    const RowTarget target = row_target<kPlain>(p, index);
    const T* x = static_cast<const T*>(p.input.data) + index.offset(p, p.input);
    T* grad = static_cast<T*>(p.grad.data) + index.offset(p, p.grad);
    const VectorRow<T> row(x, p.classes);
    const int begin = stretch * stretches.threads * kPacks + thread;
    const int single = stretch == 0 ? row.single(thread, p.classes) : -1;

    if (!target.is_counted) {
      const float value = kPlain ? 0.0f : target.uncounted_value(p, index);
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        const int pack = begin + i * stretches.threads;
        if (pack < row.packs) Pack<T>::filled(value).store(grad + row.first(pack));
      }
      if (single >= 0) grad[single] = narrow<T>(value);
      continue;
    }
    if (stretch == 0 && thread == 0) target.check(p);
    Pack<T> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int pack = begin + i * stretches.threads;
      packs[i] = pack < row.packs ? Pack<T>::load(x + row.first(pack)) : Pack<T>::filled(0);
    }
    const float own = single >= 0 ? widen(x[single]) : 0.0f;
    const Constants k = constants<kPlain>(p);
    const float coefficient = static_cast<float>(k.smoothing.smooth);
    const float max = load_max<float>(p, index), rest = load_rest<float>(p, index);
    const float weight = target.weight<float>(p);
    const double scale = kPlain ? unweighted_scale(p, index, k) : row_scale(p, index, k);
    const int t = static_cast<int>(target.index);
    // Seen from the first of this thread's packs.
    const int distance = t - row.first(begin), step = stretches.threads * kPack;
    const bool has_target = distance >= 0 && distance < kPacks * step && distance % step < kPack;
    float target_value = 0;
    if (has_target || single == t) {
      const float target_logit = single == t ? own : element(packs, distance, step);
      target_value = target_gradient(max, rest, target_logit, weight, scale, k);
    }
    const RowGradient<float> gradient = index_gradient(max, rest, max, weight, scale, k);
    if (single >= 0) {
      const float value = kSmoothed ? gradient.of(own, coefficient) : gradient.of(own);
      grad[single] = narrow<T>(single == t ? target_value : value);
    }
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int pack = begin + i * stretches.threads;
      if (pack >= row.packs) break;
      gradient_pack<kSmoothed>(packs[i], gradient, coefficient, distance - i * step, target_value,
                               unpacking)
          .store(grad + row.first(pack));
    }
  }
}

Stretches stretches_of(const Problem& p) {
  const int64_t packs = ceil_divide(p.classes * size_of(p.input.dtype), 16);
  const int threads = packs <= kWarp * kPacks ? kWarp : kBlock;
  const int per_row = static_cast<int>(ceil_divide(packs, int64_t{threads} * kPacks));
  return {threads, per_row, p.rows * per_row};
}

}  // namespace

bool elementwise_backward_serves(const Problem& p, const Device&) {
  constexpr int64_t kMinClasses = 32;  // fewer leave most of a warp idle
  return is_vector_problem(p) && p.classes >= kMinClasses;
}

void elementwise_backward(const Problem& p, const Device& device, When when, Stream stream) {
  const Stretches stretches = stretches_of(p);
  const int64_t wanted = ceil_divide(stretches.count * stretches.threads, kBlock);
  const Grid grid{backward_blocks(wanted, device, when), kBlock};
  with_vector_type(p, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto plain) {
      const auto kernel = p.is_smoothed() ? elementwise_backward_kernel<T, true, plain>
                                          : elementwise_backward_kernel<T, false, plain>;
      launch_kernel(kernel, grid, stream, p, when, stretches, Unpacking{});
    };
    p.has_plain_rows() ? launch(std::true_type{}) : launch(std::false_type{});
  });
}

}  // namespace fused_ce::cuda
