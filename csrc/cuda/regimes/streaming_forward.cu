// Rows that need not or cannot stay on chip: a block walks along each, 16 bytes at a time.
//
// For the loss alone that is one read, several packs on their way in every thread. Where a gradient
// is wanted the block walks back the way it came, so that it begins with what was read last: the
// blocks are as wide as can be then, for the rows in work to be few enough to stay in the L2 cache.
#include "../kernel_launch.h"
#include "../regimes.h"
#include "vector_row.cuh"

namespace fused_ce::cuda {

namespace {

constexpr int kPacks = 4;  // on their way in each thread

constexpr int kLossThreads = 256, kGradientThreads = 1024;

template <int kThreads>
constexpr int kMinBlocks = kThreads == kLossThreads ? 5 : 1;

template <int kThreads>
struct Shared {
  LogitSums<float> parts[kThreads / kWarp];
};

template <class T, bool kSmoothed, int kThreads>
__device__ __forceinline__ void add_row(const T* x, const VectorRow<T>& row,
                                        LogitSums<float>& sums) {
  for (int first = threadIdx.x; first < row.packs; first += kThreads * kPacks) {
    Pack<T> packs[kPacks];
    float max = sums.max;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const int pack = first + i * kThreads;
      packs[i] = pack < row.packs ? Pack<T>::load(x + row.first(pack))
                                  : Pack<T>::filled(-kInfinity<float>);
    }
#pragma unroll
    for (int i = 0; i < kPacks; i++) max = larger(max, packs[i].max());
    sums.template raise<kSmoothed>(max, Exp{});
    const float base = base_of(max);
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      // What fills up the last packs adds nothing but to the gaps and the mass.
      if (kSmoothed && first + i * kThreads >= row.packs) continue;
      add_pack<kSmoothed>(packs[i], base, packs[i].max() == base, sums);
    }
  }
}

template <class T, bool kSmoothed, int kThreads>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kThreads>)
    streaming_forward_kernel(const __grid_constant__ Problem p,
                             const __grid_constant__ Result result) {
  auto& shared = *static_cast<Shared<kThreads>*>(shared_memory());
  const int thread = threadIdx.x;
  const ShortRowIndex index(p, blockIdx.x);
  const RowTarget target(p, index);
  const T* x = static_cast<const T*>(p.input.data) + index.offset(p, p.input);
  constexpr bool kGradient = kThreads == kGradientThreads;
  T* grad = static_cast<T*>(p.grad.data) + (kGradient ? index.offset(p, p.grad) : 0);
  const VectorRow<T> row(x, p.classes);
  const int single = row.single(thread, p.classes);
  float loss = 0;
  if (!target.is_counted) {
    const float value = target.uncounted_value(p, index);
    if constexpr (kGradient) {
      for (int i = thread; i < row.packs; i += kThreads)
        Pack<T>::filled(value).store(grad + row.first(i));
      if (single >= 0) grad[single] = narrow<T>(value);
    }
    if (thread == 0) store_row(p, index, loss = value, LogitSums<float>{});
  } else {
    if (thread == 0) target.check(p);
    const float target_logit = target.in_range(p) ? widen(x[target.index]) : 0.0f;
    const float own = single >= 0 ? widen(x[single]) : -kInfinity<float>;
    LogitSums<float> sums;
    sums.max = larger(own, -kInfinity<float>);
    sums.add_logit(own, base_of(sums.max), Exp{});
    if (kSmoothed && single >= 0) sums.add_gap(base_of(sums.max) - own, 1.0f);
    add_row<T, kSmoothed, kThreads>(x, row, sums);
    spread_out<kSmoothed>(p, sums);
    add_lanes<kWarp, kSmoothed>(sums);
    if (thread % kWarp == 0) shared.parts[thread / kWarp] = sums;
    __syncthreads();
    add_parts<kThreads / kWarp, kSmoothed>(shared.parts, sums);
    sums.close();

    const Constants k(p);
    const float weight = target.weight<float>(p);
    if (thread == 0) {
      loss = row_loss(p, index, sums, target_logit, weight, k);
      store_row(p, index, loss, sums);
    }
    if constexpr (kGradient) {
      const double scale = row_scale(p, index, k);
      const float coefficient = static_cast<float>(k.smoothing.smooth);
      const RowGradient<float> gradient =
          index_gradient(sums.max, sums.rest, target_logit, weight, scale, k);
      const float target_value =
          target_gradient(sums.max, sums.rest, target_logit, weight, scale, k);
      const int t = static_cast<int>(target.index);
      const int rounds = (row.packs + kThreads - 1) / kThreads;
#pragma unroll 2
      for (int round = rounds - 1; round >= 0; round--) {
        const int pack = round * kThreads + thread, first = row.first(pack);
        if (pack >= row.packs) continue;
        gradient_pack<kSmoothed>(Pack<T>::load(x + first), gradient, coefficient, t - first,
                                 target_value, Unpacking{})
            .store(grad + first);
      }
      if (single >= 0) {
        const float value = kSmoothed ? gradient.of(own, coefficient) : gradient.of(own);
        grad[single] = narrow<T>(single == t ? target_value : value);
      }
    }
  }
  if (thread < kWarp) store_block(p, result, loss, blockIdx.x, gridDim.x);
}

template <class T, int kThreads>
void launch(const Problem& p, const Result& result, Stream stream) {
  const Grid grid{p.rows, kThreads, sizeof(Shared<kThreads>)};
  const auto kernel = p.is_smoothed() ? streaming_forward_kernel<T, true, kThreads>
                                      : streaming_forward_kernel<T, false, kThreads>;
  launch_kernel(kernel, grid, stream, p, result);
}

}  // namespace

bool streaming_serves(const Problem& p, const Device&) {
  constexpr int64_t kMinClasses = 4096;  // fewer leave the threads of a block with too little
  return is_vector_problem(p) && p.classes >= kMinClasses;
}

int64_t streaming_blocks(const Problem& p, const Device&) { return p.rows; }

void streaming_forward(const Problem& p, const Result& result, const Device&, Stream stream) {
  with_vector_type(p, [&](auto zero) {
    if (p.grad.data)
      launch<decltype(zero), kGradientThreads>(p, result, stream);
    else
      launch<decltype(zero), kLossThreads>(p, result, stream);
  });
}

}  // namespace fused_ce::cuda
