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
        needs_tile_(!input_direct_ || (p.grad.data && !grad_direct_)),
        tile_(needs_tile_ && p.classes * tiling.tile_rows <= kMaxTile ? p.classes * tiling.tile_rows
                                                                      : 0) {}

  // Returns the sum of the tile's losses; the rest as RowKernel::forward.
  double forward(const Tile& tile) {
    begin(tile);
    read_tasks(tile);
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
    const TaskReader<A> reader(p_, tile);
    for (int64_t l = 0; l < n_; l++) {
      const RowTask task = reader.read(l);
      target_class_[l] = task.counted ? static_cast<int32_t>(task.index) : -1;
      counted_[l] = task.counted ? A(1) : A(0);
      target_weight_[l] = task.weight;
      scale_[l] = task.scale;
    }
  }

  A* grad_lanes(int64_t c) const {
    return static_cast<A*>(p_.grad.data) + grad_ + c * p_.grad.class_stride;
  }

  // Where the terms of class c are kept.
  A* kept_lanes(int64_t c) {
    if (grad_direct_) return grad_lanes(c);
    return tile_.empty() ? nullptr : tile_.data() + c * n_;
  }

  // The logits of class c. Once the tile holds them they are not loaded again.
  const A* logits(int64_t c) {
    const int64_t offset = input_ + c * p_.input.class_stride;
    if (input_direct_) return static_cast<const A*>(p_.input.data) + offset;
    if (tile_.empty()) {
      load_span(p_.input, offset, lane_stride(p_.input), n_, buffer_);
      return buffer_;
    }
    A* lanes = tile_.data() + c * n_;
    if (!loaded_) load_span(p_.input, offset, lane_stride(p_.input), n_, lanes);
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
      const A* x = logits(c);
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) max_[l] = x[l] > max_[l] ? x[l] : max_[l];
    }
    loaded_ = true;
  }

  void sum_terms() {
    const bool has_gaps = has_coefficients();
    clear(sum_), clear(gaps_), clear(mass_);
    for (int64_t l = 0; l < n_; l++) target_logit_[l] = A(0);
    for (int64_t c = 0; c < p_.classes; c++) {
      const A* x = logits(c);
      if (has_gaps) add_gaps(c, x);
      if (keeps_terms())
        add_terms<true>(c, x, kept_lanes(c));
      else
        add_terms<false>(c, x, nullptr);
    }
    // A row of -inf alone has no softmax.
    for (int64_t l = 0; l < n_; l++)
      if (max_[l] == -math::kInf<A>) sum_[l] = std::numeric_limits<double>::quiet_NaN();
  }

  template <bool kKeep>
  void add_terms(int64_t c, const A* x, A* kept) {
    const int32_t cls = static_cast<int32_t>(c);
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      const A base = max_[l] == -math::kInf<A> ? A(0) : max_[l];
      const bool is_target = target_class_[l] == cls;
      const A e = math::exp_nonpositive(x[l] - base);
      target_logit_[l] = is_target ? x[l] : target_logit_[l];
      sum_[l] += is_target ? A(0) : e;
      if (kKeep) kept[l] = e;
    }
  }

  void add_gaps(int64_t c, const A* x) {
    with_lane_coefficients(c, [&](auto coefficient) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        const A a = coefficient(l);
        gaps_[l] += a * (max_[l] - x[l]);
        mass_[l] += a;
      }
    });
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
    const double gap = static_cast<double>(max_[l]) - target_logit_[l];
    return {sum_[l], gap, math::exp_nonpositive(-gap), target_weight_[l]};
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
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        const IndexRow<double> row = index_row(l);
        const double log_total = math::log1p_nonnegative(row.total_less_one());
        const double loss = row.loss(log_total, gaps_[l], p_.weight_sum, row_smoothing_);
        loss_[l] = counted_[l] != A(0) ? loss : 0.0;
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
    for (int64_t l = 0; l < n_; l++) total += loss_[l];
    return total;
  }

  void write_gradient(bool has_terms) {
    for (int64_t c = 0; c < p_.classes; c++) {
      const A* from = has_terms ? kept_lanes(c) : logits(c);
      A* out = grad_direct_ ? grad_lanes(c) : buffer_;
      with_lane_coefficients(c, [&](auto coefficient) {
        if (has_terms)
          write_class(c, out, coefficient, [=](int64_t l) { return from[l]; });
        else
          write_class(c, out, coefficient,
                      [=, this](int64_t l) { return math::exp_nonpositive(from[l] - max_[l]); });
      });
      if (!grad_direct_)
        store_span(out, n_, p_.grad, grad_ + c * p_.grad.class_stride, lane_stride(p_.grad));
    }
  }

  template <class Coefficient, class Term>
  void write_class(int64_t c, A* out, const Coefficient& coefficient, const Term& term) {
    const int32_t cls = static_cast<int32_t>(c);
    const bool subtracts = has_coefficients();
    const A part = p_.probabilities ? A(1) : smoothing_.smooth;
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      A value = factor_[l] * term(l);
      if (subtracts) value = difference_scale_[l] * (value - part * coefficient(l));
      value = target_class_[l] == cls ? target_grad_[l] : value;
      out[l] = counted_[l] != A(0) ? value : A(0);
    }
  }

  void clear(double* lanes) const { std::fill(lanes, lanes + n_, 0.0); }

  const Problem& p_;
  const Smoothing<A> smoothing_;
  const Smoothing<double> row_smoothing_;
  const A* const weight_;
  const bool input_direct_, grad_direct_, needs_tile_;
  std::vector<A> tile_;

  int64_t n_ = 0, input_ = 0, target_ = 0, grad_ = 0;
  bool loaded_ = false;

  int32_t target_class_[kMaxLanes];
  // What belongs to a row as a whole is in double, for the reasons that RowKernel gives.
  double scale_[kMaxLanes], sum_[kMaxLanes], gaps_[kMaxLanes], mass_[kMaxLanes], loss_[kMaxLanes],
      target_weight_[kMaxLanes];
  Lanes counted_;
  Lanes max_;
  Lanes target_logit_, target_grad_, factor_, difference_scale_;
  Lanes buffer_, probability_buffer_;
};

}  // namespace fused_ce::cpu
