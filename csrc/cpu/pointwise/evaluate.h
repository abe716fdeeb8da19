// The formula of pointwise.h for a block of elements that lie one after another.
//
// One loop evaluates it, but for what takes long of what all of it waits for: the exp of a logistic
// function and a focal loss's power have loops of their own before it. Processors of few waiting
// instructions take a third less time for short chains of dependent ones than for a long one. A
// loss is compiled three times, for what is wanted of it, and not for what else a call may have.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../../pointwise.h"
#include "../vector/log.h"
#include "../vector/scratch.h"
#include "../vector/simd.h"
#include "kernels.h"
#include "powers.h"

namespace fused_ce::cpu {

template <class A>
struct Block {
  const A *input, *target;
  const A* pos_weight;  // where the loss has one
  int64_t n;
  Scale<A> scale;  // of the slopes
  A* losses;       // as slopes, null where it is not wanted
  A* slopes;
};

template <class A>
using Evaluate = void (*)(const Pointwise&, const Block<A>&);

// The functions of one element; its exp(-|x|), and its power, are there already.
template <class A>
struct ElementMath {
  A e, power;

  A abs(A x) const { return std::fabs(x); }
  A exp_nonpositive(A) const { return e; }
  math::OnePlus<A> one_plus(A y) const { return math::one_plus(y); }
  A pow_nonnegative(A, A) const { return power; }
  A log_or_zero(A x) const { return math::log_or_zero(x); }
  A exp(A x) const { return math::exp(x); }
};

template <class A, class Loss>
class BlockEvaluation {
 public:
  BlockEvaluation(const Pointwise& s, const Block<A>& block) : loss_of_(s), block_(block) {}

  void run() {
    const auto [x, y, pos_weight, n, scale, losses, slopes] = block_;
    if constexpr (Loss::kIsLogistic) find_exps(x, n);
    if constexpr (Loss::kTakesPower) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const Logistic<A> s(x[i], ElementMath<A>{exps_[i], A(0)});
        powers_[i] = std::fabs(loss_of_.base_of(s, y[i]));
      }
      raise(powers_, n, loss_of_.gamma);
    }
    if (!slopes)
      finish<true, false>();
    else if (!losses)
      finish<false, true>();
    else
      finish<true, true>();
  }

 private:
  // Where no element of a block is very sure they take fewer instructions, with the same bits.
  void find_exps(const A* x, int64_t n) {
    if constexpr (std::is_same_v<A, float>) {
      A largest = A(0);
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < n; i++)
        largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
      if (largest < math::kNormalExp) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) exps_[i] = math::exp_normal(-std::fabs(x[i]));
        return;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) exps_[i] = math::exp_nonpositive(-std::fabs(x[i]));
  }

  template <bool kLoss, bool kSlope>
  void finish() {
    const auto [x, y, pos_weight, n, scale, losses, slopes] = block_;
    const Loss loss_of = loss_of_;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const A weight = Loss::kWeighsTarget ? pos_weight[i] : A(1);
      const A e = Loss::kIsLogistic ? exps_[i] : A(0);
      const A power = Loss::kTakesPower ? powers_[i] : A(0);
      const Element<A> element = loss_of(x[i], y[i], weight, ElementMath<A>{e, power});
      if (kLoss) losses[i] = element.loss;
      if (kSlope) slopes[i] = scale * element.slope;
    }
  }

  const Loss loss_of_;
  const Block<A>& block_;
  alignas(kLine) A exps_[kPointwiseBlock];
  alignas(kLine) A powers_[kPointwiseBlock];
};

template <simd::Level kLevel, class A, class Loss>
void evaluate(const Pointwise& s, const Block<A>& block) {
  simd::run_as<kLevel>([&] { BlockEvaluation<A, Loss>(s, block).run(); });
}

// What evaluates the loss of a call, compiled for one level.
template <simd::Level kLevel, class A>
Evaluate<A> evaluate_for(const Pointwise& s) {
  Evaluate<A> found = nullptr;
  with_pointwise_loss<A>(
      s, [&](const auto& loss) { found = &evaluate<kLevel, A, std::decay_t<decltype(loss)>>; });
  return found;
}

}  // namespace fused_ce::cpu
