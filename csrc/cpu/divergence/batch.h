// The rows of one tile, each as the few numbers that its divergence comes down to.
//
// As RowBatch is for the loss: the kernels fill in what takes a walk over the logits, and read back
// what the gradient needs; everything that is done once a row is done here, for many rows at once
// and in double.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../divergence.h"
#include "../../divergence_problem.h"
#include "../rows/row_batch.h"
#include "../rows/tiles.h"
#include "../vector/math.h"
#include "../vector/scratch.h"
#include "../vector/simd.h"
#include "../vector/span.h"
#include "lanes.h"

namespace fused_ce::cpu {

template <class A>
class DivergenceBatch {
 public:
  DivergenceBatch(const Problem& p, const Divergence& d)
      : factor(static_cast<A>(1.0 / d.temperature)), p_(p), d_(d) {
    std::fill_n(weight_, kMaxBatch, 1.0);
    for (double* rows : {first_rest, second_rest, gaps, excess}) std::fill_n(rows, kMaxBatch, 0.0);
  }

  void begin(const Tile& tile) {
    size = tile.rows;
    has_uncounted = false;
    if (!p_.weighs_samples()) return;
    load(p_.options.sample_weight, tile, weight_);
    for (int64_t r = 0; r < size; r++) has_uncounted |= weight_[r] == 0.0;
  }

  // A row that does not count is not read; its divergence and its gradient are zero.
  bool is_counted(int64_t r) const { return weight_[r] != 0.0; }

  // What the kernel found of a row.
  void set(int64_t r, const DivergencePart<A, double>& part) {
    first_max[r] = part.first_max;
    second_max[r] = part.second_max;
    first_rest[r] = closed_rest<double>(part.first_max, part.first_rest, part.first_ones);
    second_rest[r] = closed_rest<double>(part.second_max, part.second_rest, part.second_ones);
    gaps[r] = part.gaps;
    excess[r] = part.excess;
  }

  // Writes the losses and the statistics, and finds what the gradient needs where there is one;
  // returns the sum of the losses.
  double finish(const Tile& tile) {
    simd::run([this] {
      find_inverses();
      find_values();
    });
    if (!p_.reduces()) store(loss_, tile, p_.loss);
    store(first_max, tile, d_.first_max);
    store(first_rest, tile, d_.first_rest);
    store(second_max, tile, d_.second_max);
    store(second_rest, tile, d_.second_rest);
    if (d_.reverse) store(mean_gap, tile, d_.mean_gap);
    if (p_.grad.data) find_scales(tile);
    double sum = 0.0;
    for (int64_t r = 0; r < size; r++) sum += loss_[r];
    return sum;
  }

  // The same from the statistics, for a gradient alone.
  void read_statistics(const Tile& tile) {
    load(d_.first_max, tile, first_max);
    load(d_.first_rest, tile, first_rest);
    load(d_.second_max, tile, second_max);
    load(d_.second_rest, tile, second_rest);
    if (d_.reverse) load(d_.mean_gap, tile, mean_gap);
    simd::run([this] { find_inverses(); });
    find_scales(tile);
  }

  DivergenceGradient<double> gradient(int64_t r) const {
    return DivergenceGradient<double>::of(row(r), scale_[r]);
  }

  ReverseDivergenceGradient<double> reverse_gradient(int64_t r) const {
    return ReverseDivergenceGradient<double>::of(row(r), mean_gap[r], scale_[r]);
  }

  const A factor;  // 1 / temperature
  int64_t size = 0;
  bool has_uncounted = false;
  // From the kernel: the sums of divergence.h, the rests closed.
  alignas(kLine) PerRow<A> first_max, second_max;
  alignas(kLine) PerRow<double> first_rest, second_rest, gaps, excess;
  alignas(kLine) PerRow<double> mean_gap;

 private:
  template <class T>
  static void store(const T* values, const Tile& tile, const Operand& to) {
    if (to.data) store_runs(values, to, tile.runs(to));
  }

  template <class T>
  static void load(const Operand& from, const Tile& tile, T* values) {
    load_runs(from, tile.runs(from), values);
  }

  DivergenceRow row(int64_t r) const {
    return {first_rest[r], second_rest[r], first_inverse_[r], second_inverse_[r]};
  }

  void find_inverses() {
#pragma omp simd
    for (int64_t r = 0; r < whole_vectors(size); r++) {
      first_inverse_[r] = 1.0 / (1.0 + first_rest[r]);
      second_inverse_[r] = 1.0 / (1.0 + second_rest[r]);
    }
  }

  void find_values() {
    const auto log1p = [](double y, double inverse) { return math::log1p_nonnegative(y, inverse); };
#pragma omp simd
    for (int64_t r = 0; r < whole_vectors(size); r++) {
      const double value = divergence_of(row(r), gaps[r], excess[r], log1p);
      loss_[r] = weight_[r] == 0.0 ? 0.0 : weight_[r] * value;
      mean_gap[r] = gaps[r] * first_inverse_[r];
    }
  }

  // Of what arrives for a row, of its weight and of what all rows share.
  void find_scales(const Tile& tile) {
    const double shared = 1.0 / d_.temperature / p_.known.denominator;
    if (p_.grad_output.data && !p_.reduces())
      load(p_.grad_output, tile, scale_);
    else
      std::fill_n(scale_, size, p_.grad_output.data ? load_value<double>(p_.grad_output, 0) : 1.0);
    for (int64_t r = 0; r < size; r++) scale_[r] *= weight_[r] * shared;
  }

  const Problem& p_;
  const Divergence& d_;
  alignas(kLine) PerRow<double> weight_, loss_, scale_, first_inverse_, second_inverse_;
};

}  // namespace fused_ce::cpu
