// The loss of rows whose classes are strided (strided.cuh), and their gradient.
//
// The logits of few classes stay in a thread's registers and are read once. Of more they are read a
// second time for the gradient.
#include "../regimes.h"
#include "strided.cuh"

namespace fused_ce::cuda {

namespace {

constexpr int kUnroll = 8;        // logits that a thread has on their way at a time
constexpr int kKeptClasses = 32;  // that it may keep

template <class A>
struct Kept {
  A x[kKeptClasses];
};

// A part of the classes, `count` of them valid.
template <bool kProbabilities, int kCount, class A>
__device__ __forceinline__ void add_classes(const A* x, int64_t first, int64_t count,
                                            const Coefficients<kProbabilities, A>& a,
                                            LogitSums<A, kProbabilities>& sums) {
  A max = sums.max;
#pragma unroll
  for (int i = 0; i < kCount; i++) max = larger(max, x[i]);
  sums.template raise<true>(max, Exp{});
  const A base = base_of(max);
#pragma unroll
  for (int part = 0; part < kCount; part += kUnroll) {
    TermSums<A> few;
#pragma unroll
    for (int i = part; i < part + kUnroll; i++) {
      few.add_logit(x[i], base, Exp{});
      if (a.spreads() && i < count) few.add_gap(base - x[i], a(first + i));
    }
    sums.add(few);
  }
}

template <class T, bool kProbabilities, bool kKeeps>
__global__ void __launch_bounds__(kStridedBlock, kProbabilities && !kKeeps ? 1 : 2)
    strided_forward_kernel(const __grid_constant__ Problem p,
                           const __grid_constant__ Result result) {
  using A = Accumulation<T>;
  auto& losses = *static_cast<double (*)[kStridedBlock / kWarp]>(shared_memory());
  const Constants k(p);
  const int64_t r = blockIdx.x * int64_t{kStridedBlock} + threadIdx.x;
  std::conditional_t<kProbabilities, double, A> loss = 0;
  if (r < p.rows) {
    const RowIndex row(p, r);
    const RowTarget target(p, row);
    if (!target.is_counted) {
      loss = target.uncounted_value(p, row);
      if (p.grad.data) write_column<T>(p, row, narrow<T>(static_cast<A>(loss)));
      store_row(p, row, loss, LogitSums<A, kProbabilities>{});
    } else {
      if (!kProbabilities) target.check(p);
      const RowLogits<T> logits(p, row);
      const Coefficients<kProbabilities, A> a(p, row, k.smoothing);
      const A target_logit = kProbabilities ? A(0) : logits[target.index];
      LogitSums<A, kProbabilities> sums;
      Kept<A> kept;
      if constexpr (kKeeps) {
#pragma unroll
        for (int c = 0; c < kKeptClasses; c++)
          kept.x[c] = c < p.classes ? logits[c] : -kInfinity<A>;
        add_classes<kProbabilities, kKeptClasses>(kept.x, 0, p.classes, a, sums);
      } else {
        for (int64_t first = 0; first < p.classes; first += kUnroll) {
          A x[kUnroll];
#pragma unroll
          for (int i = 0; i < kUnroll; i++)
            x[i] = first + i < p.classes ? logits[first + i] : -kInfinity<A>;
          add_classes<kProbabilities, kUnroll>(x, first, p.classes - first, a, sums);
        }
      }
      sums.close();
      loss = row_loss<kProbabilities, true>(p, row, sums, target_logit, target.weight<A>(p), k);
      store_row(p, row, loss, sums);
      if (p.grad.data) {
        const ColumnGradient<T, kProbabilities, A> gradient(
            p, row, target, sums.max, sums.rest, sums.mass, target_logit, row_scale(p, row, k), k);
        if constexpr (kKeeps) {
#pragma unroll
          for (int c = 0; c < kKeptClasses; c++)
            if (c < p.classes) gradient.store(c, kept.x[c]);
        } else {
#pragma unroll 4
          for (int64_t c = 0; c < p.classes; c++) gradient.store(c, logits[c]);
        }
      }
    }
  }
  const double sum = sum_lanes<kWarp>(static_cast<double>(loss));
  if (threadIdx.x % kWarp == 0) losses[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  double block_loss = 0;
  for (const double part : losses) block_loss += part;
  store_block(p, result, block_loss, blockIdx.x, gridDim.x);
}

template <class T, bool kProbabilities>
void launch(const Problem& p, const Result& result, const Device& device, Stream stream) {
  const Grid grid{strided_blocks(p, device), kStridedBlock,
                  sizeof(double) * (kStridedBlock / kWarp)};
  // A thread's registers hold half as many doubles; the second read of few classes is from a cache.
  if constexpr (!std::is_same_v<T, double>)
    if (p.grad.data && p.classes <= kKeptClasses)
      return launch_kernel(strided_forward_kernel<T, kProbabilities, true>, grid, stream, p,
                           result);
  launch_kernel(strided_forward_kernel<T, kProbabilities, false>, grid, stream, p, result);
}

}  // namespace

bool strided_serves(const Problem& p, const Device&) {
  return has_strided_classes(p) && !p.maps_logits();
}

int64_t strided_blocks(const Problem& p, const Device&) {
  return ceil_divide(p.rows, kStridedBlock);
}

void strided_forward(const Problem& p, const Result& result, const Device& device, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    if (p.probabilities)
      launch<T, true>(p, result, device, stream);
    else
      launch<T, false>(p, result, device, stream);
  });
}

}  // namespace fused_ce::cuda
