// The rows of one tile, each as the few numbers that its statistics come down to.
//
// As RowBatch is for the loss: the kernels fill in what takes a walk over the logits, and read back
// what the gradient needs; everything that is done once a row is done here, for many rows at once
// and in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../../statistics.h"
#include "../../statistics_problem.h"
#include "../rows/logits.h"
#include "../rows/row_batch.h"
#include "../rows/targets.h"
#include "../rows/tiles.h"
#include "../vector/math.h"
#include "../vector/scratch.h"
#include "../vector/simd.h"
#include "../vector/span.h"

namespace fused_ce::cpu {

template <class A>
class StatisticsBatch {
 public:
  StatisticsBatch(const Problem& p, const Statistics& s)
      : map{p.options.softcap > 0.0 ? static_cast<A>(1.0 / s.temperature) : A(1),
            static_cast<A>(p.options.softcap)},
        factor(map.bends() ? A(1) : static_cast<A>(1.0 / s.temperature)),
        p_(p),
        s_(s),
        factor_(map.bends() ? 1.0 : 1.0 / s.temperature),
        scale_(1.0 / s.temperature) {
    std::fill_n(target_class, kMaxBatch, 0);
    std::fill_n(target_difference_, kMaxBatch, A(0));
  }

  void begin(const Tile& tile) {
    size = tile.rows;
    has_ignored = false;
    if (!p_.target.data) return;
    const Runs run = tile.runs(p_.target);
    with_index_pointer(p_.target, run.first, [&](const auto* targets) {
      for (int64_t r = 0; r < size; r++) {
        const int64_t index = targets[r * run.stride];
        target_class[r] = is_counted(p_, index) ? index : -1;
        has_ignored |= target_class[r] < 0;
      }
    });
  }

  // To be called before a kernel overwrites the logits.
  void read_target_logits(const Tile& tile) {
    if (!p_.target.data) return;
    const Runs input = tile.runs(p_.input);
    with_floating_pointer(p_.input, input.first, [&](auto* logits) {
      for (int64_t r = 0; r < size; r++)
        target_logit_[r] =
            target_class[r] < 0
                ? A(0)
                : static_cast<A>(
                      to_float(logits[r * input.stride + target_class[r] * p_.input.class_stride]));
    });
    if (map.bends()) map_logits(map, target_logit_, size, target_logit_, target_slope_);
  }

  // From what the kernel has found of the rows. Ignored ones are 0, and their argmax -1.
  void write_results(const Tile& tile) {
    simd::run([this] { find_results(); });
    for (int64_t r = 0; r < size; r++)
      if (target_class[r] >= 0 && !std::isfinite(logsumexp_[r])) inspect(tile, r);
    store(log_prob_, tile, s_.log_prob);
    store(entropy_, tile, s_.entropy);
    store(logsumexp_, tile, s_.logsumexp);
    store(max, tile, p_.row_max);
    store(rest, tile, p_.row_rest);
    if (s_.argmax.data) {
      const Runs run = tile.runs(s_.argmax);
      for (int64_t r = 0; r < size; r++)
        static_cast<int64_t*>(s_.argmax.data)[run.at(r)] = target_class[r] < 0 ? -1 : argmax[r];
    }
  }

  // From the statistics and the incoming gradients to those of the logits.
  void find_gradients(const Tile& tile) {
    load(p_.row_max, tile, max);
    load(p_.row_rest, tile, rest);
    load(s_.grad_log_prob, tile, grad_log_prob_);
    load(s_.grad_logsumexp, tile, grad_logsumexp_);
    load(s_.grad_entropy, tile, grad_entropy_);
    load(s_.grad_entropy.data ? s_.entropy : Operand{}, tile, entropy_);
    simd::run([this] { solve(); });
    if (map.bends() && p_.target.data)
      for (int64_t r = 0; r < size; r++) target_grad[r] *= target_slope_[r];
  }

  bool has_targets() const { return p_.target.data && s_.grad_log_prob.data; }

  const LogitMap<A> map;  // what a kernel's logits have been through
  const A factor;         // of their differences
  int64_t size = 0;
  bool has_ignored = false;
  alignas(kLine) PerRow<int64_t> target_class;  // -1 where the row is ignored
  // From the kernel: the largest logit, where it is first, and the sums of statistics.h.
  alignas(kLine) PerRow<A> max;
  alignas(kLine) PerRow<int64_t> argmax;
  alignas(kLine) PerRow<double> rest, gaps;
  // For the kernel: a StatisticsGradient, and the gradient of the target.
  alignas(kLine) PerRow<A> constant, by_difference;
  alignas(kLine) PerRow<double> target_grad;

 private:
  template <class T>
  void store(const T* values, const Tile& tile, const Operand& to) const {
    if (!to.data) return;
    const Runs run = tile.runs(to);
    store_span(values, size, to, run.first, run.stride);
  }

  template <class T>
  void load(const Operand& from, const Tile& tile, T* values) const {
    if (!from.data) {
      std::fill_n(values, size, T(0));
      return;
    }
    const Runs run = tile.runs(from);
    load_span(from, run.first, run.stride, size, values);
  }

  StatisticsRow<double> row(int64_t r) const {
    const double inverse = 1.0 / (1.0 + rest[r]);
    return {static_cast<double>(max[r]), math::log1p_nonnegative(rest[r], inverse), inverse,
            factor_};
  }

  double difference_of_target(int64_t r) const {
    return factor_ * (static_cast<double>(target_logit_[r]) - static_cast<double>(max[r]));
  }

  void find_results() {
    if (p_.target.data) {
#pragma omp simd
      for (int64_t r = 0; r < size; r++) {
        const double value = row(r).log_prob(difference_of_target(r));
        log_prob_[r] = target_class[r] < 0 ? 0.0 : value;
      }
    }
#pragma omp simd
    for (int64_t r = 0; r < size; r++) {
      const double value = row(r).logsumexp();
      logsumexp_[r] = target_class[r] < 0 ? 0.0 : value;
    }
    if (s_.entropy.data) {
#pragma omp simd
      for (int64_t r = 0; r < size; r++) {
        const double value = row(r).entropy(gaps[r]);
        entropy_[r] = target_class[r] < 0 ? 0.0 : value;
      }
    }
  }

  // A row with a nan or an infinite maximum: argmax takes the first nan for the largest, and
  // logsumexp is the infinity where there is none.
  void inspect(const Tile& tile, int64_t r) {
    const int64_t first = tile.runs(p_.input).at(r), stride = p_.input.class_stride;
    const auto find = [&](const auto& is_it) {
      int64_t c = 0;
      while (c < p_.classes && !is_it(load_value<A>(p_.input, first + c * stride))) c++;
      return c;
    };
    const int64_t nan = find([](A x) { return x != x; });
    if (nan < p_.classes) {
      argmax[r] = nan;
      logsumexp_[r] = std::numeric_limits<double>::quiet_NaN();
    } else if (!map.bends()) {
      argmax[r] = find([&](A x) { return x == max[r]; });
      logsumexp_[r] = max[r];
    }
  }

  void solve() {
#pragma omp simd
    for (int64_t r = 0; r < size; r++) {
      const StatisticsGradient<double> gradient = gradient_of(r);
      constant[r] = static_cast<A>(gradient.constant);
      by_difference[r] = static_cast<A>(gradient.by_difference);
    }
    if (!has_targets()) return;
#pragma omp simd
    for (int64_t r = 0; r < size; r++)
      target_difference_[r] = difference_of(target_logit_[r], max[r], factor);
#pragma omp simd
    for (int64_t r = 0; r < size; r++) target_grad[r] = gradient_of_target(r);
  }

  StatisticsGrads<double> grads(int64_t r) const {
    return {grad_log_prob_[r], grad_entropy_[r], grad_logsumexp_[r]};
  }

  StatisticsGradient<double> gradient_of(int64_t r) const {
    const StatisticsRow<double> found = row(r);
    return {grads(r), entropy_[r] - found.log_total, found.inverse_total, scale_};
  }

  double gradient_of_target(int64_t r) const {
    const StatisticsRow<double> found = row(r);
    const A e = math::exp_nonpositive(target_difference_[r]);
    return target_gradient(grads(r), static_cast<double>(target_difference_[r]),
                           static_cast<double>(e), rest[r], entropy_[r] - found.log_total,
                           found.inverse_total, scale_);
  }

  const Problem& p_;
  const Statistics& s_;
  const double factor_, scale_;
  alignas(kLine) PerRow<A> target_logit_, target_slope_, target_difference_;
  alignas(kLine) PerRow<double> log_prob_, entropy_, logsumexp_;
  alignas(kLine) PerRow<double> grad_log_prob_, grad_entropy_, grad_logsumexp_;
};

}  // namespace fused_ce::cpu
