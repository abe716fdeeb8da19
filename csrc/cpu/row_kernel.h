// One long row at a time, in blocks that stay in the first-level cache.
//
// Each block is read once: its maximum m_b, then e = exp(x - m_b), which is kept where the gradient
// will be (or in a scratch row, for types that would round it) and summed. When the row is through,
// a second walk multiplies each block by factor * exp(m_b - M): one exp per element in all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../formula.h"
#include "math.h"
#include "row_task.h"
#include "span.h"

namespace fused_ce::cpu {

template <class A>
class RowKernel {
 public:
  explicit RowKernel(const Problem& p)
      : p_(p),
        smoothing_(p.label_smoothing, p.classes),
        row_smoothing_(p.label_smoothing, p.classes),
        terms_in_grad_(is_direct<A>(p.grad, p.grad.class_stride)),
        terms_(p.grad.data && !terms_in_grad_ && p.classes <= kMaxScratch ? p.classes : 0),
        maxima_((p.classes + kBlock - 1) / kBlock) {}

  // Returns the row's loss; fills in its statistics and, where there is memory for it, its
  // gradient.
  double forward(const Tile& tile, int64_t i) {
    const RowTask task = TaskReader<A>(p_, tile).read(i);
    const int64_t grad = at(tile, i, p_.grad);
    if (!task.counted) {
      if (p_.grad.data) zero(grad);
      return write_row(tile, i, Sums{A(0)}, 0.0);
    }
    const int64_t input = at(tile, i, p_.input), target = at(tile, i, p_.target);
    A* terms = terms_in_grad_   ? static_cast<A*>(p_.grad.data) + grad
               : terms_.empty() ? nullptr
                                : terms_.data();
    const A target_logit = read_target_logit(task, input);
    const Sums sums = reduce(task, input, target, terms);

    const Row row = describe(task, sums, target_logit);
    const A log_total = math::log1p_nonnegative(row.total_less_one);
    const A loss = p_.probabilities
                       ? row.probability.loss(log_total, sums.gaps)
                       : row.index.loss(log_total, sums.gaps, p_.weight_sum, row_smoothing_);
    if (terms)
      scale_terms(task, row, sums.max, terms, grad, target);
    else if (p_.grad.data)
      write_gradient(task, row, sums.max, input, grad, target);
    return write_row(tile, i, sums, loss);
  }

  void backward(const Tile& tile, int64_t i) {
    const RowTask task = TaskReader<A>(p_, tile).read(i);
    const int64_t grad = at(tile, i, p_.grad);
    if (!task.counted) return zero(grad);
    const int64_t input = at(tile, i, p_.input), target = at(tile, i, p_.target);
    Sums sums;
    sums.max = load_value<A>(p_.row_max, at(tile, i, p_.row_max));
    sums.exps = load_row_sum<A>(p_, at(tile, i, p_.row_sum));
    if (p_.probabilities) sums.mass = sum_probabilities(target);
    const Row row = describe(task, sums, read_target_logit(task, input));
    write_gradient(task, row, sums.max, input, grad, target);
  }

  void backward_target(const Tile& tile, int64_t i) {
    const RowTask task = TaskReader<A>(p_, tile).read(i);
    const int64_t input = at(tile, i, p_.input), target_grad = at(tile, i, p_.target_grad);
    const A max = load_value<A>(p_.row_max, at(tile, i, p_.row_max));
    const double total = load_row_sum<A>(p_, at(tile, i, p_.row_sum));
    const ProbabilityRow<double> row{total, 0.0};
    const A log_total = static_cast<A>(math::log1p_nonnegative(row.total_less_one()));
    const A scale = static_cast<A>(task.scale);
    const A* weight = static_cast<const A*>(p_.weight);
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - b);
      const A* x = read_block(p_.input, input, b, n, buffer_);
#pragma omp simd
      for (int64_t c = 0; c < n; c++)
        probabilities_[c] = scale * probability_grad(max - x[c], log_total,
                                                     weight ? weight[b + c] : A(1), smoothing_);
      store_span(probabilities_, n, p_.target_grad, target_grad + b * p_.target_grad.class_stride,
                 p_.target_grad.class_stride);
    }
  }

 private:
  static constexpr int64_t kBlock = 2048;
  // Beyond this a scratch row outgrows the cache, and a second exp is cheaper than keeping the
  // first.
  static constexpr int64_t kMaxScratch = 262144;

  // Row sums in double, relative to the maximum so far; a larger one moves them.
  struct Sums {
    A max = -math::kInf<A>;
    double exps = 0.0;  // exp(x_c - max)
    double gaps = 0.0;  // a_c (max - x_c)
    double mass = 0.0;  // a_c

    // Adds a block's gaps from its own maximum; to be called before add_exps moves the row's.
    void add_gaps(A block_max, double block_gaps, double block_mass) {
      if (max == -math::kInf<A>)
        gaps += block_gaps;
      else if (block_max <= max)
        gaps += block_gaps + block_mass * (static_cast<double>(max) - block_max);
      else
        gaps += block_gaps + mass * (static_cast<double>(block_max) - max);
      mass += block_mass;
    }

    void add_exps(A block_max, double block_exps) {
      if (block_max == -math::kInf<A>) {
        exps += block_exps;  // 0, or NaN if the block holds one
      } else if (block_max <= max) {
        exps += block_exps * math::exp_nonpositive(static_cast<double>(block_max) - max);
      } else {
        exps = exps * math::exp_nonpositive(static_cast<double>(max) - block_max) + block_exps;
        max = block_max;
      }
    }
  };

  // In double: these few numbers go into every element of the row.
  struct Row {
    IndexRow<double> index{0.0, 0.0, 1.0, 0.0};
    ProbabilityRow<double> probability{1.0, 0.0};
    double total_less_one = 0.0;
    double exp_factor = 0.0;
  };

  static int64_t at(const Tile& tile, int64_t i, const Operand& operand) {
    return tile.run(operand).at(i);
  }

  double write_row(const Tile& tile, int64_t i, const Sums& sums, double loss) const {
    if (p_.reduction == Reduction::kNone) store_value(loss, p_.loss, at(tile, i, p_.loss));
    if (p_.row_max.data) {
      store_value(sums.max, p_.row_max, at(tile, i, p_.row_max));
      store_row_sum<A>(sums.exps, p_, at(tile, i, p_.row_sum));
    }
    return loss;
  }

  A read_target_logit(const RowTask& task, int64_t input) const {
    return task.index < 0 ? A(0)
                          : load_value<A>(p_.input, input + task.index * p_.input.class_stride);
  }

  const A* read_block(const Operand& from, int64_t offset, int64_t b, int64_t n, A* buffer) const {
    return read_span<A>(from, offset + b * from.class_stride, from.class_stride, n, buffer);
  }

  const A* read_probabilities(int64_t target, int64_t b, int64_t n) {
    return p_.probabilities ? read_block(p_.target, target, b, n, probabilities_) : nullptr;
  }

  Row describe(const RowTask& task, const Sums& sums, A target_logit) const {
    Row row;
    if (p_.probabilities) {
      row.probability = {sums.exps, sums.mass};
      row.total_less_one = row.probability.total_less_one();
      row.exp_factor = row.probability.exp_factor();
    } else {
      const double gap = static_cast<double>(sums.max) - target_logit;
      row.index = {sums.exps, gap, math::exp_nonpositive(-gap), task.weight};
      row.total_less_one = row.index.total_less_one();
      row.exp_factor = row.index.exp_factor(p_.weight_sum, row_smoothing_);
    }
    return row;
  }

  Sums reduce(const RowTask& task, int64_t input, int64_t target, A* terms) {
    Sums sums;
    const bool has_gaps = has_coefficients();
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - b);
      A* kept = terms ? terms + b : nullptr;
      const A* x = read_block(p_.input, input, b, n, kept ? kept : buffer_);
      const A max = block_max(x, n);
      const A base = max == -math::kInf<A> ? A(0) : max;  // exp(-inf - 0) is 0, not NaN
      maxima_[b / kBlock] = base;
      if (has_gaps) add_gaps(sums, x, base, b, n, read_probabilities(target, b, n));
      const int64_t skipped = task.index - b;
      const bool skips = skipped >= 0 && skipped < n;
      const double exps = kept ? (skips ? exp_block<true, true>(x, n, base, kept, skipped)
                                        : exp_block<true, false>(x, n, base, kept, 0))
                               : (skips ? exp_block<false, true>(x, n, base, kept, skipped)
                                        : exp_block<false, false>(x, n, base, kept, 0));
      sums.add_exps(max, exps);
    }
    if (sums.max == -math::kInf<A>) sums.exps = std::numeric_limits<double>::quiet_NaN();
    return sums;
  }

  static A block_max(const A* x, int64_t n) {
    A max = -math::kInf<A>;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
    return max;
  }

  // Sum of exp(x - base) but for the skipped class, each term kept where asked. The sum is in
  // double: next to the 1 of the maximum, float would lose the many small terms of a confident row.
  template <bool kKeep, bool kSkip>
  static double exp_block(const A* x, int64_t n, A base, A* kept, int64_t skipped) {
    const int32_t skip = static_cast<int32_t>(skipped);
    const int32_t count = static_cast<int32_t>(n);
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int32_t i = 0; i < count; i++) {
      A e = math::exp_nonpositive(x[i] - base);
      if (kSkip) e = i == skip ? A(0) : e;
      if (kKeep) kept[i] = e;
      sum += e;
    }
    return sum;
  }

  void add_gaps(Sums& sums, const A* x, A base, int64_t b, int64_t n, const A* probabilities) {
    with_coefficients(p_, b, probabilities, smoothing_, [&](auto coefficient) {
      double gaps = 0.0, mass = 0.0;
#pragma omp simd reduction(+ : gaps, mass)
      for (int64_t i = 0; i < n; i++) {
        const A a = coefficient(i);
        gaps += a * (base - x[i]);
        mass += a;
      }
      sums.add_gaps(base, gaps, mass);
    });
  }

  double sum_probabilities(int64_t target) {
    double total = 0.0;
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - b);
      with_coefficients(p_, b, read_probabilities(target, b, n), smoothing_, [&](auto coefficient) {
        double mass = 0.0;
#pragma omp simd reduction(+ : mass)
        for (int64_t i = 0; i < n; i++) mass += coefficient(i);
        total += mass;
      });
    }
    return total;
  }

  // Whether a class other than the target has a coefficient a_c.
  bool has_coefficients() const { return p_.probabilities || smoothing_.smooth != A(0); }

  // Writes scale (A p_c - a_c) block by block; term(b, n, factor) gives the function i -> factor
  // exp(x_i - M) for the block at b. The scale is folded into the factor where there are no a_c;
  // where there are, the difference comes first, so that equal terms cancel.
  template <class Term>
  void write_blocks(const RowTask& task, const Row& row, int64_t grad, int64_t target,
                    const Term& term) {
    const A scale = static_cast<A>(task.scale);
    const A part = p_.probabilities ? A(1) : smoothing_.smooth;
    const double factor = has_coefficients() ? row.exp_factor : task.scale * row.exp_factor;
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const int64_t n = std::min(kBlock, p_.classes - b);
      const auto weighted_exp = term(b, n, factor);
      A* out = terms_in_grad_ ? static_cast<A*>(p_.grad.data) + grad + b : buffer_;
      if (!has_coefficients()) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = weighted_exp(i);
      } else {
        const A* q = read_probabilities(target, b, n);
        with_coefficients(p_, b, q, smoothing_, [&](auto coefficient) {
#pragma omp simd
          for (int64_t i = 0; i < n; i++)
            out[i] = scale * (weighted_exp(i) - part * coefficient(i));
        });
      }
      if (!terms_in_grad_)
        store_span(out, n, p_.grad, grad + b * p_.grad.class_stride, p_.grad.class_stride);
    }
    if (task.index >= 0)
      store_value(task.scale * row.index.target_grad(p_.weight_sum, row_smoothing_), p_.grad,
                  grad + task.index * p_.grad.class_stride);
  }

  void scale_terms(const RowTask& task, const Row& row, A max, const A* terms, int64_t grad,
                   int64_t target) {
    write_blocks(task, row, grad, target, [&](int64_t b, int64_t, double factor) {
      const double lead = static_cast<double>(maxima_[b / kBlock]) - max;
      const A block_factor = static_cast<A>(factor * math::exp_nonpositive(lead));
      const A* e = terms + b;
      return [=](int64_t i) { return block_factor * e[i]; };
    });
  }

  void write_gradient(const RowTask& task, const Row& row, A max, int64_t input, int64_t grad,
                      int64_t target) {
    write_blocks(task, row, grad, target, [&](int64_t b, int64_t n, double row_factor) {
      const A factor = static_cast<A>(row_factor);
      const A* x = read_block(p_.input, input, b, n, buffer_);
      return [=](int64_t i) { return factor * math::exp_nonpositive(x[i] - max); };
    });
  }

  void zero(int64_t grad) {
    std::fill(buffer_, buffer_ + std::min(kBlock, p_.classes), A(0));
    for (int64_t b = 0; b < p_.classes; b += kBlock)
      store_span(buffer_, std::min(kBlock, p_.classes - b), p_.grad,
                 grad + b * p_.grad.class_stride, p_.grad.class_stride);
  }

  const Problem& p_;
  const Smoothing<A> smoothing_;
  const Smoothing<double> row_smoothing_;
  const bool terms_in_grad_;
  std::vector<A> terms_;
  std::vector<A> maxima_;
  A buffer_[kBlock];
  A probabilities_[kBlock];
};

}  // namespace fused_ce::cpu
