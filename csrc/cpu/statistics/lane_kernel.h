// The statistics of rows that lie side by side, one row to a vector lane, and of rows of few
// classes, which alone would waste the lanes.
//
// The classes come in blocks: the lanes' maxima are raised by a block's, what was summed before is
// made relative to them, and then the block's classes are summed. So the logits are read once
// however many classes there are. A lane's sums depend on its own row alone, and so do the bits of
// its results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../statistics.h"
#include "batch.h"
#include "kernels.h"
#include "terms.h"
#include "vectors_avx512.h"

namespace fused_ce::cpu {

// Compiled for one of the levels of simd.h.
template <class A, simd::Level kLevel>
class StatisticsLaneKernel {
 public:
  StatisticsLaneKernel(const Problem& p, const Statistics& s)
      : p_(p),
        batch_(p, s),
        wants_entropy_(s.entropy.data),
        wants_argmax_(s.argmax.data),
        input_direct_(is_direct<A>(p.input, lane_stride(p.input)) && !batch_.map.bends()),
        grad_direct_(is_direct<A>(p.grad, lane_stride(p.grad))) {}

  void forward(const Tile& tile) {
    begin(tile);
    batch_.read_target_logits(tile);
    std::fill_n(batch_.max, n_, -kInfinity<A>);
    std::fill_n(batch_.rest, n_, 0.0), std::fill_n(batch_.gaps, n_, 0.0);
    std::fill_n(total_ones_, n_, 0.0);
    std::fill_n(batch_.argmax, n_, 0);
    for (int64_t c = 0; c < p_.classes; c += kBlock) {
      const int64_t count = std::min(kBlock, p_.classes - c);
      simd::run_as<kLevel>([&] { take_block(c, count); });
    }
    simd::run_as<kLevel>([&] { close(); });
    batch_.write_results(tile);
  }

  void backward(const Tile& tile) {
    begin(tile);
    batch_.read_target_logits(tile);
    batch_.find_gradients(tile);
    simd::run_as<kLevel>([&] {
      for (int64_t c = 0; c < p_.classes; c++) write_class(c);
    });
    if (!batch_.has_targets()) return;
    for (int64_t l = 0; l < n_; l++)
      if (batch_.target_class[l] >= 0)
        store_value(batch_.target_grad[l], p_.grad,
                    grad_.at(l) + batch_.target_class[l] * p_.grad.class_stride);
  }

 private:
  static constexpr bool kAvx512 = kLevel == simd::Level::kAvx512 && std::is_same_v<A, float>;
  static constexpr bool kTells = kTellsNormal<A, kLevel>;
  // Classes whose logits stay in the first-level cache, and that are summed in the accumulation
  // type.
  static constexpr int64_t kBlock = 16;
  // Classes that a loop over the lanes takes at a time.
  static constexpr int kGroup = 4;
  // No power of two apart, where buffers compete for the same lines of the cache.
  static constexpr int64_t kPadded = kMaxStatisticsRows + 16;

  int64_t lane_stride(const Operand& operand) const { return operand.row_strides[p_.row_dims - 1]; }

  void begin(const Tile& tile) {
    n_ = tile.rows;
    input_ = tile.runs(p_.input);
    grad_ = tile.runs(p_.grad);
    batch_.begin(tile);
  }

  // The logits of some classes: those of class c + j begin at data + j * stride.
  struct Classes {
    const A* data;
    int64_t stride;
  };

  Classes read_classes(int64_t c, int64_t count) {
    const int64_t offset = input_.first + c * p_.input.class_stride;
    if (input_direct_)
      return {static_cast<const A*>(p_.input.data) + offset, p_.input.class_stride};
    for (int64_t j = 0; j < count; j++) {
      A* lanes = buffer_ + j * kPadded;
      load_span(p_.input, offset + j * p_.input.class_stride, input_.stride, n_, lanes);
      if (batch_.map.bends()) map_logits(batch_.map, lanes, n_, lanes);
    }
    return {buffer_, kPadded};
  }

  void take_block(int64_t c, int64_t count) {
    const Classes x = read_classes(c, count);
    if (find_max(x, count)) raise(x, c, count);
    const A gap = kTells ? largest_gap(x, count) : A(0);
    with_normality<A, kLevel>(gap, batch_.factor, [&](auto is_normal) {
      if (wants_entropy_)
        sum_block<is_normal, true>(x, count);
      else
        sum_block<is_normal, false>(x, count);
    });
  }

  // How far the smallest logit of a lane lies below its maximum, at most.
  A largest_gap(Classes x, int64_t count) const {
    A largest = A(0);
    for (int64_t j = 0; j < count; j++) {
      const A *lanes = x.data + j * x.stride, *max = batch_.max;
#pragma omp simd reduction(max : largest)
      for (int64_t l = 0; l < n_; l++)
        largest = max[l] - lanes[l] > largest ? max[l] - lanes[l] : largest;
    }
    return largest;
  }

  // Returns whether the block has raised the maximum of some lane.
  bool find_max(Classes x, int64_t count) {
    const A* max = batch_.max;
    std::copy_n(max, n_, new_max_);
    for (int64_t j = 0; j < count; j++) {
      const A* lanes = x.data + j * x.stride;
#pragma omp simd
      for (int64_t l = 0; l < n_; l++)
        new_max_[l] = lanes[l] > new_max_[l] ? lanes[l] : new_max_[l];
    }
    int raised = 0;
#pragma omp simd reduction(| : raised)
    for (int64_t l = 0; l < n_; l++) raised |= new_max_[l] > max[l] ? 1 : 0;
    return raised != 0;
  }

  void raise(Classes x, int64_t c, int64_t count) {
    if (wants_argmax_) {
      for (int64_t j = count; j-- > 0;)
        for (int64_t l = 0; l < n_; l++) {
          const bool is_max =
              new_max_[l] > batch_.max[l] && x.data[j * x.stride + l] == new_max_[l];
          batch_.argmax[l] = is_max ? c + j : batch_.argmax[l];
        }
    }
    const double factor = batch_.factor;
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      const double distance = lane_distance(l, factor);
      EntropySums<double> sums{batch_.rest[l], total_ones_[l], batch_.gaps[l]};
      sums.lower(distance, math::exp_nonpositive(distance));
      const bool is_raised = new_max_[l] > batch_.max[l];
      batch_.rest[l] = is_raised ? sums.rest : batch_.rest[l];
      total_ones_[l] = is_raised ? sums.ones : total_ones_[l];
      batch_.gaps[l] = is_raised ? sums.gaps : batch_.gaps[l];
    }
    std::copy_n(new_max_, n_, batch_.max);
  }

  double lane_distance(int64_t l, double factor) const {
    return difference_of(static_cast<double>(batch_.max[l]), static_cast<double>(new_max_[l]),
                         factor);
  }

  template <bool kIsNormal, bool kGaps>
  void sum_block(Classes x, int64_t count) {
    for (A* sums : {rest_, ones_, gaps_}) std::fill_n(sums, n_, A(0));
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) base_[l] = base_of(batch_.max[l]);
    int64_t j = 0;
    for (; j + kGroup <= count; j += kGroup)
      sum_classes<kIsNormal, kGroup, kGaps>(x.data + j * x.stride, x.stride);
    for (; j < count; j++) sum_classes<kIsNormal, 1, kGaps>(x.data + j * x.stride, x.stride);
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      batch_.rest[l] += rest_[l];
      total_ones_[l] += ones_[l];
      batch_.gaps[l] += gaps_[l];
    }
  }

  template <bool kIsNormal, int kClasses, bool kGaps>
  void sum_classes(const A* x, int64_t stride) {
    const A factor = batch_.factor;
    if constexpr (kAvx512) {
      avx512::sum_lanes<kClasses, kGaps>(x, stride, n_, base_, factor, rest_, ones_, gaps_);
    } else {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        A rest = rest_[l], ones = ones_[l], gaps = gaps_[l];
        for (int j = 0; j < kClasses; j++) {
          const Term<A> term = term_of<kIsNormal>(x[j * stride + l], base_[l], factor);
          rest += term.difference == A(0) ? A(0) : term.e;
          ones += term.difference == A(0) ? A(1) : A(0);
          if (kGaps) gaps -= term.e * term.difference;
        }
        rest_[l] = rest, ones_[l] = ones, gaps_[l] = gaps;
      }
    }
  }

  void close() {
#pragma omp simd
    for (int64_t l = 0; l < n_; l++)
      batch_.rest[l] =
          closed_rest(static_cast<double>(batch_.max[l]), batch_.rest[l], total_ones_[l]);
    if (!batch_.has_ignored) return;
    for (int64_t l = 0; l < n_; l++) {
      if (batch_.target_class[l] >= 0) continue;
      batch_.max[l] = A(0);
      batch_.rest[l] = batch_.gaps[l] = 0.0;
    }
  }

  void write_class(int64_t c) {
    const int64_t offset = grad_.first + c * p_.grad.class_stride;
    const A* x = read_class_and_slopes(c);
    A* out = grad_direct_ ? static_cast<A*>(p_.grad.data) + offset : out_;
    write_gradients(x, out);
    if (batch_.map.bends()) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) out[l] *= slopes_[l];
    }
    if (batch_.has_ignored) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) out[l] = batch_.target_class[l] < 0 ? A(0) : out[l];
    }
    if (!grad_direct_) store_span(out, n_, p_.grad, offset, grad_.stride);
  }

  const A* read_class_and_slopes(int64_t c) {
    if (!batch_.map.bends()) return read_classes(c, 1).data;
    load_span(p_.input, input_.first + c * p_.input.class_stride, input_.stride, n_, buffer_);
    map_logits(batch_.map, buffer_, n_, buffer_, slopes_);
    return buffer_;
  }

  void write_gradients(const A* x, A* out) const {
    const A *max = batch_.max, *constant = batch_.constant, *by_difference = batch_.by_difference;
    const A factor = batch_.factor;
    if constexpr (kAvx512) {
      avx512::write_gradients(x, max, factor, constant, by_difference, n_, out);
    } else {
      const A gap = kTells ? largest_gap({x, 0}, 1) : A(0);
      with_normality<A, kLevel>(gap, factor, [&](auto is_normal) {
#pragma omp simd
        for (int64_t l = 0; l < n_; l++) {
          const Term<A> term = term_of<is_normal>(x[l], max[l], factor);
          out[l] = StatisticsGradient<A>(constant[l], by_difference[l]).at(term.difference, term.e);
        }
      });
    }
  }

  const Problem& p_;
  StatisticsBatch<A> batch_;
  const bool wants_entropy_, wants_argmax_, input_direct_, grad_direct_;
  int64_t n_ = 0;
  Runs input_{}, grad_{};
  alignas(kLine) PerRow<double> total_ones_;
  alignas(kLine) A new_max_[kPadded], base_[kPadded], rest_[kPadded], ones_[kPadded],
      gaps_[kPadded];
  alignas(kLine) A out_[kPadded], slopes_[kPadded], buffer_[kBlock * kPadded];
};

}  // namespace fused_ce::cpu
