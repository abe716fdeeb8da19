// Rows whose classes lie next to each other, in blocks that stay in the first-level cache.
//
// Each block is read once: its maximum m_b, then e = exp(x - m_b), which is kept where the gradient
// will be (or in scratch memory, for types that would round it) and summed. When the row is
// through, a second walk multiplies each block by factor * exp(m_b - M): one exp per element in
// all. A block and what it comes down to depend on the problem alone, so that the blocks of one
// long row may be shared out between threads without a bit of the result changing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../../formula.h"
#include "../vector/exp_avx2.h"
#include "../vector/exp_avx512.h"
#include "../vector/extent.h"
#include "../vector/math.h"
#include "../vector/scratch.h"
#include "../vector/span.h"
#include "coefficients.h"
#include "row_batch.h"

namespace fused_ce::cpu {

constexpr int64_t kRowBlock = 2048;
// Sums are taken in the logits' accumulation type over at most this many elements, then in double.
constexpr int64_t kChunk = 256;

// Beyond this a scratch row outgrows the cache, and a second exp is cheaper than keeping the first.
constexpr int64_t kMaxScratch = 262144;

inline int64_t blocks_of(const Problem& p) { return (p.classes + kRowBlock - 1) / kRowBlock; }

// What a block of a row comes down to.
template <class A>
struct BlockSums : RowSums<A, double> {
  Extent<A> extents[kRowBlock / kChunk];
  A largest;  // the logit of the maximum, before the factor of all logits

  // Member by member: GCC 12 puts a whole value together in memory that it then reads at once,
  // which waits until all stores before it are through, those of converted logits too.
  void begin(A largest, A factor) {
    this->rest = this->ones = this->gaps = this->mass = 0.0;
    this->max = factor * largest;
    this->largest = this->max == -kInfinity<A> ? A(0) : largest;
  }
};

// Compiled for one of the levels of simd.h.
template <class A, simd::Level kLevel>
class RowKernel {
 public:
  RowKernel(const Problem& p, const Tiling& tiling)
      : p_(p),
        batch_(p, tiling.tile_rows),
        smoothing_(p.options.label_smoothing, p.all_classes()),
        factor_(batch_.map.bends() ? A(1) : batch_.map.factor),
        digits_(digits_of_terms(p)),
        digits_of_grad_(digits_of(p.grad)),
        adjacent_(p.input.class_stride == 1),
        grad_direct_(is_direct<A>(p.grad, p.grad.class_stride)),
        keeps_terms_((grad_direct_ && !batch_.map.bends()) ||
                     (p.grad.data && p.classes <= kMaxScratch)),
        loads_extents_(adjacent_ && half::has_instructions(p.input.dtype) && !batch_.map.bends()),
        group_(std::max<int64_t>(1, kGroupElements / std::max<int64_t>(1, p.classes))),
        terms_(keeps_terms_ && !grad_direct_ ? p.classes * tiling.tile_rows : 0),
        kept_slopes_(keeps_terms_ && batch_.map.bends() ? p.classes * tiling.tile_rows : 0),
        buffers_((batch_.map.bends() ? 3 : 2) * kBuffer),
        buffer_(buffers_.data()),
        coefficients_(buffer_ + kBuffer),
        slopes_(coefficients_ + kBuffer),
        blocks_(blocks_of(p) * tiling.tile_rows) {}

  // Returns the sum of the tile's losses; writes the statistics and the gradient where there is
  // memory for them.
  double forward(const Tile& tile) {
    begin(tile);
    if (blocks_of(p_) == 1) {
      reduce_short_rows(tile);
    } else {
      batch_.read_target_logits(tile, 0, tile.rows);
      for (int64_t r = 0; r < tile.rows; r++) reduce(r, row_blocks(r), 0, p_.classes);
    }
    const double loss = finish(tile, blocks_.data());
    if (p_.grad.data) write_gradients(tile.rows, blocks_.data(), 0, p_.classes);
    return loss;
  }

  void backward(const Tile& tile) {
    begin_backward(tile);
    rewrite_gradients(tile.rows, 0, p_.classes);
  }

  void backward_target(const Tile& tile) {
    begin(tile);
    batch_.read_statistics(tile);
    for (int64_t r = 0; r < tile.rows; r++) write_target_gradient(r, tile.runs(p_.target_grad));
  }

  // Returns the sum of the tile's gradients of mapped logits, each times the logit as it is.
  double backward_scale(const Tile& tile) {
    begin_backward(tile);
    double sum = 0.0;
    for (int64_t r = 0; r < tile.rows; r++) sum += scale_gradient(r);
    return sum;
  }

  // What forward and backward consist of. Classes [first, last) of row r begin and end at multiples
  // of kRowBlock or the row's end; `blocks` holds all blocks of the rows. The larger parts are
  // compiled by themselves: inlined, each caller would have a copy.
  void begin(const Tile& tile) {
    input_ = tile.runs(p_.input);
    target_ = tile.runs(p_.target);
    grad_ = tile.runs(p_.grad);
    batch_.begin(tile);
  }

  void begin_forward(const Tile& tile) {
    begin(tile);
    batch_.read_target_logits(tile, 0, tile.rows);
  }

  void begin_backward(const Tile& tile) {
    begin(tile);
    batch_.read_target_logits(tile, 0, tile.rows);
    batch_.read_statistics(tile);
    batch_.find_gradients();
  }

  // To work on the tile that another kernel has begun.
  void join(const RowKernel& leader) {
    input_ = leader.input_;
    target_ = leader.target_;
    grad_ = leader.grad_;
    batch_.copy(leader.batch_);
  }

  void reduce(int64_t r, BlockSums<A>* blocks, int64_t first, int64_t last) {
    if (!is_counted(r)) return;
    simd::run_as<kLevel>([&] {
      for (int64_t b = first; b < last; b += kRowBlock) {
        BlockSums<A>& sums = blocks[b / kRowBlock];
        const int64_t n = std::min(kRowBlock, last - b);
        const A* x = measure_block(r, b, n, sums);
        sum_block(r, b, n, x, sums);
      }
    });
  }

  double finish(const Tile& tile, BlockSums<A>* blocks) {
    for (int64_t r = 0; r < tile.rows; r++) {
      BlockSums<A>* row = blocks + r * blocks_of(p_);
      // What an earlier tile left there depends on which thread that was.
      if (!is_counted(r)) std::fill(row, row + blocks_of(p_), BlockSums<A>{});
      combine(r, row);
    }
    return batch_.write_losses(tile);
  }

  // Of as many rows of the tile.
  void write_gradients(int64_t rows, const BlockSums<A>* blocks, int64_t first, int64_t last) {
    if (!keeps_terms_) return rewrite_gradients(rows, first, last);
    simd::run_as<kLevel>([&] {
      for (int64_t r = 0; r < rows; r++) scale_terms(r, blocks + r * blocks_of(p_), first, last);
    });
  }

  void rewrite_gradients(int64_t rows, int64_t first, int64_t last) {
    simd::run_as<kLevel>([&] {
      for (int64_t r = 0; r < rows; r++) rewrite_gradient(r, first, last);
    });
  }

 private:
  static constexpr bool kAvx512 = kLevel == simd::Level::kAvx512 && std::is_same_v<A, float>;
  static constexpr bool kAvx2 = kLevel == simd::Level::kAvx2 && std::is_same_v<A, float>;
  static constexpr bool kTellsNormal = !kAvx512 && !kAvx2 && std::is_same_v<A, float>;
  static constexpr auto exp_of_double = [](double x) { return math::exp_nonpositive(x); };

  void rewrite_gradient(int64_t r, int64_t first, int64_t last) {
    if (factor_ == A(1))
      rewrite_gradient<false>(r, first, last);
    else
      rewrite_gradient<true>(r, first, last);
  }

  template <bool kScaled>
  void rewrite_gradient(int64_t r, int64_t first, int64_t last) {
    const A max = batch_.max[r], scale = factor_;
    const double factor = batch_.exp_factor[r];
    write_blocks<false>(r, first, last, [&](int64_t b, int64_t n) {
      const A* x = read_logits_and_slopes(r, b, n, buffer_);
      if constexpr (kAvx512 || kAvx2) {
        A* e = grad_direct_ ? grad_block(r, b) : buffer_;
        if constexpr (kAvx512)
          avx512::exp_differences<kScaled>(x, scale, max, n, e);
        else
          with_digits(digits_of_grad_, [&](auto digits) {
            avx2::exp_differences<digits, kScaled>(x, scale, max, n, e);
          });
        return weighted_exps(factor, [=](int64_t i) { return e[i]; });
      } else {
        return weighted_exps(factor, [=](int64_t i) {
          return math::exp_nonpositive((kScaled ? scale * x[i] : x[i]) - max);
        });
      }
    });
  }

  // Elements of the widest vector, in float.
  static constexpr int64_t kVector = 16;
  // A block's, no power of two apart, where buffers compete for the same lines of the cache.
  static constexpr int64_t kBuffer = kRowBlock + 3 * kVector;
  // Of short rows, as many are in work at a time as have this many elements together.
  static constexpr int64_t kGroupElements = 1024;

  bool is_counted(int64_t r) const { return batch_.is_counted(r); }

  BlockSums<A>* row_blocks(int64_t r) { return blocks_.data() + r * blocks_of(p_); }

  int64_t at(const Runs& run, const Operand& operand, int64_t r, int64_t c) const {
    return run.at(r) + c * operand.class_stride;
  }

  const A* read_logits(int64_t r, int64_t b, int64_t n, A* buffer) const {
    const A* x = read_unmapped(r, b, n, buffer);
    if (batch_.map.is_identity()) return x;
    map_logits(batch_.map, x, n, buffer);
    return buffer;
  }

  // Bent where the map bends, with the slopes that a gradient is then multiplied by. A factor alone
  // is left to the loop over the exps, where it costs next to nothing: logits of it times factor_.
  const A* read_logits_and_slopes(int64_t r, int64_t b, int64_t n, A* buffer) {
    const A* x = read_unmapped(r, b, n, buffer);
    if (!batch_.map.bends()) return x;
    map_logits(batch_.map, x, n, buffer, slopes_);
    return buffer;
  }

  // The same to where the terms will be; their slopes are kept as long.
  const A* read_logits_for_terms(int64_t r, int64_t b, int64_t n) {
    A* to = term_block(r, b);
    const A* x = read_unmapped(r, b, n, to);
    if (!batch_.map.bends()) return x;
    if (kept_slopes_.empty())
      map_logits(batch_.map, x, n, to);
    else
      map_logits(batch_.map, x, n, to, kept_slopes(r, b));
    return to;
  }

  A* kept_slopes(int64_t r, int64_t b) { return kept_slopes_.data() + r * p_.classes + b; }

  const A* read_unmapped(int64_t r, int64_t b, int64_t n, A* buffer) const {
    return read_span<A>(p_.input, at(input_, p_.input, r, b), p_.input.class_stride, n, buffer);
  }

  const A* read_probabilities(int64_t r, int64_t b, int64_t n) {
    if (!p_.probabilities) return nullptr;
    return read_span<A>(p_.target, at(target_, p_.target, r, b), p_.target.class_stride, n,
                        coefficients_);
  }

  // Where the terms of a block are kept, or the buffer where they are not.
  A* term_block(int64_t r, int64_t b) {
    if (!keeps_terms_) return buffer_ + r % group_ * p_.classes;
    return grad_direct_ ? grad_block(r, b) : terms_.data() + r * p_.classes + b;
  }

  A* grad_block(int64_t r, int64_t b) { return static_cast<A*>(p_.grad.data) + grad_.at(r) + b; }

  // Calls use(i, n) for the chunks of a block; n is a constant for all but the last.
  template <class Use>
  static void for_chunks(int64_t n, const Use& use) {
    int64_t i = 0;
    for (; i + kChunk <= n; i += kChunk) use(i, std::integral_constant<int64_t, kChunk>{});
    if (i < n) use(i, n - i);
  }

  // Finding a maximum ends in a chain of comparisons that the exps of the row must wait for. For
  // short rows the waiting would show, unless the maxima of a few rows come before their exps.
  void reduce_short_rows(const Tile& tile) {
    const A* x[kGroupElements];
    for (int64_t first = 0; first < batch_.size; first += group_) {
      const int64_t last = std::min(first + group_, batch_.size);
      // In place, bent logits come to be where they were.
      if (batch_.map.bends()) batch_.read_target_logits(tile, first, last);
      for (int64_t r = first; r < last; r++)
        if (is_counted(r)) x[r - first] = measure_block(r, 0, p_.classes, *row_blocks(r));
      if (!batch_.map.bends()) batch_.read_target_logits(tile, first, last);
      for (int64_t r = first; r < last; r++)
        if (is_counted(r)) sum_block(r, 0, p_.classes, x[r - first], *row_blocks(r));
    }
  }

  // Returns where the logits of the block are to be had as A, and finds its maximum.
  const A* measure_block(int64_t r, int64_t b, int64_t n, BlockSums<A>& sums) {
    const bool loads = kAvx2 && loads_extents_;
    A* loaded = term_block(r, b);
    const A* x = loads ? loaded : read_logits_for_terms(r, b, n);
    const bool turned = factor_ < A(0);
    Extent<A> all{kInfinity<A>, -kInfinity<A>};
    for_chunks(n, [&](int64_t i, auto count) {
      const Extent<A> extent =
          loads ? load_extent(r, b + i, count, loaded + i) : extent_of(x + i, count, turned);
      sums.extents[i / kChunk] = extent;
      all = {std::min(all.min, extent.min), std::max(all.max, extent.max)};
    });
    sums.begin(turned ? all.min : all.max, factor_);
    return x;
  }

  void sum_block(int64_t r, int64_t b, int64_t n, const A* x, BlockSums<A>& sums) {
    A* terms = term_block(r, b);
    const A base = sums.largest;
    if (batch_.spreads()) add_gaps(sums, x, base, b, n, read_probabilities(r, b, n));
    TermSums<double> all;
    for_chunks(n, [&](int64_t i, auto count) {
      const Extent<A> extent = sums.extents[i / kChunk];
      if (adjacent_) prefetch(p_.input, at(input_, p_.input, r, b) + i + kRowBlock, count);
      all.add(factor_ == A(1) ? keep_terms<false>(x + i, count, base, extent, terms + i)
                              : keep_terms<true>(x + i, count, base, extent, terms + i));
    });
    sums.add(all);
  }

  // Of half logits, on their way to where the terms will be; adjacent, and with no map that bends.
  Extent<A> load_extent(int64_t r, int64_t c, int64_t n, A* to) const {
    if constexpr (kAvx2) {
      return half::with_pointer(p_.input, at(input_, p_.input, r, c),
                                [=](const auto* x) { return half::load_extent(x, n, to); });
    } else {
      return {};
    }
  }

  // The smallest is found where it is asked for: by the exps, or by a factor below zero.
  template <class Count>
  static Extent<A> extent_of(const A* x, Count n, bool turned) {
    if (kTellsNormal || turned) return extent_of(x, n);
    if constexpr (kAvx2) return {A(0), avx2::max_of(x, n)};
    return {A(0), max_of(x, n)};
  }

  template <class Count>
  static Extent<A> extent_of(const A* x, Count n) {
    A min = kInfinity<A>, max = -kInfinity<A>;
#pragma omp simd reduction(min : min) reduction(max : max)
    for (int64_t i = 0; i < n; i++) {
      min = x[i] < min ? x[i] : min;
      max = x[i] > max ? x[i] : max;
    }
    return {min, max};
  }

  template <class Count>
  static A max_of(const A* x, Count n) {
    A max = -kInfinity<A>;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
    return max;
  }

  // exp(factor (x - base)) of a chunk, kept and summed.
  template <bool kScaled, class Count>
  TermSums<A> keep_terms(const A* x, Count n, A base, const Extent<A>& extent, A* terms) const {
    return extent.max == base || (kScaled && extent.min == base)
               ? keep_terms<kScaled, true>(x, n, base, extent, terms)
               : keep_terms<kScaled, false>(x, n, base, extent, terms);
  }

  // kHasBase tells that some x may be the base.
  template <bool kScaled, bool kHasBase, class Count>
  TermSums<A> keep_terms(const A* x, Count n, A base, const Extent<A>& extent, A* terms) const {
    if constexpr (kAvx512) {
      return avx512::keep_terms<kScaled, kHasBase>(x, factor_, n, base, terms);
    } else if constexpr (kAvx2) {
      TermSums<A> sums;
      with_digits(digits_, [&](auto digits) {
        sums = keeps_terms_
                   ? avx2::sum_terms<digits, kScaled, kHasBase, true>(x, factor_, n, base, terms)
                   : avx2::sum_terms<digits, kScaled, kHasBase, false>(x, factor_, n, base, terms);
      });
      return sums;
    } else {
      const A least = kScaled
                          ? std::max(factor_ * (base - extent.min), factor_ * (base - extent.max))
                          : base - extent.min;
      if (kTellsNormal && least < math::kNormalExp)
        return keep_terms<kScaled, kHasBase, kTellsNormal>(x, n, base, terms);
      return keep_terms<kScaled, kHasBase, false>(x, n, base, terms);
    }
  }

  template <bool kScaled, bool kHasBase, bool kIsNormal, class Count>
  TermSums<A> keep_terms(const A* x, Count n, A base, A* terms) const {
    const Difference<kScaled> difference{factor_, base};
    if constexpr (std::is_same_v<Count, int64_t>) {
      const int64_t whole = n < kVector ? n : n / kVector * kVector;
      TermSums<A> sums = keep_vectors<kHasBase, kIsNormal>(x, whole, difference, terms);
      if (whole < n) keep_tail(x + whole, n - whole, difference, terms + whole, sums);
      return sums;
    } else {
      return keep_vectors<kHasBase, kIsNormal>(x, n, difference, terms);
    }
  }

  // The difference comes before the factor: that of the base is 0, however the product is rounded.
  template <bool kScaled>
  struct Difference {
    A factor, base;
    A operator()(A x) const { return kScaled ? factor * (x - base) : x - base; }
  };

  template <bool kHasBase, bool kIsNormal, class Count, class Of>
  static TermSums<A> keep_vectors(const A* x, Count n, Of difference_of, A* terms) {
    A sum = A(0), ones = A(0);
#pragma omp simd reduction(+ : sum, ones)
    for (int64_t i = 0; i < n; i++) {
      const A difference = difference_of(x[i]);
      const A e = kIsNormal ? math::exp_normal(difference) : math::exp_nonpositive(difference);
      terms[i] = e;
      if (kHasBase) {
        sum += difference == A(0) ? A(0) : e;
        ones += difference == A(0) ? A(1) : A(0);
      } else {
        sum += e;
      }
    }
    return {sum, ones};
  }

  // The last few elements of a row: one exp of a whole vector that ends with them is cheaper than
  // some one by one. What comes before them in the vector may be terms already, and is left alone.
  template <class Of>
  static void keep_tail(const A* x, int64_t n, Of difference_of, A* terms, TermSums<A>& sums) {
    alignas(kLine) A tail[kVector];
    const A* vector = x + n - kVector;
#pragma omp simd
    for (int64_t i = 0; i < kVector; i++) tail[i] = math::exp_nonpositive(difference_of(vector[i]));
    for (int64_t i = 0; i < n; i++) {
      const bool is_base = difference_of(x[i]) == A(0);
      const A e = tail[kVector - n + i];
      terms[i] = e;
      sums.ones += is_base ? A(1) : A(0);
      sums.rest += is_base ? A(0) : e;
    }
  }

  void add_gaps(BlockSums<A>& sums, const A* x, A base, int64_t b, int64_t n, const A* q) {
    with_coefficients(p_, b, n, q, smoothing_, coefficients_, [&](auto coefficient) {
      for_chunks(n, [&](int64_t first, auto count) {
        TermSums<double> found =
            gaps_of(x + first, count, base, [&](int64_t i) { return coefficient(first + i); });
        found.gaps *= factor_;
        sums.add(found);
      });
    });
  }

  template <class Count, class Coefficient>
  static TermSums<double> gaps_of(const A* x, Count n, A base, const Coefficient& coefficient) {
    double gaps = 0.0, mass = 0.0;
#pragma omp simd reduction(+ : gaps, mass)
    for (int64_t i = 0; i < n; i++) {
      const A a = coefficient(i);
      gaps += coefficient_gap(a, base - x[i]);
      mass += a;
    }
    return {0.0, 0.0, gaps, mass};
  }

  // From the blocks of a row to the row.
  void combine(int64_t r, const BlockSums<A>* blocks) {
    RowSums<A, double> row = blocks[0];
    for (int64_t b = 1; b < blocks_of(p_); b++) row.merge(blocks[b], exp_of_double);
    row.close();
    batch_.set(r, row);
  }

  // exp_factor exp(x_c - M), and the same less a coefficient.
  template <class Exp>
  struct WeightedExps {
    A factor, factor_rest;
    Exp exp;

    A operator()(int64_t i) const { return factor * exp(i); }
    A less(A coefficient, int64_t i) const {
      const A e = exp(i);
      return factor_rest * e + (factor * e - coefficient);
    }
  };

  template <class Exp>
  WeightedExps<Exp> weighted_exps(double factor, const Exp& exp) const {
    return {static_cast<A>(factor), batch_.factor_rest(factor), exp};
  }

  // Writes scale (exp_factor exp(x_c - M) - a_c) block by block; term(b, n) gives the weighted exps
  // of the block at b.
  template <bool kHasTerms, class Term>
  void write_blocks(int64_t r, int64_t first, int64_t last, const Term& term) {
    if (!is_counted(r)) return write_uncounted(r, first, last, p_.grad, grad_);
    const A scale = static_cast<A>(batch_.scale[r]);
    for (int64_t b = first; b < last; b += kRowBlock) {
      const int64_t n = std::min(kRowBlock, last - b);
      const auto weighted_exp = term(b, n);
      A* out = grad_direct_ ? grad_block(r, b) : buffer_;
      if (!batch_.spreads()) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = weighted_exp(i);
      } else {
        // The difference comes before the scale, so that equal terms cancel.
        const A* q = read_probabilities(r, b, n);
        with_coefficients(p_, b, n, q, smoothing_, coefficients_, [&](auto coefficient) {
          if (weighted_exp.factor_rest != A(0)) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[i] = scale * weighted_exp.less(coefficient(i), i);
          } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) out[i] = scale * (weighted_exp(i) - coefficient(i));
          }
        });
      }
      if (batch_.map.bends()) {
        const A* slopes = kHasTerms ? kept_slopes(r, b) : slopes_;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] *= slopes[i];
      }
      if (!grad_direct_)
        store_span(out, n, p_.grad, at(grad_, p_.grad, r, b), p_.grad.class_stride);
    }
    const int64_t target = p_.probabilities ? -1 : batch_.target_class[r];
    if (target >= first && target < last)
      store_value(batch_.target_grad[r], p_.grad, at(grad_, p_.grad, r, target));
  }

  void scale_terms(int64_t r, const BlockSums<A>* blocks, int64_t first, int64_t last) {
    write_blocks<true>(r, first, last, [&](int64_t b, int64_t) {
      const double decay = blocks[b / kRowBlock].decay(batch_.max[r], exp_of_double);
      const A* e = term_block(r, b);
      return weighted_exps(batch_.exp_factor[r] * decay, [=](int64_t i) { return e[i]; });
    });
  }

  void write_uncounted(int64_t r, int64_t first, int64_t last, const Operand& to,
                       const Runs& runs) {
    std::fill(buffer_, buffer_ + std::min(kRowBlock, last - first), batch_.uncounted_value(r));
    for (int64_t b = first; b < last; b += kRowBlock)
      store_span(buffer_, std::min(kRowBlock, last - b), to, at(runs, to, r, b), to.class_stride);
  }

  double scale_gradient(int64_t r) {
    if (!is_counted(r)) return batch_.uncounted_value(r);
    const A scale = batch_.spreads() ? static_cast<A>(batch_.scale[r]) : A(1);
    const A max = batch_.max[r];
    const int64_t target = p_.probabilities ? -1 : batch_.target_class[r];
    double sum = 0.0;
    for (int64_t b = 0; b < p_.classes; b += kRowBlock) {
      const int64_t n = std::min(kRowBlock, p_.classes - b);
      const A* x = read_logits_and_slopes(r, b, n, buffer_);
      const auto exps = weighted_exps(batch_.exp_factor[r], [=, this](int64_t i) {
        return math::exp_nonpositive(factor_ * x[i] - max);
      });
      const auto differentiate = [&](auto coefficient) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) buffer_[i] = scale * exps.less(coefficient(i), i);
      };
      if (batch_.spreads())
        with_coefficients(p_, b, n, read_probabilities(r, b, n), smoothing_, coefficients_,
                          differentiate);
      else
        differentiate([](int64_t) { return A(0); });
      if (batch_.map.bends())
        for (int64_t i = 0; i < n; i++) buffer_[i] *= slopes_[i];
      const A* unmapped = read_unmapped(r, b, n, coefficients_);
      for (int64_t i = 0; i < n; i++)  // a masked logit has no gradient, and is infinite
        if (buffer_[i] != A(0) && b + i != target)
          sum += static_cast<double>(buffer_[i]) * unmapped[i];
      if (target >= b && target < b + n) sum += batch_.target_grad[r] * unmapped[target - b];
    }
    return sum;
  }

  void write_target_gradient(int64_t r, const Runs& target_grad) {
    if (!is_counted(r)) return write_uncounted(r, 0, p_.classes, p_.target_grad, target_grad);
    const A log_total = batch_.log_total(r);
    const A scale = static_cast<A>(batch_.scale[r]), max = batch_.max[r];
    const A* weight = static_cast<const A*>(p_.options.weight.data);
    for (int64_t b = 0; b < p_.classes; b += kRowBlock) {
      const int64_t n = std::min(kRowBlock, p_.classes - b);
      const A* x = read_logits(r, b, n, buffer_);
#pragma omp simd
      for (int64_t i = 0; i < n; i++)
        coefficients_[i] = scale * probability_grad(max - x[i], log_total,
                                                    weight ? weight[b + i] : A(1), smoothing_);
      store_span(coefficients_, n, p_.target_grad, at(target_grad, p_.target_grad, r, b),
                 p_.target_grad.class_stride);
    }
  }

  const Problem& p_;
  RowBatch<A> batch_;
  const Smoothing<A> smoothing_;
  const A factor_;  // of what is read for exps
  const Digits digits_, digits_of_grad_;
  const bool adjacent_, grad_direct_, keeps_terms_, loads_extents_;
  const int64_t group_;
  const Scratch<A> terms_, kept_slopes_, buffers_;
  A *const buffer_, *const coefficients_, *const slopes_;
  std::vector<BlockSums<A>> blocks_;
  Runs input_{}, target_{}, grad_{};
};

}  // namespace fused_ce::cpu
