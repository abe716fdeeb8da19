// The statistics of rows that are taken one by one, in blocks that stay in the first-level cache.
//
// Each block is read once: its maximum, then its sums relative to that, then they are brought
// together with what came before. Which block a class is in depends on nothing but its number, and
// so do the bits of a row's results. A softcap is applied on the way into a buffer, a temperature
// to the differences.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../statistics.h"
#include "batch.h"
#include "terms.h"
#include "vectors_avx512.h"

namespace fused_ce::cpu {

// Compiled for one of the levels of simd.h.
template <class A, simd::Level kLevel>
class StatisticsRowKernel {
 public:
  StatisticsRowKernel(const Problem& p, const Statistics& s)
      : p_(p),
        batch_(p, s),
        wants_entropy_(s.entropy.data),
        wants_argmax_(s.argmax.data),
        grad_direct_(is_direct<A>(p.grad, p.grad.class_stride)),
        buffers_(3 * kBuffer),
        buffer_(buffers_.data()),
        out_(buffer_ + kBuffer),
        slopes_(out_ + kBuffer) {}

  void forward(const Tile& tile) {
    begin(tile);
    batch_.read_target_logits(tile);
    for (int64_t r = 0; r < tile.rows; r++) {
      if (batch_.target_class[r] < 0)
        set_nothing(r);
      else if (wants_entropy_)
        reduce<true>(r);
      else
        reduce<false>(r);
    }
    batch_.write_results(tile);
  }

  void backward(const Tile& tile) {
    begin(tile);
    batch_.read_target_logits(tile);
    batch_.find_gradients(tile);
    for (int64_t r = 0; r < tile.rows; r++) write_gradient(r);
  }

 private:
  static constexpr bool kAvx512 = kLevel == simd::Level::kAvx512 && std::is_same_v<A, float>;
  static constexpr bool kTells = kTellsNormal<A, kLevel>;
  static constexpr int64_t kBlock = 2048;
  // Sums are taken in the logits' accumulation type over at most this many elements.
  static constexpr int64_t kChunk = 256;
  // A block's, no power of two apart, where buffers compete for the same lines of the cache.
  static constexpr int64_t kBuffer = kBlock + 48;
  static constexpr auto exp_of_double = [](double x) { return math::exp_nonpositive(x); };

  void begin(const Tile& tile) {
    input_ = tile.runs(p_.input);
    grad_ = tile.runs(p_.grad);
    batch_.begin(tile);
  }

  void set_nothing(int64_t r) {
    batch_.max[r] = A(0);
    batch_.rest[r] = batch_.gaps[r] = 0.0;
  }

  int64_t block_size(int64_t b) const { return std::min(kBlock, p_.classes - b); }

  const A* read_logits(int64_t r, int64_t b, bool with_slopes = false) {
    const int64_t stride = p_.input.class_stride, n = block_size(b);
    const int64_t offset = input_.at(r) + b * stride;
    const A* x = read_span<A>(p_.input, offset, stride, n, buffer_);
    if (!batch_.map.bends()) return x;
    if (with_slopes)
      map_logits(batch_.map, x, n, buffer_, slopes_);
    else
      map_logits(batch_.map, x, n, buffer_);
    return buffer_;
  }

  // Of the next block, while a chunk of this one is computed.
  void prefetch_next(int64_t r, int64_t b, int64_t i, int64_t count) const {
    if (p_.input.class_stride == 1) prefetch(p_.input, input_.at(r) + b + i + kBlock, count);
  }

  template <bool kGaps>
  void reduce(int64_t r) {
    StatisticsSums<A, double> row;
    int64_t first = 0;
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const int64_t n = block_size(b);
      const A* x = read_logits(r, b);
      const StatisticsSums<A, double> block = sum_block<kGaps>(r, b, x, n);
      if (wants_argmax_ && block.max > row.max) first = b + (std::find(x, x + n, block.max) - x);
      row.merge(block, static_cast<double>(batch_.factor), exp_of_double);
    }
    batch_.max[r] = row.max;
    batch_.rest[r] = closed_rest(static_cast<double>(row.max), row.rest, row.ones);
    batch_.gaps[r] = row.gaps;
    batch_.argmax[r] = first;
  }

  // Calls use(i, n) for the chunks of a block; n is a constant for all but the last.
  template <class Use>
  static void for_chunks(int64_t n, const Use& use) {
    int64_t i = 0;
    for (; i + kChunk <= n; i += kChunk) use(i, std::integral_constant<int64_t, kChunk>{});
    if (i < n) use(i, n - i);
  }

  template <bool kGaps>
  StatisticsSums<A, double> sum_block(int64_t r, int64_t b, const A* x, int64_t n) const {
    A minima[kBlock / kChunk], maxima[kBlock / kChunk];
    StatisticsSums<A, double> block;
    for_chunks(n, [&](int64_t i, auto count) {
      measure(x + i, count, minima[i / kChunk], maxima[i / kChunk]);
      block.max = std::max(block.max, maxima[i / kChunk]);
    });
    const A base = base_of(block.max);
    for_chunks(n, [&](int64_t i, auto count) {
      const A gap = kTells ? base - minima[i / kChunk] : A(0);
      prefetch_next(r, b, i, count);
      with_normality<A, kLevel>(gap, batch_.factor, [&](auto is_normal) {
        block.add(maxima[i / kChunk] == base
                      ? sum_chunk<is_normal, true, kGaps>(x + i, count, base)
                      : sum_chunk<is_normal, false, kGaps>(x + i, count, base));
      });
    });
    return block;
  }

  template <class Count>
  static void measure(const A* x, Count n, A& least, A& largest) {
    A min = kInfinity<A>, max = -kInfinity<A>;
#pragma omp simd reduction(min : min) reduction(max : max)
    for (int64_t i = 0; i < n; i++) {
      if (kTells) min = x[i] < min ? x[i] : min;
      max = x[i] > max ? x[i] : max;
    }
    least = min, largest = max;
  }

  template <class Count>
  static A min_of(const A* x, Count n) {
    A min = kInfinity<A>;
#pragma omp simd reduction(min : min)
    for (int64_t i = 0; i < n; i++) min = x[i] < min ? x[i] : min;
    return min;
  }

  template <bool kIsNormal, bool kHasBase, bool kGaps, class Count>
  EntropySums<A> sum_chunk(const A* x, Count n, A base) const {
    const A factor = batch_.factor;
    if constexpr (kAvx512) {
      return avx512::sum_row<kHasBase, kGaps>(x, n, base, factor);
    } else {
      A rest = A(0), ones = A(0), gaps = A(0);
#pragma omp simd reduction(+ : rest, ones, gaps)
      for (int64_t i = 0; i < n; i++) {
        const Term<A> term = term_of<kIsNormal>(x[i], base, factor);
        if (kHasBase) {
          rest += term.difference == A(0) ? A(0) : term.e;
          ones += term.difference == A(0) ? A(1) : A(0);
        } else {
          rest += term.e;
        }
        if (kGaps) gaps -= term.e * term.difference;
      }
      return {rest, ones, gaps};
    }
  }

  void write_gradient(int64_t r) {
    const bool is_ignored = batch_.target_class[r] < 0;
    const int64_t stride = p_.grad.class_stride;
    if (is_ignored) std::fill_n(out_, std::min(kBlock, p_.classes), A(0));
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const int64_t n = block_size(b), offset = grad_.at(r) + b * stride;
      if (is_ignored) {
        store_span(out_, n, p_.grad, offset, stride);
        continue;
      }
      A* out = grad_direct_ ? static_cast<A*>(p_.grad.data) + offset : out_;
      write_block(r, b, read_logits(r, b, true), n, out);
      if (batch_.map.bends()) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] *= slopes_[i];
      }
      if (!grad_direct_) store_span(out, n, p_.grad, offset, stride);
    }
    if (batch_.has_targets() && !is_ignored)
      store_value(batch_.target_grad[r], p_.grad, grad_.at(r) + batch_.target_class[r] * stride);
  }

  void write_block(int64_t r, int64_t b, const A* x, int64_t n, A* out) const {
    for_chunks(n, [&](int64_t first, auto count) {
      prefetch_next(r, b, first, count);
      write_chunk(r, x + first, count, out + first);
    });
  }

  template <class Count>
  void write_chunk(int64_t r, const A* x, Count n, A* out) const {
    const A max = batch_.max[r], factor = batch_.factor;
    const StatisticsGradient<A> gradient(batch_.constant[r], batch_.by_difference[r]);
    if constexpr (kAvx512) {
      avx512::write_gradients(x, max, factor, gradient.constant, gradient.by_difference, n, out);
    } else {
      const A gap = kTells ? max - min_of(x, n) : A(0);
      with_normality<A, kLevel>(gap, factor, [&](auto is_normal) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const Term<A> term = term_of<is_normal>(x[i], max, factor);
          out[i] = gradient.at(term.difference, term.e);
        }
      });
    }
  }

  const Problem& p_;
  StatisticsBatch<A> batch_;
  const bool wants_entropy_, wants_argmax_, grad_direct_;
  const Scratch<A> buffers_;
  A *const buffer_, *const out_, *const slopes_;
  Runs input_{}, grad_{};
};

}  // namespace fused_ce::cpu
