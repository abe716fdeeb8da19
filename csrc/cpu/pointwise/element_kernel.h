// Losses and gradients of elements, a block of them at a time.
//
// A loss is evaluated by evaluate.h. All else that a call may have, as layouts, types, weights,
// incoming gradients and the sum of the losses, are loops of their own over what that left in the
// first-level cache, and are compiled once for all losses. A run that is contiguous and of the
// accumulation type is used where it lies, and a gradient that is one is written there.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../vector/scratch.h"
#include "../vector/simd.h"
#include "../vector/span.h"
#include "evaluate.h"
#include "kernels.h"

namespace fused_ce::cpu {

// The numbers of one operand for a block of elements.
template <class A>
class BlockOperand {
 public:
  explicit BlockOperand(const Operand& operand) : operand_(operand) {}

  bool is_given() const { return operand_.data != nullptr; }

  // Returns how many of the tile's elements are one run here.
  int64_t begin_tile(const Tile& tile) {
    if (!is_given()) return tile.rows;
    runs_ = tile.runs(operand_);
    return runs_.length;
  }

  bool is_direct(bool whole_tile) const {
    return cpu::is_direct<A>(operand_, runs_.stride) && (!whole_tile || runs_.count == 1);
  }

  // Elements [first, first + n) of the tile, of one run of each operand or of all runs. What is
  // expanded along the tiles is loaded once for all of them.
  const A* read(int64_t first, int64_t n, bool whole_tile) {
    if (!is_given()) return nullptr;
    if (is_direct(whole_tile)) return static_cast<const A*>(operand_.data) + runs_.at(first);
    const Runs runs = part(first, n, whole_tile);
    const bool is_loaded = runs.first == loaded_.first && runs.stride == loaded_.stride &&
                           runs.length == loaded_.length && runs.count == loaded_.count &&
                           runs.step == loaded_.step;
    if (!is_loaded) load_runs(operand_, runs, buffer_);
    loaded_ = runs;
    return buffer_;
  }

  // Where the results for these elements go before store() has them.
  A* result(int64_t first, bool whole_tile) {
    return is_direct(whole_tile) ? static_cast<A*>(operand_.data) + runs_.at(first) : buffer_;
  }

  void store(int64_t first, int64_t n, bool whole_tile) {
    if (!is_direct(whole_tile)) store_runs(buffer_, operand_, part(first, n, whole_tile));
  }

 private:
  Runs part(int64_t first, int64_t n, bool whole_tile) const {
    return whole_tile ? runs_ : Runs::one(runs_.at(first), runs_.stride, n);
  }

  const Operand& operand_;
  Runs runs_{};
  Runs loaded_{0, 0, -1, 0, 0};
  alignas(kLine) A buffer_[kPointwiseBlock];
};

template <class A>
class ElementKernel {
 public:
  ElementKernel(const Problem& p, const Pointwise& s, Evaluate<A> evaluate)
      : settings_(s),
        evaluate_(evaluate),
        reduces_(p.reduces()),
        input_(p.input),
        target_(p.target),
        weight_(s.weight),
        pos_weight_(s.pos_weight),
        grad_output_(p.reduces() ? kNothing : p.grad_output),
        losses_(p.reduces() ? kNothing : p.loss),
        grads_(p.grad),
        wants_loss_(p.loss.data != nullptr),
        wants_grad_(p.grad.data != nullptr),
        scale_(scale_of(p, s,
                        [](const Operand& operand) { return load_value<double>(operand, 0); })) {}

  // The sum of the tile's losses.
  double tile(const Tile& tile) {
    int64_t length = tile.rows;
    for (BlockOperand<A>* operand :
         {&input_, &target_, &weight_, &pos_weight_, &grad_output_, &losses_, &grads_})
      length = std::min(length, operand->begin_tile(tile));
    if (tile.rows <= kPointwiseBlock) return block(0, tile.rows, true);
    double sum = 0;
    for (int64_t run = 0; run < tile.rows; run += length)
      for (int64_t i = 0; i < length; i += kPointwiseBlock)
        sum += block(run + i, std::min(kPointwiseBlock, length - i), false);
    return sum;
  }

 private:
  inline static const Operand kNothing{};

  double block(int64_t first, int64_t n, bool whole_tile) {
    const A* x = input_.read(first, n, whole_tile);
    const A* y = target_.read(first, n, whole_tile);
    const A* pos_weight = pos_weight_.read(first, n, whole_tile);
    A* losses = losses_.result(first, whole_tile);
    A* slopes = grads_.result(first, whole_tile);
    evaluate_(settings_, {x, y, pos_weight, n, scale_, wants_loss_ ? losses : nullptr,
                          wants_grad_ ? slopes : nullptr});
    if (const A* weight = weight_.read(first, n, whole_tile)) {
      if (wants_loss_) multiply(losses, weight, n);
      if (wants_grad_) multiply(slopes, weight, n);
    }
    if (wants_grad_) {
      if (const A* factors = grad_output_.read(first, n, whole_tile)) multiply(slopes, factors, n);
      grads_.store(first, n, whole_tile);
    }
    if (!wants_loss_) return 0;
    if (reduces_) return sum_of(losses, n);
    losses_.store(first, n, whole_tile);
    return 0;
  }

  static void multiply(A* values, const A* factors, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) values[i] *= factors[i];
  }

  // In double, but four at a time: to convert each would take longer than what is lost is worth,
  // and of equal numbers nothing is.
  static double sum_of(const A* values, int64_t n) {
    const int64_t quarter = n / 4;
    const A *a = values, *b = a + quarter, *c = b + quarter, *d = c + quarter;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < quarter; i++) sum += static_cast<double>((a[i] + b[i]) + (c[i] + d[i]));
    for (int64_t i = 4 * quarter; i < n; i++) sum += static_cast<double>(values[i]);
    return sum;
  }

  const Pointwise& settings_;
  const Evaluate<A> evaluate_;
  const bool reduces_;
  BlockOperand<A> input_, target_, weight_, pos_weight_, grad_output_, losses_, grads_;
  const bool wants_loss_, wants_grad_;
  const Scale<A> scale_;
};

template <class A>
void pointwise_tiles(const Problem& p, const Pointwise& s, const Tiling& tiling, int64_t begin,
                     int64_t end, double* tile_sums) {
  simd::with_level([&](auto level) {
    const Evaluate<A> evaluate = evaluate_for<level, A>(s);
    simd::run_as<level>([&] {
      ElementKernel<A> kernel(p, s, evaluate);
      for (int64_t t = begin; t < end; t++) tile_sums[t] = kernel.tile(Tile(p, tiling, t));
    });
  });
}

}  // namespace fused_ce::cpu
