// The divergence of rows that are taken one by one, in blocks that stay in the first-level cache.
//
// Each block is read once: the two maxima, then the sums relative to them, then they are brought
// together with what came before. What the gradient is made of, two numbers a class, is kept, one
// of them where the gradient will be; a second walk multiplies each block by what its maxima lie
// below the row's. So a class takes two exps in all. Which block a class is in depends on nothing
// but its number, and so do the bits of a row's results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "batch.h"
#include "kernels.h"
#include "terms.h"

namespace fused_ce::cpu {

// Compiled for one of the levels of simd.h.
template <class A, simd::Level kLevel, bool kReverse>
class DivergenceRowKernel {
 public:
  DivergenceRowKernel(const Problem& p, const Tiling& tiling, const Divergence& d)
      : p_(p),
        first_(kReverse ? p.input : p.target),
        second_(kReverse ? p.target : p.input),
        batch_(p, d),
        grad_direct_(is_direct<A>(p.grad, p.grad.class_stride)),
        keeps_(p.grad.data && p.classes <= kMaxKept),
        students_(keeps_ && !grad_direct_ ? p.classes * tiling.tile_rows : 0),
        others_(keeps_ ? p.classes * tiling.tile_rows : 0),
        buffers_(2 * kBuffer),
        buffer_(buffers_.data()),
        other_buffer_(buffer_ + kBuffer),
        blocks_(keeps_ ? blocks_of_row() * tiling.tile_rows : 0) {}

  // Returns the sum of the tile's losses; writes the statistics and the gradient where there is
  // memory for them.
  double forward(const Tile& tile) {
    begin(tile);
    for (int64_t r = 0; r < tile.rows; r++) {
      if (!batch_.is_counted(r))
        batch_.set(r, nothing());
      else if (keeps_)
        reduce<true>(r);
      else
        reduce<false>(r);
    }
    const double loss = batch_.finish(tile);
    if (p_.grad.data) write_gradients(tile, keeps_);
    return loss;
  }

  void backward(const Tile& tile) {
    begin(tile);
    batch_.read_statistics(tile);
    write_gradients(tile, false);
  }

 private:
  static constexpr int64_t kBlock = 2048;
  // Sums are taken in the logits' accumulation type over at most this many elements.
  static constexpr int64_t kChunk = 256;
  // Beyond this a kept row outgrows the cache, and other exps are cheaper than keeping the first.
  static constexpr int64_t kMaxKept = 262144;
  // No power of two apart, where buffers compete for the same lines of the cache.
  static constexpr int64_t kBuffer = kBlock + 48;
  static constexpr auto exp_of_double = [](double x) { return math::exp_nonpositive(x); };

  using Gradient =
      std::conditional_t<kReverse, ReverseDivergenceGradient<A>, DivergenceGradient<A>>;

  struct Maxima {
    A first, second;
  };

  struct Extent {
    A least = kInfinity<A>, largest = -kInfinity<A>;
  };

  // The classes of a block, or a part of them.
  struct Logits {
    const A *first, *second;

    Logits from(int64_t i) const { return {first + i, second + i}; }
  };

  // Where what the gradient is made of is kept: the student's exps, and the teacher's or, in
  // reverse, the gaps.
  struct Kept {
    A *student, *other;

    Kept from(int64_t i) const { return {student + i, other + i}; }
  };

  static DivergencePart<A, double> nothing() {
    DivergencePart<A, double> part;
    part.first_max = part.second_max = A(0);
    part.first_ones = part.second_ones = 1.0;
    return part;
  }

  void begin(const Tile& tile) {
    first_runs_ = tile.runs(first_);
    second_runs_ = tile.runs(second_);
    grad_ = tile.runs(p_.grad);
    batch_.begin(tile);
  }

  int64_t blocks_of_row() const { return (p_.classes + kBlock - 1) / kBlock; }

  int64_t block_size(int64_t b) const { return std::min(kBlock, p_.classes - b); }

  static int64_t at(const Runs& run, const Operand& operand, int64_t r, int64_t c) {
    return run.at(r) + c * operand.class_stride;
  }

  Logits read(int64_t r, int64_t b, int64_t n) const {
    return {read_span<A>(first_, at(first_runs_, first_, r, b), first_.class_stride, n, buffer_),
            read_span<A>(second_, at(second_runs_, second_, r, b), second_.class_stride, n,
                         other_buffer_)};
  }

  A* grad_block(int64_t r, int64_t b) {
    return static_cast<A*>(p_.grad.data) + at(grad_, p_.grad, r, b);
  }

  Kept kept(int64_t r, int64_t b) {
    const int64_t i = r * p_.classes + b;
    return {grad_direct_ ? grad_block(r, b) : students_.data() + i, others_.data() + i};
  }

  // Of the next block, while a chunk of this one is computed.
  void prefetch_next(int64_t r, int64_t b, int64_t i, int64_t count) const {
    if (first_.class_stride == 1) prefetch(first_, first_runs_.at(r) + b + i + kBlock, count);
    if (second_.class_stride == 1) prefetch(second_, second_runs_.at(r) + b + i + kBlock, count);
  }

  // Calls use(i, n) for the chunks of a block; n is a constant for all but the last.
  template <class Use>
  static void for_chunks(int64_t n, const Use& use) {
    int64_t i = 0;
    for (; i + kChunk <= n; i += kChunk) use(i, std::integral_constant<int64_t, kChunk>{});
    if (i < n) use(i, n - i);
  }

  template <bool kKeeps>
  void reduce(int64_t r) {
    DivergencePart<A, double> row;
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const int64_t n = block_size(b);
      const Logits logits = read(r, b, n);
      const DivergencePart<A, double> block =
          sum_block<kKeeps>(r, b, logits, n, kKeeps ? kept(r, b) : Kept{});
      if (kKeeps) blocks_[r * blocks_of_row() + b / kBlock] = {block.first_max, block.second_max};
      row.merge(block, static_cast<double>(batch_.factor), exp_of_double);
    }
    batch_.set(r, row);
  }

  template <bool kKeeps>
  DivergencePart<A, double> sum_block(int64_t r, int64_t b, Logits logits, int64_t n,
                                      Kept to) const {
    Extent first[kBlock / kChunk], second[kBlock / kChunk];
    DivergencePart<A, double> block;
    for_chunks(n, [&](int64_t i, auto count) {
      Extent& of_first = first[i / kChunk];
      Extent& of_second = second[i / kChunk];
      of_first = extent_of(logits.first + i, count);
      of_second = extent_of(logits.second + i, count);
      block.first_max = std::max(block.first_max, of_first.largest);
      block.second_max = std::max(block.second_max, of_second.largest);
    });
    const Maxima bases{base_of(block.first_max), base_of(block.second_max)};
    for_chunks(n, [&](int64_t i, auto count) {
      const Extent &of_first = first[i / kChunk], &of_second = second[i / kChunk];
      const A gap = std::max(bases.first - of_first.least, bases.second - of_second.least);
      prefetch_next(r, b, i, count);
      const bool has_base = of_first.largest == bases.first || of_second.largest == bases.second;
      with_normal_exps(gap, batch_.factor, [&](auto is_normal) {
        const Logits from = logits.from(i);
        const Kept kept = kKeeps ? to.from(i) : to;
        block.add(has_base ? sum_chunk<is_normal, true, kKeeps>(from, count, bases, kept)
                           : sum_chunk<is_normal, false, kKeeps>(from, count, bases, kept));
      });
    });
    return block;
  }

  template <class Count>
  static Extent extent_of(const A* x, Count n) {
    A min = kInfinity<A>, max = -kInfinity<A>;
#pragma omp simd reduction(min : min) reduction(max : max)
    for (int64_t i = 0; i < n; i++) {
      min = x[i] < min ? x[i] : min;
      max = x[i] > max ? x[i] : max;
    }
    return {min, max};
  }

  // kHasBase tells that some logit may be a base.
  template <bool kIsNormal, bool kHasBase, bool kKeeps, class Count>
  DivergenceSums<A> sum_chunk(Logits x, Count n, Maxima bases, Kept to) const {
    const A factor = batch_.factor;
    A first_rest = A(0), first_ones = A(0), second_rest = A(0), second_ones = A(0);
    A gaps = A(0), excess = A(0);
#pragma omp simd reduction(+ : first_rest, first_ones, second_rest, second_ones, gaps, excess)
    for (int64_t i = 0; i < n; i++) {
      const A first = factor * (x.first[i] - bases.first);
      const A second = factor * (x.second[i] - bases.second);
      const DivergenceTerm<A> term = divergence_term<kIsNormal>(first, second);
      if (kHasBase) {
        first_rest += first == A(0) ? A(0) : term.first;
        first_ones += first == A(0) ? A(1) : A(0);
        second_rest += second == A(0) ? A(0) : term.second;
        second_ones += second == A(0) ? A(1) : A(0);
      } else {
        first_rest += term.first;
        second_rest += term.second;
      }
      gaps += term.first * term.gap;
      excess += term.excess;
      if (kKeeps) {
        to.student[i] = kReverse ? term.first : term.second;
        to.other[i] = kReverse ? term.gap : term.first;
      }
    }
    return {first_rest, first_ones, second_rest, second_ones, gaps, excess};
  }

  void write_gradients(const Tile& tile, bool from_kept) {
    for (int64_t r = 0; r < tile.rows; r++) {
      if (!batch_.is_counted(r))
        write_nothing(r);
      else if (from_kept)
        scale_kept(r);
      else
        write_gradient(r);
    }
  }

  void write_nothing(int64_t r) {
    std::fill_n(buffer_, std::min(kBlock, p_.classes), A(0));
    for (int64_t b = 0; b < p_.classes; b += kBlock) store(buffer_, r, b, block_size(b));
  }

  void store(const A* from, int64_t r, int64_t b, int64_t n) const {
    store_span(from, n, p_.grad, at(grad_, p_.grad, r, b), p_.grad.class_stride);
  }

  auto gradient_of(int64_t r) const {
    if constexpr (kReverse)
      return batch_.reverse_gradient(r);
    else
      return batch_.gradient(r);
  }

  static Gradient narrowed(const ReverseDivergenceGradient<double>& g) {
    return {static_cast<A>(g.mean_gap), static_cast<A>(g.by_exp)};
  }
  static Gradient narrowed(const DivergenceGradient<double>& g) {
    return {static_cast<A>(g.by_student), static_cast<A>(g.by_teacher),
            static_cast<A>(g.of_largest)};
  }

  void scale_kept(int64_t r) {
    const auto gradient = gradient_of(r);
    const double factor = batch_.factor;
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const Maxima block = blocks_[r * blocks_of_row() + b / kBlock];
      const double first = distance_between<double>(block.first, batch_.first_max[r], factor);
      const double second = distance_between<double>(block.second, batch_.second_max[r], factor);
      const int64_t n = block_size(b);
      const Kept terms = kept(r, b);
      const Gradient lowered = narrowed(lower(gradient, first, second));
      scale_terms(n, terms, lowered);
      if (!grad_direct_) store(terms.student, r, b, n);
    }
  }

  static ReverseDivergenceGradient<double> lower(const ReverseDivergenceGradient<double>& gradient,
                                                 double student, double teacher) {
    return gradient.lowered(exp_of_double(student), teacher - student);
  }
  static DivergenceGradient<double> lower(const DivergenceGradient<double>& gradient,
                                          double teacher, double student) {
    return gradient.lowered(exp_of_double(student), exp_of_double(teacher));
  }

  static void scale_terms(int64_t n, Kept terms, const Gradient& gradient) {
    A* out = terms.student;
    const A* other = terms.other;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = gradient.at(out[i], other[i]);
  }

  void write_gradient(int64_t r) {
    const Gradient gradient = narrowed(gradient_of(r));
    for (int64_t b = 0; b < p_.classes; b += kBlock) {
      const int64_t n = block_size(b);
      const Logits logits = read(r, b, n);
      A* out = grad_direct_ ? grad_block(r, b) : buffer_;
      for_chunks(n, [&](int64_t i, auto count) {
        prefetch_next(r, b, i, count);
        write_chunk(r, gradient, logits.from(i), count, out + i);
      });
      if (!grad_direct_) store(out, r, b, n);
    }
  }

  template <class Count>
  void write_chunk(int64_t r, const Gradient& gradient, Logits x, Count n, A* out) const {
    const A factor = batch_.factor;
    const Maxima max{batch_.first_max[r], batch_.second_max[r]};
    const A gap = std::max(max.first - extent_of(x.first, n).least,
                           max.second - extent_of(x.second, n).least);
    with_normal_exps(gap, factor, [&](auto is_normal) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const A first = factor * (x.first[i] - max.first);
        const A second = factor * (x.second[i] - max.second);
        const A e = exp_of<is_normal>(first);
        if constexpr (kReverse)
          out[i] = gradient.at(e, gap_of(e, first, second));
        else
          out[i] = gradient.at(exp_of<is_normal>(second), e);
      }
    });
  }

  const Problem& p_;
  const Operand &first_, &second_;
  DivergenceBatch<A> batch_;
  const bool grad_direct_, keeps_;
  const Scratch<A> students_, others_, buffers_;
  A *const buffer_, *const other_buffer_;
  std::vector<Maxima> blocks_;
  Runs first_runs_{}, second_runs_{}, grad_{};
};

}  // namespace fused_ce::cpu
