// Many rows side by side, one row to a vector lane, the classes one after another.
//
// Serves logits whose rows lie next to each other in memory, as (N, C, H, W) does, without copying
// them, and rows of few classes, which alone would waste the lanes: those are turned into a
// class-major tile in the cache and turned back. The terms exp(x - M) are kept in the gradient's
// own memory or in the tile; where neither can hold them they are computed a second time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "../formula.h"
#include "math.h"
#include "row_task.h"
#include "span.h"

namespace fused_ce::cpu {

constexpr int64_t kMaxLanes = 512;

template <class A>
class LaneKernel {
 public:
  LaneKernel(const Problem& p, const Tiling& tiling)
      : p_(p),
        smoothing_(p.label_smoothing, p.classes),
        row_smoothing_(p.label_smoothing, p.classes),
        weight_(static_cast<const A*>(p.weight)),
        input_direct_(is_direct<A>(p.input, lane_stride(p.input))),
        grad_direct_(is_direct<A>(p.grad, lane_stride(p.grad))),
        needs_tile_(!input_direct_ || (p.grad.data && !(grad_direct_ && in_place()))),
        tile_(needs_tile_ && p.classes * tiling.tile_rows <= kMaxTile ? p.classes * tiling.tile_rows
                                                                      : 0) {}

  // Returns the sum of the tile's losses; the rest as RowKernel::forward.
  double forward(const Tile& tile) {
    begin(tile);
    read_tasks(tile);
    if (!p_.probabilities) read_target_logits();
    find_max();
    sum_terms();
    const double total = write_losses(tile);
    if (p_.grad.data) write_gradient(keeps_terms());
    return total;
  }

  void backward(const Tile& tile) {
    begin(tile);
    read_tasks(tile);
    read_statistics(tile);
    if (p_.probabilities)
      sum_mass();
    else
      read_target_logits();
    describe();
    write_gradient(false);
  }

 private:
  // Small enough that a tile and what it is made from stay in the second-level cache.
  static constexpr int64_t kMaxTile = 65536;
  // Lanes whose sums are held in registers at a time.
  static constexpr int64_t kStrip = 32;

  using Lanes = A[kMaxLanes];

  int64_t lane_stride(const Operand& operand) const { return operand.row_strides[p_.row_dims - 1]; }

  bool keeps_terms() const { return p_.grad.data && (grad_direct_ || !tile_.empty()); }

  // Whether a class other than the target has a coefficient a_c.
  bool has_coefficients() const { return p_.probabilities || smoothing_.smooth != A(0); }

  void begin(const Tile& tile) {
    n_ = tile.rows;
    input_ = tile.run(p_.input).first;
    target_ = tile.run(p_.target).first;
    grad_ = tile.run(p_.grad).first;
    loaded_ = false;
  }

  void read_tasks(const Tile& tile) {
    if (!p_.probabilities) read_targets(tile.run(p_.target));
    ignores_ = !p_.probabilities && std::count(target_class_, target_class_ + n_, -1) > 0;
    for (int64_t l = 0; l < n_; l++) target_weight_[l] = 1.0;
    if (weight_ && !p_.probabilities) {
      for (int64_t l = 0; l < n_; l++)
        if (target_class_[l] >= 0) target_weight_[l] = weight_[target_class_[l]];
    }
    for (int64_t l = 0; l < n_; l++) scale_[l] = 1.0 / p_.denominator;
    if (p_.grad_output.data) {
      const Run grad_output = tile.run(p_.grad_output);
      for (int64_t l = 0; l < n_; l++)
        scale_[l] = load_value<double>(p_.grad_output, grad_output.at(l)) / p_.denominator;
    }
  }

  // The class of each lane, -1 for a row that is not counted.
  void read_targets(const Run run) {
    with_index_pointer(p_.target, run.first, [&](const auto* targets) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        const int64_t index = targets[l * run.stride];
        target_class_[l] = is_counted(p_, index) ? static_cast<int32_t>(index) : -1;
      }
    });
  }

  A* grad_lanes(int64_t c) const {
    return static_cast<A*>(p_.grad.data) + grad_ + c * p_.grad.class_stride;
  }

  bool in_place() const { return p_.grad.data == p_.input.data; }

  // Where the terms of class c are kept. The gradient's memory serves where it is in the cache
  // anyway; fresh memory is better written once, a long run at a time, than strip by strip.
  A* kept_lanes(int64_t c) {
    if (!tile_.empty()) return tile_.data() + c * n_;
    return grad_direct_ ? grad_lanes(c) : nullptr;
  }

  // The logits of class c in `count` lanes from `first` on. Once the tile holds them they are not
  // loaded again.
  const A* logits(int64_t c, int64_t first, int64_t count) {
    const int64_t stride = lane_stride(p_.input);
    const int64_t offset = input_ + c * p_.input.class_stride + first * stride;
    if (input_direct_) return static_cast<const A*>(p_.input.data) + offset;
    A* lanes = tile_.empty() ? buffer_ : tile_.data() + c * n_ + first;
    if (!loaded_) load_span(p_.input, offset, stride, count, lanes);
    return lanes;
  }

  const A* probabilities(int64_t c) {
    return p_.probabilities ? read_span<A>(p_.target, target_ + c * p_.target.class_stride,
                                           lane_stride(p_.target), n_, probability_buffer_)
                            : nullptr;
  }

  // Calls use(a) with a(l), the coefficient of class c in lane l before smoothing's share.
  template <class Use>
  void with_lane_coefficients(int64_t c, const Use& use) {
    const A weight = weight_ ? weight_[c] : A(1);
    if (const A* q = probabilities(c)) {
      const Smoothing<A> smoothing = smoothing_;
      use([=](int64_t l) { return probability_coefficient(q[l], weight, smoothing); });
    } else {
      use([=](int64_t) { return weight; });
    }
  }

  void find_max() {
    for (int64_t l = 0; l < n_; l++) max_[l] = -math::kInf<A>;
    for (int64_t c = 0; c < p_.classes; c++) {
      const A* x = logits(c, 0, n_);
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) max_[l] = x[l] > max_[l] ? x[l] : max_[l];
    }
    loaded_ = !tile_.empty();
  }

  void sum_terms() {
    if (has_coefficients()) sum_gaps();
    for (int64_t first = 0; first < n_; first += kStrip) {
      if (n_ - first < kStrip)
        sum_strip(first, n_ - first);
      else
        sum_strip(first, std::integral_constant<int64_t, kStrip>{});
    }
  }

  // Sums exp(x - M) over the classes but the target, for a few lanes, whose sums fit in registers.
  template <class Width>
  void sum_strip(int64_t first, Width width) {
    A base[kStrip];
    double sum[kStrip];
    int32_t skipped[kStrip];
    for (int64_t l = 0; l < width; l++) {
      const A max = max_[first + l];
      base[l] = max == -math::kInf<A> ? A(0) : max;  // exp(-inf - 0) is 0, not NaN
      // But a row of -inf alone has no softmax.
      sum[l] = max == -math::kInf<A> ? std::numeric_limits<double>::quiet_NaN() : 0.0;
      skipped[l] = p_.probabilities ? -1 : target_class_[first + l];
    }
    A scratch[kStrip];
    for (int64_t c = 0; c < p_.classes; c++) {
      const A* x = logits(c, first, width);
      A* terms = keeps_terms() ? kept_lanes(c) + first : scratch;
      const int32_t cls = static_cast<int32_t>(c);
#pragma omp simd
      for (int64_t l = 0; l < width; l++) {
        const A e = math::exp_nonpositive(x[l] - base[l]);
        terms[l] = skipped[l] == cls ? A(0) : e;
      }
#pragma omp simd
      for (int64_t l = 0; l < width; l++) sum[l] += terms[l];
    }
    for (int64_t l = 0; l < width; l++) sum_[first + l] = sum[l];
  }

  // sum_c a_c (M - x_c) and sum_c a_c.
  void sum_gaps() {
    clear(gaps_), clear(mass_);
    for (int64_t c = 0; c < p_.classes; c++) {
      const A* x = logits(c, 0, n_);
      with_lane_coefficients(c, [&](auto coefficient) {
#pragma omp simd
        for (int64_t l = 0; l < n_; l++) {
          const A a = coefficient(l);
          gaps_[l] += a * (max_[l] - x[l]);
          mass_[l] += a;
        }
      });
    }
  }

  void sum_mass() {
    clear(mass_);
    for (int64_t c = 0; c < p_.classes; c++) {
      with_lane_coefficients(c, [&](auto coefficient) {
#pragma omp simd
        for (int64_t l = 0; l < n_; l++) mass_[l] += coefficient(l);
      });
    }
  }

  void read_target_logits() {
    const int64_t lanes = lane_stride(p_.input), classes = p_.input.class_stride;
    for (int64_t l = 0; l < n_; l++) {
      const int64_t target = target_class_[l];
      target_logit_[l] =
          target < 0 ? A(0) : load_value<A>(p_.input, input_ + l * lanes + target * classes);
    }
  }

  void read_statistics(const Tile& tile) {
    load_span(p_.row_max, tile.run(p_.row_max).first, tile.run(p_.row_max).stride, n_, max_);
    const Run rows = tile.run(p_.row_sum);
    for (int64_t l = 0; l < n_; l++) sum_[l] = load_row_sum<A>(p_, rows.at(l));
  }

  IndexRow<double> index_row(int64_t l) const {
    const A lead = target_logit_[l] - max_[l];
    const double gap = static_cast<double>(max_[l]) - target_logit_[l];
    return {sum_[l], gap, math::exp_nonpositive(lead), target_weight_[l]};
  }

  // The gradient in lane l is scale (factor e - a_c), with the scale already in the factor where
  // there are no a_c, and target_grad at the target class.
  void describe() {
    if (p_.probabilities) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        const ProbabilityRow<double> row{sum_[l], mass_[l]};
        factor_[l] = static_cast<A>(row.exp_factor());
        difference_scale_[l] = static_cast<A>(scale_[l]);
      }
    } else {
      const bool folds = !has_coefficients();
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        const IndexRow<double> row = index_row(l);
        const double factor = row.exp_factor(p_.weight_sum, row_smoothing_);
        factor_[l] = static_cast<A>(folds ? scale_[l] * factor : factor);
        difference_scale_[l] = static_cast<A>(scale_[l]);
        target_grad_[l] =
            static_cast<A>(scale_[l] * row.target_grad(p_.weight_sum, row_smoothing_));
      }
    }
  }

  double write_losses(const Tile& tile) {
    if (p_.probabilities) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        const ProbabilityRow<double> row{sum_[l], mass_[l]};
        loss_[l] = row.loss(math::log1p_nonnegative(row.total_less_one()), gaps_[l]);
      }
    } else {
      const bool ignores = ignores_;
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        const IndexRow<double> row = index_row(l);
        const double log_total = math::log1p_nonnegative(row.total_less_one());
        const double loss = row.loss(log_total, gaps_[l], p_.weight_sum, row_smoothing_);
        loss_[l] = ignores && target_class_[l] < 0 ? 0.0 : loss;
      }
    }
    if (p_.reduction == Reduction::kNone)
      store_span(loss_, n_, p_.loss, tile.run(p_.loss).first, tile.run(p_.loss).stride);
    if (p_.row_max.data) {
      store_span(max_, n_, p_.row_max, tile.run(p_.row_max).first, tile.run(p_.row_max).stride);
      const Run rows = tile.run(p_.row_sum);
      for (int64_t l = 0; l < n_; l++) store_row_sum<A>(sum_[l], p_, rows.at(l));
    }
    if (p_.grad.data) describe();
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t l = 0; l < n_; l++) total += loss_[l];
    return total;
  }

  void write_gradient(bool has_terms) {
    for (int64_t c = 0; c < p_.classes; c++) {
      const A* from = has_terms ? kept_lanes(c) : logits(c, 0, n_);
      A* out = grad_direct_ ? grad_lanes(c) : buffer_;
      if (has_terms)
        write_class(c, out, [=](int64_t l) { return from[l]; });
      else
        write_class(c, out,
                    [=, this](int64_t l) { return math::exp_nonpositive(from[l] - max_[l]); });
      if (ignores_) {
#pragma omp simd
        for (int64_t l = 0; l < n_; l++) out[l] = target_class_[l] < 0 ? A(0) : out[l];
      }
      if (!grad_direct_)
        store_span(out, n_, p_.grad, grad_ + c * p_.grad.class_stride, lane_stride(p_.grad));
    }
    if (p_.probabilities) return;
    const int64_t lanes = lane_stride(p_.grad), classes = p_.grad.class_stride;
    for (int64_t l = 0; l < n_; l++) {
      const int64_t target = target_class_[l];
      if (target >= 0) store_value(target_grad_[l], p_.grad, grad_ + l * lanes + target * classes);
    }
  }

  template <class Term>
  void write_class(int64_t c, A* out, const Term& term) {
    if (!has_coefficients()) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) out[l] = factor_[l] * term(l);
      return;
    }
    const A part = p_.probabilities ? A(1) : smoothing_.smooth;
    with_lane_coefficients(c, [&](auto coefficient) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++)
        out[l] = difference_scale_[l] * (factor_[l] * term(l) - part * coefficient(l));
    });
  }

  void clear(double* lanes) const { std::fill(lanes, lanes + n_, 0.0); }

  const Problem& p_;
  const Smoothing<A> smoothing_;
  const Smoothing<double> row_smoothing_;
  const A* const weight_;
  const bool input_direct_, grad_direct_, needs_tile_;
  std::vector<A> tile_;

  int64_t n_ = 0, input_ = 0, target_ = 0, grad_ = 0;
  bool loaded_ = false, ignores_ = false;

  int32_t target_class_[kMaxLanes];
  // What belongs to a row as a whole is in double, for the reasons that RowKernel gives.
  double scale_[kMaxLanes], sum_[kMaxLanes], gaps_[kMaxLanes], mass_[kMaxLanes], loss_[kMaxLanes],
      target_weight_[kMaxLanes];
  Lanes max_;
  Lanes target_logit_, target_grad_, factor_, difference_scale_;
  Lanes buffer_, probability_buffer_;
};

}  // namespace fused_ce::cpu
