// The divergence of rows that lie side by side, one row to a vector lane, and of rows of few
// classes, which alone would waste the lanes.
//
// A first walk over a tile finds the lanes' maxima, a second the sums relative to them; it finds
// the logits in the cache. What the gradient is made of, two numbers a class and lane, is kept
// where a tile of it stays there, and else computed once more. A lane's sums depend on its own row
// alone, and so do the bits of its results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "batch.h"
#include "kernels.h"
#include "lanes.h"
#include "terms.h"

namespace fused_ce::cpu {

// Compiled for one of the levels of simd.h.
template <class A, simd::Level kLevel, bool kReverse>
class DivergenceLaneKernel {
 public:
  DivergenceLaneKernel(const Problem& p, const Tiling& tiling, const Divergence& d)
      : p_(p),
        first_(p, tiling, kReverse ? p.input : p.target, kBlock),
        second_(p, tiling, kReverse ? p.target : p.input, kBlock),
        grad_(p, tiling, p.grad, kBlock),
        batch_(p, d),
        stride_(tiling.tile_rows + kPad),
        keeps_(p.grad.data && p.classes * stride_ <= kMaxKept),
        students_(keeps_ ? p.classes * stride_ : 0),
        others_(keeps_ ? p.classes * stride_ : 0) {}

  // As DivergenceRowKernel::forward.
  double forward(const Tile& tile) {
    begin(tile);
    for (auto* sums : {batch_.first_rest, batch_.second_rest, batch_.gaps, batch_.excess,
                       total_first_ones_, total_second_ones_})
      std::fill_n(sums, n_, 0.0);
    find_bases();
    for_blocks([&](int64_t c, int64_t count) { add_block(c, count); });
    close();
    const double loss = batch_.finish(tile);
    if (p_.grad.data) write_gradients(keeps_);
    return loss;
  }

  void backward(const Tile& tile) {
    begin(tile);
    batch_.read_statistics(tile);
    write_gradients(false);
  }

 private:
  // Classes that are summed in the accumulation type.
  static constexpr int64_t kBlock = kDivergenceLaneClasses;
  // Classes that a loop over the lanes takes at a time.
  static constexpr int kGroup = 2;
  static constexpr int64_t kPad = 16;
  static constexpr int64_t kPadded = kMaxDivergenceLanes + kPad;
  // Small enough that what is kept stays in the second-level cache, and its classes are read once.
  static constexpr int64_t kMaxKept = 65536;

  using Classes = LaneClasses<const A>;

  void begin(const Tile& tile) {
    n_ = whole_vectors(tile.rows);
    first_.begin(tile);
    second_.begin(tile);
    grad_.begin(tile);
    batch_.begin(tile);
  }

  template <class Use>
  void for_blocks(const Use& use) const {
    for (int64_t c = 0; c < p_.classes; c += kBlock) use(c, std::min(kBlock, p_.classes - c));
  }

  // Calls use(c, count) with count an integral_constant: a few classes at a time spare most of the
  // traffic with what is kept for every lane.
  template <class Use>
  static void for_groups(int64_t count, const Use& use) {
    int64_t c = 0;
    for (; c + kGroup <= count; c += kGroup) use(c, std::integral_constant<int, kGroup>{});
    for (; c < count; c++) use(c, std::integral_constant<int, 1>{});
  }

  void find_bases() {
    for (A* max : {batch_.first_max, batch_.second_max}) std::fill_n(max, n_, -kInfinity<A>);
    for (A* min : {first_min_, second_min_}) std::fill_n(min, n_, kInfinity<A>);
    for_blocks([&](int64_t c, int64_t count) {
      const Classes first = first_.read(c, count), second = second_.read(c, count);
      simd::run_as<kLevel>([&] {
        widen(first, count, first_min_, batch_.first_max);
        widen(second, count, second_min_, batch_.second_max);
      });
    });
    simd::run_as<kLevel>([&] {
      gap_ = std::max(find_base(first_min_, batch_.first_max, first_base_),
                      find_base(second_min_, batch_.second_max, second_base_));
    });
  }

  // Takes some classes into the lanes' minima and maxima.
  void widen(Classes x, int64_t count, A* min, A* max) const {
    for (int64_t j = 0; j < count; j++) {
      const A* lanes = x.data + j * x.stride;
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        max[l] = lanes[l] > max[l] ? lanes[l] : max[l];
        min[l] = lanes[l] < min[l] ? lanes[l] : min[l];
      }
    }
  }

  // Returns how far the smallest logit of a lane lies below its base, at most.
  A find_base(const A* min, const A* max, A* base) const {
    A largest = A(0);
#pragma omp simd reduction(max : largest)
    for (int64_t l = 0; l < n_; l++) {
      base[l] = base_of(max[l]);
      largest = base[l] - min[l] > largest ? base[l] - min[l] : largest;
    }
    return largest;
  }

  void add_block(int64_t c, int64_t count) {
    const Classes first = first_.read(c, count), second = second_.read(c, count);
    first_.prefetch_next(c, count), second_.prefetch_next(c, count);
    simd::run_as<kLevel>([&] {
      for (A* sums : {first_rest_, first_ones_, second_rest_, second_ones_, gaps_, excess_})
        std::fill_n(sums, n_, A(0));
      with_normal_exps(gap_, batch_.factor, [&](auto is_normal) {
        if (keeps_)
          sum_block<is_normal, true>(c, first, second, count);
        else
          sum_block<is_normal, false>(c, first, second, count);
      });
      add_sums();
    });
  }

  template <bool kIsNormal, bool kKeeps>
  void sum_block(int64_t c, Classes first, Classes second, int64_t count) {
    for_groups(count, [&](int64_t j, auto classes) {
      sum_classes<kIsNormal, kKeeps>(c + j, first.data + j * first.stride, first.stride,
                                     second.data + j * second.stride, second.stride, classes);
    });
  }

  template <bool kIsNormal, bool kKeeps, class Count>
  void sum_classes(int64_t c, const A* first_logits, int64_t first_stride, const A* second_logits,
                   int64_t second_stride, Count) {
    const A factor = batch_.factor;
    A* students = kKeeps ? students_.data() + c * stride_ : nullptr;
    A* others = kKeeps ? others_.data() + c * stride_ : nullptr;
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      A first_rest = first_rest_[l], first_ones = first_ones_[l];
      A second_rest = second_rest_[l], second_ones = second_ones_[l];
      A gaps = gaps_[l], excess = excess_[l];
      for (int j = 0; j < Count::value; j++) {
        const A first = factor * (first_logits[j * first_stride + l] - first_base_[l]);
        const A second = factor * (second_logits[j * second_stride + l] - second_base_[l]);
        const DivergenceTerm<A> term = divergence_term<kIsNormal>(first, second);
        first_rest += first == A(0) ? A(0) : term.first;
        first_ones += first == A(0) ? A(1) : A(0);
        second_rest += second == A(0) ? A(0) : term.second;
        second_ones += second == A(0) ? A(1) : A(0);
        gaps += term.first * term.gap;
        excess += term.excess;
        if (kKeeps) {
          students[j * stride_ + l] = kReverse ? term.first : term.second;
          others[j * stride_ + l] = kReverse ? term.gap : term.first;
        }
      }
      first_rest_[l] = first_rest, first_ones_[l] = first_ones;
      second_rest_[l] = second_rest, second_ones_[l] = second_ones;
      gaps_[l] = gaps, excess_[l] = excess;
    }
  }

  void add_sums() {
    double *first_rest = batch_.first_rest, *second_rest = batch_.second_rest;
    double *gaps = batch_.gaps, *excess = batch_.excess;
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      first_rest[l] += first_rest_[l], total_first_ones_[l] += first_ones_[l];
      second_rest[l] += second_rest_[l], total_second_ones_[l] += second_ones_[l];
      gaps[l] += gaps_[l], excess[l] += excess_[l];
    }
  }

  void close() {
    for (int64_t l = 0; l < n_; l++) {
      DivergencePart<A, double> part;
      if (batch_.is_counted(l)) {
        part.first_max = batch_.first_max[l], part.second_max = batch_.second_max[l];
        part.first_rest = batch_.first_rest[l], part.first_ones = total_first_ones_[l];
        part.second_rest = batch_.second_rest[l], part.second_ones = total_second_ones_[l];
        part.gaps = batch_.gaps[l], part.excess = batch_.excess[l];
      } else {
        part.first_max = part.second_max = A(0);
        part.first_ones = part.second_ones = 1.0;
      }
      batch_.set(l, part);
    }
  }

  // A gradient for each lane: the members of DivergenceGradient, or of the reverse one.
  void find_gradients() {
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      if constexpr (kReverse) {
        const ReverseDivergenceGradient<double> gradient = batch_.reverse_gradient(l);
        coefficients_[0][l] = static_cast<A>(gradient.mean_gap);
        coefficients_[1][l] = static_cast<A>(gradient.by_exp);
      } else {
        const DivergenceGradient<double> gradient = batch_.gradient(l);
        coefficients_[0][l] = static_cast<A>(gradient.by_student);
        coefficients_[1][l] = static_cast<A>(gradient.by_teacher);
        coefficients_[2][l] = static_cast<A>(gradient.of_largest);
      }
    }
  }

  // Of one class in a lane, from what is kept of it.
  A gradient_at(int64_t l, A student, A other) const {
    if constexpr (kReverse)
      return ReverseDivergenceGradient<A>::at(student, other, coefficients_[0][l],
                                              coefficients_[1][l]);
    else
      return DivergenceGradient<A>::at(student, other, coefficients_[0][l], coefficients_[1][l],
                                       coefficients_[2][l]);
  }

  void write_gradients(bool from_kept) {
    simd::run_as<kLevel>([&] { find_gradients(); });
    for_blocks([&](int64_t c, int64_t count) {
      const LaneClasses<A> out = grad_.place(c);
      if (from_kept) {
        simd::run_as<kLevel>([&] {
          for (int64_t j = 0; j < count; j++) scale_kept(c + j, out.data + j * out.stride);
        });
      } else {
        const Classes first = first_.read(c, count), second = second_.read(c, count);
        first_.prefetch_next(c, count), second_.prefetch_next(c, count);
        simd::run_as<kLevel>([&] { write_block(first, second, out, count); });
      }
      if (batch_.has_uncounted) clear_uncounted(out, count);
      grad_.store(c, count);
    });
  }

  void scale_kept(int64_t c, A* out) const {
    const A *students = students_.data() + c * stride_, *others = others_.data() + c * stride_;
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) out[l] = gradient_at(l, students[l], others[l]);
  }

  void write_block(Classes first, Classes second, LaneClasses<A> out, int64_t count) {
    const A gap = std::max(largest_gap(first, count, batch_.first_max),
                           largest_gap(second, count, batch_.second_max));
    with_normal_exps(gap, batch_.factor, [&](auto is_normal) {
      for (int64_t j = 0; j < count; j++)
        write_class<is_normal>(first.data + j * first.stride, second.data + j * second.stride,
                               out.data + j * out.stride);
    });
  }

  A largest_gap(Classes x, int64_t count, const A* max) const {
    A largest = A(0);
    for (int64_t j = 0; j < count; j++) {
      const A* lanes = x.data + j * x.stride;
#pragma omp simd reduction(max : largest)
      for (int64_t l = 0; l < n_; l++)
        largest = max[l] - lanes[l] > largest ? max[l] - lanes[l] : largest;
    }
    return largest;
  }

  template <bool kIsNormal>
  void write_class(const A* first_logits, const A* second_logits, A* out) const {
    const A factor = batch_.factor;
    const A *first_max = batch_.first_max, *second_max = batch_.second_max;
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      const A first = factor * (first_logits[l] - first_max[l]);
      const A second = factor * (second_logits[l] - second_max[l]);
      const A e = exp_of<kIsNormal>(first);
      if constexpr (kReverse)
        out[l] = gradient_at(l, e, gap_of(e, first, second));
      else
        out[l] = gradient_at(l, exp_of<kIsNormal>(second), e);
    }
  }

  void clear_uncounted(LaneClasses<A> out, int64_t count) const {
    for (int64_t l = 0; l < batch_.size; l++)
      if (!batch_.is_counted(l))
        for (int64_t j = 0; j < count; j++) out.data[j * out.stride + l] = A(0);
  }

  const Problem& p_;
  Lanes<A> first_, second_, grad_;
  DivergenceBatch<A> batch_;
  const int64_t stride_;
  const bool keeps_;
  const Scratch<A> students_, others_;
  int64_t n_ = 0;  // lanes
  A gap_ = 0;      // that no difference of the tile exceeds
  alignas(kLine) double total_first_ones_[kPadded], total_second_ones_[kPadded];
  alignas(kLine) A first_min_[kPadded], second_min_[kPadded], first_base_[kPadded],
      second_base_[kPadded];
  alignas(kLine) A first_rest_[kPadded], first_ones_[kPadded], second_rest_[kPadded],
      second_ones_[kPadded], gaps_[kPadded], excess_[kPadded];
  alignas(kLine) A coefficients_[3][kPadded];
};

}  // namespace fused_ce::cpu
