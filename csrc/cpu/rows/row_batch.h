// The rows of one tile, each as the few numbers that it comes down to, and the mathematics on them.
//
// A row costs two divisions and a logarithm whatever its length, which for few classes would be
// most of its time; here it is done for many rows at once. The kernels fill in what takes a walk
// over the logits and read back what the gradient needs. What goes into every element of a gradient
// is in double; a loss, whose terms do not cancel, has all digits of its own type without.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../../formula.h"
#include "../vector/math.h"
#include "../vector/scratch.h"
#include "../vector/simd.h"
#include "../vector/span.h"
#include "logits.h"
#include "targets.h"
#include "tiles.h"

namespace fused_ce::cpu {

constexpr int64_t kMaxBatch = 512;

// A number for each row. With a power of two of them, arrays would lie where a processor takes a
// load from one for a load of what was just stored to another, and waits: up to a tenth of the time
// of short rows, depending on which arrays there are.
template <class T>
using PerRow = T[kMaxBatch + 320 / sizeof(T)];

// In the place of the class of a row that does not count, whose loss and gradient are zero, or nan
// where the target is no class.
constexpr int64_t kNotCounted = -1, kNoSuchClass = -2;

template <class A>
class RowBatch {
 public:
  // For tiles of at most so many rows.
  RowBatch(const Problem& p, int64_t rows)
      : map(logit_map<A>(p)),
        p_(p),
        common_(p, p.known),
        is_plain_(p.has_plain_rows()),
        spreads_(p.probabilities || common_.spreads()),
        scales_vary_(std::any_of(p.grad_output.row_strides, p.grad_output.row_strides + p.row_dims,
                                 [](int64_t stride) { return stride != 0; })),
        map_factor_(p.grad.data ? static_cast<double>(map.factor) : 1.0) {
    const double grad_output = p.grad_output.data ? load_value<double>(p.grad_output, 0) : 1.0;
    std::fill(scale, scale + rows, scale_of(grad_output));
    std::fill(target_weight_, target_weight_ + rows, A(1));
    if (p.probabilities) std::fill(target_class, target_class + rows, int64_t{0});
    if (p.is_shard()) is_elsewhere_.resize(rows);
  }

  // Whether a class other than the target has a coefficient a_c.
  bool spreads() const { return spreads_; }

  // The targets of a tile's rows, their weights, and what their gradients are scaled by.
  void begin(const Tile& tile) {
    size = tile.rows;
    if (!p_.probabilities) read_targets(tile.runs(p_.target));
    if (p_.grad_output.data && scales_vary_) read_scales(tile);
    if (p_.weighs_samples()) read_sample_weights(tile);
    if (!p_.probabilities && p_.options.weight.data) read_target_weights();
  }

  bool is_counted(int64_t r) const { return target_class[r] >= 0; }

  // What the gradient of a row is that does not count.
  A uncounted_value(int64_t r) const {
    return target_class[r] == kNoSuchClass ? std::numeric_limits<A>::quiet_NaN() : A(0);
  }

  // Takes over what another batch of the same problem knows.
  void copy(const RowBatch& from) {
    size = from.size;
    const auto copy_rows = [&](const auto& source, auto& rows) { std::copy_n(source, size, rows); };
    copy_rows(from.target_class, target_class);
    copy_rows(from.max, max);
    copy_rows(from.rest, rest);
    copy_rows(from.scale, scale);
    copy_rows(from.exp_factor, exp_factor);
    copy_rows(from.target_grad, target_grad);
  }

  // What the kernel found of a row.
  void set(int64_t r, const RowSums<A, double>& sums) {
    max[r] = sums.max;
    rest[r] = sums.rest;
    gaps[r] = sums.gaps;
    mass[r] = sums.mass;
  }

  // Of the rows [first, last); to be called before a kernel overwrites their logits, and best when
  // they are in the cache.
  void read_target_logits(const Tile& tile, int64_t first, int64_t last) {
    if (p_.probabilities) return;
    const Runs input = tile.runs(p_.input);
    with_floating_pointer(p_.input, 0, [&](auto* data) {
      input.for_each_of(first, last, [&](int64_t begin, int64_t offset, int64_t n) {
        const auto* logits = data + offset;
        const int64_t* target = target_class + begin;
        for (int64_t r = 0; r < n; r++)
          target_logit_[begin + r] =
              target[r] < 0 ? A(0)
                            : static_cast<A>(to_float(
                                  logits[r * input.stride + target[r] * p_.input.class_stride]));
      });
    });
    A* logits = target_logit_ + first;
    if (map.bends())
      map_logits(map, logits, last - first, logits, target_slope_ + first);
    else if (!map.is_identity())
      map_logits(map, logits, last - first, logits);
  }

  void read_statistics(const Tile& tile) {
    load_runs(p_.row_max, tile.runs(p_.row_max), max);
    load_runs(p_.row_rest, tile.runs(p_.row_rest), rest);
    // The gradient of the targets themselves does without the mass.
    if (!p_.row_mass.data || p_.target_grad.data) return;
    load_runs(p_.row_mass, tile.runs(p_.row_mass), mass);
    if (p_.is_shard()) return;
    PerRow<double> low;
    load_runs(p_.row_mass_low, tile.runs(p_.row_mass_low), low);
    for (int64_t r = 0; r < size; r++) mass[r] += low[r];
  }

  // Writes the losses and the statistics, and finds what the gradient needs where there is one;
  // returns the sum of the losses.
  double write_losses(const Tile& tile) {
    if (p_.is_shard()) return write_shard(tile), 0.0;
    if (p_.grad.data)
      run<true, true>();
    else
      run<true, false>();
    if (p_.weighs_samples()) weigh_losses(tile);
    if (!p_.reduces()) store_runs(loss_, p_.loss, tile.runs(p_.loss));
    if (p_.row_max.data) {
      store_runs(max, p_.row_max, tile.runs(p_.row_max));
      store_runs(rest, p_.row_rest, tile.runs(p_.row_rest));
      if (p_.probabilities) store_masses(tile);
    }
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t r = 0; r < size; r++) total += loss_[r];
    return total;
  }

  void store_masses(const Tile& tile) const {
    PerRow<double> low;
    for (int64_t r = 0; r < size; r++) low[r] = lost_as<A>(mass[r]);
    store_runs(mass, p_.row_mass, tile.runs(p_.row_mass));
    store_runs(low, p_.row_mass_low, tile.runs(p_.row_mass_low));
  }

  // What an exp_factor loses as an A. With a z-loss it is no number of few digits, which a
  // coefficient cancels exactly in a row that is certain.
  A factor_rest(double factor) const {
    return has_factor_rest() ? static_cast<A>(lost_as<A>(factor)) : A(0);
  }
  bool has_factor_rest() const { return common_.z_loss != 0.0; }

  // From the statistics to exp_factor and target_grad.
  void find_gradients() {
    if (p_.is_shard()) return find_shard_gradients();
    run<false, true>();
  }

  // log(sum_c exp(x_c - M)); a row whose largest logit is infinite has none.
  A log_total(int64_t r) const {
    const A defined = defined_rest<A>(r);
    return math::log1p_nonnegative(defined, A(1) / (A(1) + defined));
  }

  const LogitMap<A> map;
  int64_t size = 0;
  bool has_ignored = false;
  // Arrays begin on a cache line: of any other the compiler would handle the first few elements one
  // by one.
  alignas(kLine) PerRow<int64_t> target_class;  // of probabilities 0; below 0 as said above

  // From the kernel, or with read_statistics: the largest logit M, and the sum of exp(x - M) over
  // all classes but one of the largest.
  alignas(kLine) PerRow<A> max;
  alignas(kLine) PerRow<double> rest;
  // From the kernel where rows spread: sum_c a_c (M - x_c), and for probabilities sum_c a_c.
  alignas(kLine) PerRow<double> gaps, mass;

  // The gradient is scale (exp_factor exp(x_c - M) - a_c) with target_grad at the target class; the
  // scale is already in the factor of rows that do not spread.
  alignas(kLine) PerRow<double> scale, exp_factor, target_grad;

 private:
  void read_targets(const Runs& runs) {
    int64_t any = 0;
    with_index_pointer(p_.target, 0, [&](const auto* data) {
      if (runs.count == 1 && runs.stride == 1) prefetch(p_.target, runs.first + size, size);
      runs.for_each([&](int64_t first, int64_t offset) {
        if (p_.is_shard()) {
          any |= read_shard_run(data + offset, runs.stride, runs.length, first);
          return;
        }
        any |= with_stride(runs.stride, [&](auto stride) {
          return read_target_run(data + offset, stride, runs.length, target_class + first);
        });
      });
    });
    has_ignored = any < 0;
  }

  // Returns a negative number where one of them is.
  template <class Index, class Stride>
  int64_t read_target_run(const Index* targets, Stride stride, int64_t n, int64_t* read) const {
    const int64_t ignored = p_.options.ignore_index, classes = p_.classes;
    const int64_t outside = p_.allows_bad_targets() ? kNoSuchClass : kNotCounted;
    int64_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t r = 0; r < n; r++) {
      const int64_t index = targets[r * stride];
      const int64_t found = index >= 0 && index < classes ? index : outside;
      read[r] = index == ignored ? kNotCounted : found;
      any |= read[r];
    }
    return any;
  }

  // The same of a shard. A row whose target is elsewhere is taken for one of class 0, so that the
  // kernels need not know, and the class has no part of its own there.
  template <class Index>
  __attribute__((noinline)) int64_t read_shard_run(const Index* targets, int64_t stride, int64_t n,
                                                   int64_t first) {
    const int64_t outside = p_.allows_bad_targets() ? kNoSuchClass : kNotCounted;
    int64_t any = 0;
    for (int64_t r = 0; r < n; r++) {
      const int64_t index = targets[r * stride];
      const bool is_class = index >= 0 && index < p_.vocabulary;
      const int64_t own = is_class ? index - p_.first_class : -1;
      const bool is_own = own >= 0 && own < p_.classes;
      const int64_t found = is_class ? (is_own ? own : 0) : outside;
      target_class[first + r] = index == p_.options.ignore_index ? kNotCounted : found;
      is_elsewhere_[first + r] = !is_own;
      any |= target_class[first + r];
    }
    return any;
  }

  void read_target_weights() {
    const A* weight = static_cast<const A*>(p_.options.weight.data);
    for (int64_t r = 0; r < size; r++)
      target_weight_[r] = target_class[r] >= 0 ? weight[target_class[r]] : A(1);
  }

  void read_scales(const Tile& tile) {
    load_runs(p_.grad_output, tile.runs(p_.grad_output), scale);
#pragma omp simd
    for (int64_t r = 0; r < size; r++) scale[r] = scale_of(scale[r]);
  }

  double scale_of(double grad_output) const {
    return grad_output / p_.known.denominator * map_factor_;
  }

  // Compiled by itself, like all that few calls need.
  __attribute__((noinline)) void read_sample_weights(const Tile& tile) {
    PerRow<double> weights;
    load_sample_weights(tile, weights);
    const double grad_output = p_.grad_output.data ? load_value<double>(p_.grad_output, 0) : 1.0;
    if (p_.probabilities) has_ignored = false;
    for (int64_t r = 0; r < size; r++) {
      if (p_.probabilities) target_class[r] = 0;
      if (weights[r] == 0.0) target_class[r] = kNotCounted;
      has_ignored |= weights[r] == 0.0;
      scale[r] = (scales_vary_ ? scale[r] : scale_of(grad_output)) * weights[r];
    }
  }

  __attribute__((noinline)) void weigh_losses(const Tile& tile) {
    PerRow<double> weights;
    load_sample_weights(tile, weights);
    for (int64_t r = 0; r < size; r++)
      if (is_counted(r)) loss_[r] *= weights[r];
  }

  void load_sample_weights(const Tile& tile, double* weights) const {
    load_runs(p_.options.sample_weight, tile.runs(p_.options.sample_weight), weights);
  }

  // A row whose largest logit is infinite has no softmax.
  template <class R>
  R defined_rest(int64_t r) const {
    const A zero_or_nan = max[r] - max[r];
    return zero_or_nan == A(0) ? static_cast<R>(rest[r]) : std::numeric_limits<R>::quiet_NaN();
  }

  template <class R>
  IndexRow<R> index_row(int64_t r, const Common<R>& common) const {
    const A difference = target_logit_[r] - max[r];
    const R rest_of_row = defined_rest<R>(r);
    return {static_cast<R>(max[r]),
            rest_of_row,
            static_cast<R>(log_total(r)),
            R(1) / (R(1) + rest_of_row),
            static_cast<R>(max[r]) - static_cast<R>(target_logit_[r]),
            static_cast<R>(math::exp_nonpositive(difference)),
            static_cast<R>(target_weight_[r]),
            common};
  }

  Row<double> probability_row(int64_t r, const Common<double>& common) const {
    const double rest_of_row = defined_rest<double>(r);
    return {max[r], rest_of_row, log_total(r), 1.0 / (1.0 + rest_of_row), mass[r], common};
  }

  // As a function of its own: inlined into a whole kernel the loops are not always vectorised.
  template <bool kLoss, bool kGradient>
  void run() {
    if (is_plain_)
      simd::run([this] { solve<kLoss, kGradient>(); });
    else
      solve_any<kLoss, kGradient>();
    if (kGradient && map.bends())
      for (int64_t r = 0; r < size; r++) target_grad[r] *= target_slope_[r];
  }

  template <bool kLoss, bool kGradient>
  void solve() {
    Common<double> of_gradient = common_;
    of_gradient.z_loss = 0.0;  // for the compiler to know
    if (p_.probabilities) {
#pragma omp simd
      for (int64_t r = 0; r < size; r++) {
        const Row<double> row = probability_row(r, of_gradient);
        if (kLoss) loss_[r] = row.loss(gaps[r]);
        if (kGradient) exp_factor[r] = row.exp_factor();
      }
    } else {
      const Common<A> of_loss(of_gradient);
#pragma omp simd
      for (int64_t r = 0; r < size; r++) {
        const A loss = kLoss ? index_loss(r, of_loss) : A(0);
        const double factor = kGradient ? index_factor(r, of_gradient) : 0.0;
        const double grad = kGradient ? scaled_target_grad(r, of_gradient) : 0.0;
        if (kLoss) loss_[r] = loss;
        if (kGradient) exp_factor[r] = factor;
        if (kGradient) target_grad[r] = grad;
      }
    }
  }

  // The same with every option, row by row.
  template <bool kLoss, bool kGradient>
  __attribute__((noinline)) void solve_any() {
    for (int64_t r = 0; r < size; r++) {
      if (!is_counted(r)) {
        if (kLoss) loss_[r] = uncounted_value(r);
        continue;
      }
      if (p_.probabilities) {
        const Row<double> row = probability_row(r, common_);
        if (kLoss) loss_[r] = row.loss(gaps[r]);
        if (kGradient) exp_factor[r] = row.exp_factor();
        continue;
      }
      // In double, since a power makes more of the roundings before it.
      const IndexRow<double> row = focused(index_row(r, common_));
      if (kLoss) loss_[r] = row.loss(gaps[r]);
      if (!kGradient) continue;
      exp_factor[r] = (common_.spreads() ? 1.0 : scale[r]) * row.exp_factor();
      target_grad[r] = scale[r] * row.target_grad();
    }
  }

  template <class R>
  static IndexRow<R> focused(IndexRow<R> row) {
    if (row.common.focal_gamma > R(0))
      row.focus([](R base, R power) { return std::pow(base, power); });
    return row;
  }

  // Instead of losses: what the classes of a shard come down to, zeros for a row that does not
  // count.
  __attribute__((noinline)) void write_shard(const Tile& tile) {
    for (int64_t r = 0; r < size; r++) {
      if (!is_counted(r))
        max[r] = A(0), rest[r] = gaps[r] = mass[r] = 0.0;
      else if (max[r] == -kInfinity<A>)
        sum_masked(tile, r);
      if (is_counted(r) && !p_.probabilities) add_target(r);
    }
    store_runs(max, p_.row_max, tile.runs(p_.row_max));
    store_runs(rest, p_.row_rest, tile.runs(p_.row_rest));
    store_runs(gaps, p_.row_gaps, tile.runs(p_.row_gaps));
    store_runs(mass, p_.row_mass, tile.runs(p_.row_mass));
  }

  // Of a row without a finite logit here, which in the whole vocabulary may have one: relative to
  // 0, as some kernels do not take it. It may have a nan.
  void sum_masked(const Tile& tile, int64_t r) {
    const int64_t row = tile.runs(p_.input).at(r);
    const int64_t targets = p_.probabilities ? tile.runs(p_.target).at(r) : 0;
    rest[r] = gaps[r] = 0.0;
    for (int64_t c = 0; c < p_.classes; c++) {
      const A x = map.factor * load_value<A>(p_.input, row + c * p_.input.class_stride);
      if (std::isnan(x)) rest[r] = x;
      const A weight = p_.options.weight.data ? load_value<A>(p_.options.weight, c) : A(1);
      const Smoothing<A> smoothing(common_.smoothing);
      const A coefficient =
          p_.probabilities ? probability_coefficient(
                                 load_value<A>(p_.target, targets + c * p_.target.class_stride),
                                 weight, smoothing)
                           : index_coefficient(weight, smoothing);
      if (spreads_) gaps[r] += coefficient_gap(coefficient, kInfinity<A>);
    }
  }

  void add_target(int64_t r) {
    if (!spreads_) gaps[r] = mass[r] = 0.0;
    if (is_elsewhere_[r]) return;
    const double coefficient = common_.smoothing.hard * target_weight_[r];
    const double gap = static_cast<double>(base_of(max[r])) - target_logit_[r];
    gaps[r] += coefficient_gap(coefficient, gap);
    mass[r] += coefficient;
  }

  // From the statistics of the whole vocabulary.
  __attribute__((noinline)) void find_shard_gradients() {
    for (int64_t r = 0; r < size; r++) {
      if (!is_counted(r)) continue;
      const double of_factor = spreads_ ? 1.0 : scale[r];
      if (p_.probabilities || is_elsewhere_[r]) {
        const double factor = probability_row(r, common_).exp_factor();
        exp_factor[r] = of_factor * factor;
        if (p_.probabilities) continue;
        const double e = math::exp_nonpositive(target_logit_[r] - max[r]);
        const double weight = target_weight_[r];
        target_grad[r] = scale[r] * (factor * e - index_coefficient(weight, common_.smoothing));
      } else {
        const IndexRow<double> row = index_row(r, common_);
        exp_factor[r] = of_factor * row.exp_factor();
        target_grad[r] = scale[r] * row.target_grad();
      }
    }
    if (map.bends())
      for (int64_t r = 0; r < size; r++) target_grad[r] *= target_slope_[r];
  }

  // One function for each result of a row: the variables of a function that is inlined into a loop
  // stay in registers, those of the loop itself may become arrays, which GCC does not vectorise.
  // What they have in common is computed once.
  A index_loss(int64_t r, const Common<A>& common) const {
    const A loss = index_row(r, common).loss(static_cast<A>(gaps[r]));
    return target_class[r] < 0 ? A(0) : loss;
  }

  double index_factor(int64_t r, const Common<double>& common) const {
    const double factor = index_row(r, common).exp_factor();
    return common.spreads() ? factor : scale[r] * factor;
  }

  double scaled_target_grad(int64_t r, const Common<double>& common) const {
    return scale[r] * index_row(r, common).target_grad();
  }

  const Problem& p_;
  const Common<double> common_;
  const bool is_plain_;  // none of the options that a row is rarely given
  const bool spreads_, scales_vary_;
  const double map_factor_;  // of the logits' gradients; the target's and the factor's have none
  alignas(kLine) PerRow<A> target_logit_, target_slope_, target_weight_;
  // The loss of probabilities may be wider than the logits.
  alignas(kLine) PerRow<double> loss_;
  std::vector<uint8_t> is_elsewhere_;  // of a shard's rows
};

}  // namespace fused_ce::cpu
