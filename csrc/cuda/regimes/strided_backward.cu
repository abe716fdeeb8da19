// The gradient of rows whose classes are strided (strided.cuh), from the logits and the row
// statistics.
#include "../regimes.h"
#include "strided.cuh"

namespace fused_ce::cuda {

namespace {

template <class T, bool kProbabilities>
__global__ void __launch_bounds__(kStridedBlock, 2)
    strided_backward_kernel(const __grid_constant__ Problem p, When when) {
  using A = Accumulation<T>;
  if (when == When::kUnlessGradOutputIsOne && grad_output_is_one(p)) return;
  const Constants k(p);
  const int64_t step = gridDim.x * int64_t{kStridedBlock};
  for (int64_t r = blockIdx.x * int64_t{kStridedBlock} + threadIdx.x; r < p.rows; r += step) {
    const RowIndex row(p, r);
    const RowTarget target(p, row);
    if (!target.is_counted) {
      write_column<T>(p, row, narrow<T>(Accumulation<T>(target.uncounted_value(p, row))));
      continue;
    }
    if (!kProbabilities) target.check(p);
    const RowLogits<T> logits(p, row);
    const double mass = kProbabilities ? load_mass<A>(p, row) : 0.0;
    const A target_logit = kProbabilities ? A(0) : logits[target.index];
    const ColumnGradient<T, kProbabilities, A> gradient(p, row, target, load_max<A>(p, row),
                                                        load_rest<A>(p, row), mass, target_logit,
                                                        row_scale(p, row, k), k);
#pragma unroll 4
    for (int64_t c = 0; c < p.classes; c++) gradient.store(c, logits[c]);
  }
}

}  // namespace

void strided_backward(const Problem& p, const Device& device, When when, Stream stream) {
  const Grid grid{backward_blocks(strided_blocks(p, device), device, when), kStridedBlock};
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel =
        p.probabilities ? strided_backward_kernel<T, true> : strided_backward_kernel<T, false>;
    launch_kernel(kernel, grid, stream, p, when);
  });
}

}  // namespace fused_ce::cuda
