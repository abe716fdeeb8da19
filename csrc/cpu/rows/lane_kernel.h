// Many rows side by side, one row to a vector lane, the classes one after another.
//
// Serves logits whose rows lie next to each other in memory, as (N, C, H, W) does, without copying
// them, and rows of few classes, which alone would waste the lanes: those are turned into a
// class-major tile in the cache and turned back. The terms exp(x - M) are kept in the gradient's
// own memory or in the tile; where neither can hold them they are computed a second time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../formula.h"
#include "../vector/exp_avx2.h"
#include "../vector/exp_avx512.h"
#include "../vector/math.h"
#include "../vector/scratch.h"
#include "../vector/span.h"
#include "../vector/transpose.h"
#include "coefficients.h"
#include "row_batch.h"

namespace fused_ce::cpu {

// Compiled for one of the levels of simd.h.
template <class A, simd::Level kLevel>
class LaneKernel {
 public:
  LaneKernel(const Problem& p, const Tiling& tiling)
      : p_(p),
        out_(p.target_grad.data ? p.target_grad : p.grad),
        batch_(p, tiling.tile_rows),
        smoothing_(p.options.label_smoothing, p.all_classes()),
        weight_(static_cast<const A*>(p.options.weight.data)),
        digits_(digits_of_terms(p)),
        digits_of_grad_(digits_of(out_)),
        input_direct_(is_direct(tiling, p.input) && !p.maps_logits()),
        grad_direct_(is_direct(tiling, out_)),
        target_direct_(is_direct(tiling, p.target)),
        needs_tile_(!input_direct_ || (out_.data && !(grad_direct_ && in_place()))),
        stride_(tiling.tile_rows + kPad),
        tile_(needs_tile_ && p.classes * stride_ <= kMaxTile ? p.classes * stride_ : 0),
        keeps_terms_(out_.data && (grad_direct_ || !tile_.empty()) && !batch_.map.bends()),
        transposes_input_(!input_direct_ && p.input.class_stride == 1 && !tile_.empty()),
        transposes_grad_(!grad_direct_ && out_.class_stride == 1 && !tile_.empty()),
        rows_((transposes_input_ && !cpu::is_direct<A>(p.input, 1)) ||
                      (transposes_grad_ && !cpu::is_direct<A>(out_, 1))
                  ? p.classes * tiling.tile_rows
                  : 0) {}

  // As RowKernel::forward.
  double forward(const Tile& tile) {
    begin(tile);
    find_max();
    batch_.read_target_logits(tile, 0, n_);
    sum_terms();
    const double total = batch_.write_losses(tile);
    if (p_.grad.data) write_gradient(keeps_terms_);
    return total;
  }

  void backward(const Tile& tile) {
    begin(tile);
    batch_.read_statistics(tile);
    batch_.read_target_logits(tile, 0, n_);
    batch_.find_gradients();
    write_gradient(false);
  }

  void backward_target(const Tile& tile) {
    begin(tile);
    batch_.read_statistics(tile);
    simd::run_as<kLevel>([&] { write_probability_gradient(); });
    if (transposes_grad_) store_rows();
  }

 private:
  static constexpr bool kAvx512 = kLevel == simd::Level::kAvx512 && std::is_same_v<A, float>;
  static constexpr bool kAvx2 = kLevel == simd::Level::kAvx2 && std::is_same_v<A, float>;
  static constexpr bool kTellsNormal = !kAvx512 && !kAvx2 && std::is_same_v<A, float>;
  // Small enough that a tile and what it is made from stay in the second-level cache.
  static constexpr int64_t kMaxTile = 65536;
  // Lanes between the classes of a tile: at a distance of a power of two their cache lines would
  // compete for the same few places.
  static constexpr int64_t kPad = 16, kPadded = kMaxBatch + kPad;
  // Classes that a loop over the lanes takes at a time.
  static constexpr int kGroup = 4;
  // Terms of at most this many classes are summed in the accumulation type, then in double.
  static constexpr int64_t kSumClasses = 64;

  int64_t lane_stride(const Operand& operand) const { return operand.row_strides[p_.row_dims - 1]; }

  bool is_direct(const Tiling& tiling, const Operand& operand) const {
    return cpu::is_direct<A>(operand, lane_stride(operand)) && is_one_run(p_, tiling, operand);
  }

  void begin(const Tile& tile) {
    n_ = tile.rows;
    input_ = tile.runs(p_.input);
    target_ = tile.runs(p_.target);
    grad_ = tile.runs(out_);
    loaded_ = false;
    if (transposes_input_) {
      load_rows();
      if (p_.maps_logits())
        for (int64_t c = 0; c < p_.classes; c++) map_lanes(loaded_lanes(c));
      loaded_ = true;
    }
    batch_.begin(tile);
  }

  A* grad_lanes(int64_t c) const {
    return static_cast<A*>(out_.data) + grad_.first + c * out_.class_stride;
  }

  bool in_place() const { return out_.data == p_.input.data; }

  // Where the terms of class c are kept. The gradient's memory serves where it is in the cache
  // anyway; fresh memory is better written once, a long run at a time, than a few classes by a few.
  A* kept_lanes(int64_t c) {
    if (!tile_.empty()) return tile_.data() + c * stride_;
    return grad_direct_ ? grad_lanes(c) : nullptr;
  }

  // Where logits of class c are loaded to.
  A* loaded_lanes(int64_t c) { return tile_.empty() ? buffer_ : tile_.data() + c * stride_; }

  // The logits of some classes: those of class c + j begin at data + j * stride.
  struct Classes {
    const A* data;
    int64_t stride;
  };

  // The logits of `count` classes from c on. Once the tile holds them they are not loaded again.
  Classes logits(int64_t c, int64_t count) {
    const int64_t offset = c * p_.input.class_stride;
    if (input_direct_)
      return {static_cast<const A*>(p_.input.data) + input_.first + offset, p_.input.class_stride};
    A* lanes = loaded_lanes(c);
    for (int64_t j = 0; j < count && !loaded_; j++) {
      load_runs(p_.input, input_.moved(offset + j * p_.input.class_stride), lanes + j * stride_);
      map_lanes(lanes + j * stride_);
    }
    return {lanes, stride_};
  }

  void map_lanes(A* lanes) const {
    if (!batch_.map.is_identity()) map_logits(batch_.map, lanes, n_, lanes);
  }

  // Of one class, with the slopes that a gradient is multiplied by, where the map bends. They are
  // read anew, or where the rows were turned over lie in the tile as they were read.
  const A* logits_and_slopes(int64_t c) {
    A* lanes = loaded_lanes(c);
    if (!transposes_input_) load_runs(p_.input, input_.moved(c * p_.input.class_stride), lanes);
    map_logits(batch_.map, lanes, n_, lanes, slopes_);
    return lanes;
  }

  // Rows of adjacent classes are read and written as they lie, and turned over in the cache.
  void load_rows() {
    const int64_t classes = p_.classes;
    if (cpu::is_direct<A>(p_.input, 1)) {
      input_.for_each([&](int64_t lane, int64_t offset) {
        transpose(static_cast<const A*>(p_.input.data) + offset, input_.stride, input_.length,
                  classes, tile_.data() + lane, stride_);
      });
    } else {
      for_row_runs(input_, [&](int64_t row, int64_t offset, int64_t count) {
        load_span(p_.input, offset, 1, count, rows_.data() + row * classes);
      });
      transpose(rows_.data(), classes, n_, classes, tile_.data(), stride_);
    }
  }

  void store_rows() {
    const int64_t classes = p_.classes;
    if (cpu::is_direct<A>(out_, 1)) {
      grad_.for_each([&](int64_t lane, int64_t offset) {
        transpose(tile_.data() + lane, stride_, classes, grad_.length,
                  static_cast<A*>(out_.data) + offset, grad_.stride);
      });
    } else {
      transpose(tile_.data(), stride_, classes, n_, rows_.data(), classes);
      for_row_runs(grad_, [&](int64_t row, int64_t offset, int64_t count) {
        store_span(rows_.data() + row * classes, count, out_, offset, 1);
      });
    }
  }

  // Calls use(row, offset, count) for `count` adjacent elements: of a whole run of rows from this
  // one on, or row by row.
  template <class Use>
  void for_row_runs(const Runs& rows, const Use& use) const {
    rows.for_each([&](int64_t first, int64_t offset) {
      if (rows.stride == p_.classes) return use(first, offset, rows.length * p_.classes);
      for (int64_t row = 0; row < rows.length; row++)
        use(first + row, offset + row * rows.stride, p_.classes);
    });
  }

  // Calls use(c, count) with count an integral_constant: a few classes at a time spare most of the
  // traffic with what is kept for every lane.
  template <class Use>
  void for_classes(const Use& use) {
    int64_t c = 0;
    for (; c + kGroup <= p_.classes; c += kGroup) use(c, std::integral_constant<int, kGroup>{});
    for (; c < p_.classes; c++) use(c, std::integral_constant<int, 1>{});
  }

  const A* probabilities(int64_t c) {
    if (!p_.probabilities) return nullptr;
    const Runs lanes = target_.moved(c * p_.target.class_stride);
    if (target_direct_) return static_cast<const A*>(p_.target.data) + lanes.first;
    load_runs(p_.target, lanes, probability_buffer_);
    return probability_buffer_;
  }

  // Calls use(a) with a(l), the coefficient of class c in lane l.
  template <class Use>
  void with_lane_coefficients(int64_t c, const Use& use) {
    const A weight = weight_ ? weight_[c] : A(1);
    if (const A* q = probabilities(c)) {
      const Smoothing<A> smoothing = smoothing_;
      use([=](int64_t l) { return probability_coefficient(q[l], weight, smoothing); });
    } else {
      const A coefficient = index_coefficient(weight, smoothing_);
      use([=](int64_t) { return coefficient; });
    }
  }

  void find_max() {
    A* max = batch_.max;
    std::fill(max, max + n_, -kInfinity<A>);
    if constexpr (kTellsNormal) {
      std::fill(min_, min_ + n_, kInfinity<A>);
      for_classes([&](int64_t c, auto count) {
        const Classes x = logits(c, count);
        widen(x.data, x.stride, min_, max, n_, count);
      });
      is_normal_ = largest_gap(min_, max, n_) < math::kNormalExp;
    } else {
      for_classes([&](int64_t c, auto count) {
        const Classes x = logits(c, count);
        raise(x.data, x.stride, max, n_, count);
      });
    }
    loaded_ = !tile_.empty();
  }

  // Takes some classes into the lanes' maxima.
  template <class Count>
  static void raise(const A* x, int64_t stride, A* max, int64_t n, Count count) {
#pragma omp simd
    for (int64_t l = 0; l < n; l++) max[l] = largest(x + l, stride, max[l], count);
  }

  // The minima too: who asks for exp_normal must know that it may.
  template <class Count>
  static void widen(const A* x, int64_t stride, A* min, A* max, int64_t n, Count count) {
#pragma omp simd
    for (int64_t l = 0; l < n; l++) {
      min[l] = smallest(x + l, stride, min[l], count);
      max[l] = largest(x + l, stride, max[l], count);
    }
  }

  template <class Count>
  static A largest(const A* x, int64_t stride, A max, Count) {
    for (int j = 0; j < Count::value; j++) max = larger(x[j * stride], max);
    return max;
  }

  template <class Count>
  static A smallest(const A* x, int64_t stride, A min, Count) {
    for (int j = 0; j < Count::value; j++) min = smaller(x[j * stride], min);
    return min;
  }

  static A larger(A a, A b) { return a > b ? a : b; }
  static A smaller(A a, A b) { return a < b ? a : b; }

  static A largest_gap(const A* min, const A* max, int64_t n) {
    A largest = A(0);
#pragma omp simd reduction(max : largest)
    for (int64_t l = 0; l < n; l++) largest = larger(max[l] - min[l], largest);
    return largest;
  }

  void sum_terms() {
    if (batch_.spreads()) simd::run_as<kLevel>([&] { sum_gaps(); });
    std::fill(batch_.rest, batch_.rest + n_, 0.0);
    std::fill(sums_, sums_ + n_, A(0));
    std::fill(ones_, ones_ + n_, A(-1));
    for_classes([&](int64_t c, auto count) {
      const Classes x = logits(c, count);
      prefetch_next(c, count);
      A* terms = keeps_terms_ ? kept_lanes(c) : terms_;
      if (kTellsNormal && is_normal_)
        keep_terms<kTellsNormal>(x, terms, count);
      else
        keep_terms<false>(x, terms, count);
      if ((c + count) % kSumClasses == 0) add_sums();
    });
    add_sums();
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) batch_.rest[l] += ones_[l];
  }

  void add_sums() {
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      batch_.rest[l] += sums_[l];
      sums_[l] = A(0);
    }
  }

  // Asks for as much of the next tile as is being computed of this one.
  void prefetch_next(int64_t c, int64_t count) const {
    if (input_.count > 1) return;  // for short runs it gains nothing
    if (input_.stride == 1)
      for (int64_t j = c; j < c + count; j++)
        prefetch(p_.input, input_.first + n_ + j * p_.input.class_stride, n_);
    else if (input_.stride == p_.classes)
      prefetch(p_.input, input_.first + n_ * p_.classes + c * n_, count * n_);
  }

  // exp(x - max) of some classes, kept and summed. The largest ones are counted apart, for the
  // reason that formula.h gives.
  template <bool kIsNormal, class Count>
  void keep_terms(Classes x, A* terms, Count) {
    const int64_t n = n_;
    const int64_t stride = !keeps_terms_ ? kPadded : tile_.empty() ? out_.class_stride : stride_;
    const A* max = batch_.max;
    A* ones = ones_;
    A* sums = sums_;
    if constexpr (kAvx512) {
      avx512::keep_lane_terms<Count::value>(x.data, x.stride, n, max, terms, stride, sums, ones);
    } else if constexpr (kAvx2) {
      with_digits(digits_, [&](auto digits) {
        avx2::keep_lane_terms<digits, Count::value>(x.data, x.stride, n, max, terms, stride, sums,
                                                    ones);
      });
    } else {
#pragma omp simd
      for (int64_t l = 0; l < n; l++) {
        A sum = A(0), lane_ones = A(0);
        for (int j = 0; j < Count::value; j++) {
          const A difference = x.data[j * x.stride + l] - max[l];
          const A e = kIsNormal ? math::exp_normal(difference) : math::exp_nonpositive(difference);
          terms[j * stride + l] = e;
          sum += difference == A(0) ? A(0) : e;
          lane_ones += difference == A(0) ? A(1) : A(0);
        }
        sums[l] += sum;
        ones[l] += lane_ones;
      }
    }
  }

  // sum_c a_c (M - x_c) and sum_c a_c.
  void sum_gaps() {
    double *gaps = batch_.gaps, *mass = batch_.mass;
    const A* max = batch_.max;
    std::fill(gaps, gaps + n_, 0.0), std::fill(mass, mass + n_, 0.0);
    for (int64_t c = 0; c < p_.classes; c++) {
      const A* x = logits(c, 1).data;
      with_lane_coefficients(c, [&](auto coefficient) {
#pragma omp simd
        for (int64_t l = 0; l < n_; l++) {
          const A a = coefficient(l);
          gaps[l] += coefficient_gap(a, max[l] - x[l]);
          mass[l] += a;
        }
      });
    }
  }

  // Of probabilities.
  void write_probability_gradient() {
    A* log_totals = factor_;
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) {
      log_totals[l] = batch_.log_total(l);
      scale_[l] = static_cast<A>(batch_.scale[l]);
    }
    const A* max = batch_.max;
    for (int64_t c = 0; c < p_.classes; c++) {
      const A* x = logits(c, 1).data;
      const A weight = weight_ ? weight_[c] : A(1);
      A* out = out_lanes(c);
#pragma omp simd
      for (int64_t l = 0; l < n_; l++)
        out[l] = scale_[l] * probability_grad(max[l] - x[l], log_totals[l], weight, smoothing_);
      if (batch_.has_ignored) overwrite_uncounted(out);
      store_lanes(c, out);
    }
  }

  // Compiled by itself, like sum_gaps: a kernel that is one function takes longer to compile.
  void write_gradient(bool has_terms) {
    if (batch_.map.bends() && transposes_input_) load_rows();
    simd::run_as<kLevel>([&] {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) {
        factor_[l] = static_cast<A>(batch_.exp_factor[l]);
        factor_rest_[l] = batch_.factor_rest(batch_.exp_factor[l]);
        scale_[l] = static_cast<A>(batch_.scale[l]);
      }
      for (int64_t c = 0; c < p_.classes; c++) write_class_gradients(c, has_terms);
    });
    if (transposes_grad_) store_rows();
    if (!p_.probabilities) write_target_gradients();
  }

  void write_class_gradients(int64_t c, bool has_terms) {
    A* out = out_lanes(c);
    if (has_terms)
      write_class(c, out, [terms = kept_lanes(c)](int64_t l) { return terms[l]; });
    else if (batch_.map.bends())
      write_bent(c, out);
    else
      write_exps(c, logits(c, 1).data, out);
    if (batch_.has_ignored) overwrite_uncounted(out);
    store_lanes(c, out);
  }

  void overwrite_uncounted(A* out) const {
#pragma omp simd
    for (int64_t l = 0; l < n_; l++)
      out[l] = batch_.is_counted(l) ? out[l] : batch_.uncounted_value(l);
  }

  // Where the gradient of a class is computed, and from where it is stored.
  A* out_lanes(int64_t c) {
    return grad_direct_ ? grad_lanes(c) : transposes_grad_ ? tile_.data() + c * stride_ : buffer_;
  }

  void store_lanes(int64_t c, const A* out) const {
    if (!grad_direct_ && !transposes_grad_)
      store_runs(out, out_, grad_.moved(c * out_.class_stride));
  }

  void write_bent(int64_t c, A* out) {
    write_exps(c, logits_and_slopes(c), out);
#pragma omp simd
    for (int64_t l = 0; l < n_; l++) out[l] *= slopes_[l];
  }

  void write_exps(int64_t c, const A* x, A* out) {
    const A* max = batch_.max;
    if constexpr (kAvx512 || kAvx2) {
      if constexpr (kAvx512)
        avx512::exp_differences<false>(x, 1.0f, max, n_, out);
      else
        with_digits(digits_of_grad_, [&](auto digits) {
          avx2::exp_differences<digits, false>(x, 1.0f, max, n_, out);
        });
      write_class(c, out, [=](int64_t l) { return out[l]; });
    } else {
      write_class(c, out, [=](int64_t l) { return math::exp_nonpositive(x[l] - max[l]); });
    }
  }

  template <class Term>
  void write_class(int64_t c, A* out, const Term& term) {
    if (!batch_.spreads()) {
#pragma omp simd
      for (int64_t l = 0; l < n_; l++) out[l] = factor_[l] * term(l);
      return;
    }
    with_lane_coefficients(c, [&](auto coefficient) {
      if (batch_.has_factor_rest()) {
#pragma omp simd
        for (int64_t l = 0; l < n_; l++) {
          const A e = term(l);
          out[l] = scale_[l] * (factor_rest_[l] * e + (factor_[l] * e - coefficient(l)));
        }
      } else {
#pragma omp simd
        for (int64_t l = 0; l < n_; l++)
          out[l] = scale_[l] * (factor_[l] * term(l) - coefficient(l));
      }
    });
  }

  void write_target_gradients() {
    const int64_t classes = out_.class_stride;
    with_floating_pointer(out_, 0, [&](auto* grad) {
      using T = std::remove_reference_t<decltype(*grad)>;
      grad_.for_each([&](int64_t first, int64_t offset) {
        for (int64_t l = 0; l < grad_.length; l++) {
          const int64_t target = batch_.target_class[first + l];
          if (target >= 0)
            grad[offset + l * grad_.stride + target * classes] =
                from_float<T>(batch_.target_grad[first + l]);
        }
      });
    });
  }

  const Problem& p_;
  const Operand& out_;  // the gradient that is asked for
  RowBatch<A> batch_;
  const Smoothing<A> smoothing_;
  const A* const weight_;
  const Digits digits_, digits_of_grad_;
  const bool input_direct_, grad_direct_, target_direct_, needs_tile_;
  const int64_t stride_;  // of a class in the tile
  const Scratch<A> tile_;
  const bool keeps_terms_, transposes_input_, transposes_grad_;
  const Scratch<A> rows_;

  int64_t n_ = 0;
  Runs input_{}, target_{}, grad_{};
  bool loaded_ = false;
  bool is_normal_ = false;  // no exp of the tile comes near to being subnormal

  alignas(kLine) PerRow<A> min_, sums_, ones_;
  alignas(kLine) PerRow<A> factor_, factor_rest_, scale_, slopes_;
  alignas(kLine) PerRow<A> probability_buffer_;
  alignas(kLine) A buffer_[kGroup * kPadded], terms_[kGroup * kPadded];
};

}  // namespace fused_ce::cpu
