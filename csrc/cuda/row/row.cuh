// One row of a problem: where its elements lie, its target, and the formula applied to its sums.
#pragma once

#undef NDEBUG  // a target out of range is reported in every build
#include <cassert>

#include "../../formula.h"
#include "row_sums.cuh"

namespace fused_ce::cuda {

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  // Far fewer instructions, where it will do.
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Where a row's elements lie.
class RowIndex {
 public:
  __device__ __forceinline__ RowIndex(const Problem& p, int64_t row) : last_(p.row_dims - 1) {
    outer_ = last_ == 0 ? 0 : divide(row, p.row_sizes[last_]);
    inner_ = last_ == 0 ? row : row - outer_ * p.row_sizes[last_];
  }

  // Of the row's first element in an operand.
  __device__ __forceinline__ int64_t offset(const Problem& p, const Operand& operand) const {
    const int64_t offset = inner_ * operand.row_strides[last_];
    if (last_ > 1) return offset + outer_offset(p, operand);
    return offset + outer_ * operand.row_strides[0];
  }

 private:
  // Rarely needed, and then not worth a copy of its divisions wherever there is an operand.
  __device__ __noinline__ int64_t outer_offset(const Problem& p, const Operand& operand) const {
    int64_t offset = 0, rest = outer_;
    for (int d = last_ - 1; d > 0; d--) {
      const int64_t next = divide(rest, p.row_sizes[d]);
      offset += (rest - next * p.row_sizes[d]) * operand.row_strides[d];
      rest = next;
    }
    return offset + rest * operand.row_strides[0];
  }

  int last_;
  int64_t inner_, outer_;
};

// Its logits, read one by one, and mapped where `kMaps` says that there is a map.
template <class T, bool kMaps = false>
class RowLogits {
 public:
  using A = Accumulation<T>;

  __device__ __forceinline__ RowLogits(const Problem& p, const RowIndex& row)
      : x_(static_cast<const T*>(p.input.data) + row.offset(p, p.input)),
        stride_(p.input.class_stride) {
    if constexpr (!kMaps) return;
    const auto* scale = static_cast<const double*>(p.options.logit_scale.data);
    if (scale) map_.factor = static_cast<A>(*scale);
    map_.cap = static_cast<A>(p.options.softcap);
  }

  __device__ __forceinline__ A operator[](int64_t c) const { return mapped(c).logit; }

  __device__ __forceinline__ typename LogitMap<A>::Mapped mapped(int64_t c) const {
    const A x = unmapped(c);
    if constexpr (!kMaps) return {x, A(1)};
    return map_(x, Tanh{});
  }

  __device__ __forceinline__ A unmapped(int64_t c) const { return widen(x_[c * stride_]); }

  // What all gradients are multiplied by, besides a logit's own slope.
  __device__ __forceinline__ double factor() const { return kMaps ? map_.factor : 1.0; }

 private:
  const T* x_;
  int64_t stride_;
  LogitMap<A> map_;
};

// The same for problems with fewer rows than 2^31 in at most two dimensions: without calls, which
// would cost a kernel that fills its registers dearly.
class ShortRowIndex {
 public:
  __device__ __forceinline__ ShortRowIndex(const Problem& p, int64_t row)
      : last_(p.row_dims - 1), inner_(static_cast<unsigned>(row)), outer_(0) {
    if (last_ == 0) return;
    const unsigned size = static_cast<unsigned>(p.row_sizes[1]);
    outer_ = inner_ / size;
    inner_ -= outer_ * size;
  }

  __device__ __forceinline__ int64_t offset(const Problem&, const Operand& operand) const {
    return inner_ * operand.row_strides[last_] + outer_ * operand.row_strides[0];
  }

 private:
  int last_;
  unsigned inner_, outer_;
};

// The row's weight among the samples.
template <class Index>
__device__ __forceinline__ double sample_weight(const Problem& p, const Index& row) {
  const Operand& weight = p.options.sample_weight;
  return weight.data ? load_value<double>(weight, row.offset(p, weight)) : 1.0;
}

// For kernels whose rows are plain (Problem::has_plain_rows()): what they do not ask about takes no
// registers.
struct Plain {};

// The row's class. It is not counted where the class is the ignored one, the row has no weight, or,
// if that is allowed, the class is none.
struct RowTarget {
  int64_t index;
  bool is_counted;

  template <class Index>
  __device__ __forceinline__ RowTarget(Plain, const Problem& p, const Index& row)
      : index(p.probabilities ? -1 : load_index(p.target, row.offset(p, p.target))),
        is_counted(p.probabilities || index != p.options.ignore_index) {}

  template <class Index>
  __device__ __forceinline__ RowTarget(const Problem& p, const Index& row)
      : RowTarget(Plain{}, p, row) {
    if (p.weighs_samples()) is_counted &= sample_weight(p, row) != 0.0;
    if (p.allows_bad_targets() && !p.probabilities) is_counted &= in_range(p);
  }

  // What the loss and the gradient of a row are that is not counted: nan where the class is none.
  template <class Index>
  __device__ __forceinline__ float uncounted_value(const Problem& p, const Index& row) const {
    return is_no_class(p, row) ? kNan<float> : 0.0f;
  }

  template <class Index>
  __device__ __forceinline__ bool is_no_class(const Problem& p, const Index& row) const {
    return p.allows_bad_targets() && !p.probabilities && !in_range(p) &&
           index != p.options.ignore_index && sample_weight(p, row) != 0.0;
  }

  // Stops the kernel where the index is out of range. One thread of the row's calls this, before
  // it reads what lies there.
  __device__ __forceinline__ void check(const Problem& p) const {
    const int64_t t = index, n_classes = p.classes;
    assert(t >= 0 && t < n_classes);  // as PyTorch words it
  }

  __device__ __forceinline__ bool in_range(const Problem& p) const {
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(p.classes);
  }

  // For all threads of the row.
  template <class A>
  __device__ __forceinline__ A weight(const Problem& p) const {
    return p.options.weight.data && in_range(p)
               ? static_cast<const A*>(p.options.weight.data)[index]
               : A(1);
  }
};

// What the losses or the gradients of all rows are divided by.
__device__ __forceinline__ double denominator(const Problem& p) {
  if (p.totals) return p.totals->denominator;
  const Values& given = p.options.denominator;
  return given.data ? static_cast<const double*>(given.data)[0] : p.known.denominator;
}

__device__ __forceinline__ double z_denominator(const Problem& p) {
  if (p.totals) return p.totals->z_denominator;
  const Values& given = p.options.denominator;
  return given.data ? static_cast<const double*>(given.data)[given.count - 1]
                    : p.known.z_denominator;
}

// What the whole problem shares: the same in all threads.
struct Constants : Common<double> {
  double inverse_denominator;

  __device__ __forceinline__ Constants(Plain, const Problem& p) : Common<double>(p) {
    // Loaded only now: sooner, and kernels spill on compute capability 10.0.
    weight_sum = p.totals ? p.totals->weight_sum : p.known.weight_sum;
    inverse_denominator = 1.0 / denominator(p);
  }

  __device__ __forceinline__ explicit Constants(const Problem& p) : Constants(Plain{}, p) {
    if (p.options.z_loss > 0.0) set_totals(p, {weight_sum, denominator(p), z_denominator(p)});
  }
};

template <bool kPlain>
__device__ __forceinline__ Constants constants(const Problem& p) {
  if constexpr (kPlain)
    return Constants(Plain{}, p);
  else
    return Constants(p);
}

template <bool kPlain, class Index>
__device__ __forceinline__ RowTarget row_target(const Problem& p, const Index& row) {
  if constexpr (kPlain)
    return RowTarget(Plain{}, p, row);
  else
    return RowTarget(p, row);
}

// The coefficient of every class where the target is an index and no class has a weight.
__device__ __forceinline__ float unweighted_coefficient(const Problem& p) {
  return static_cast<float>(Smoothing<double>(p.options.label_smoothing, p.classes).smooth);
}

template <class A>
__device__ __forceinline__ A class_weight(const Problem& p, int64_t c) {
  return p.options.weight.data ? static_cast<const A*>(p.options.weight.data)[c] : A(1);
}

// The coefficient of a class where the target is an index.
template <class A>
__device__ __forceinline__ A class_coefficient(const Problem& p, int64_t c, const Constants& k) {
  return index_coefficient(class_weight<A>(p, c), Smoothing<A>(k.smoothing));
}

// A row whose largest logit is infinite has no softmax.
template <class A>
__device__ __forceinline__ A defined_rest(A rest, A max) {
  return max - max == A(0) ? rest : kNan<A>;
}

__device__ __forceinline__ float log1p_nonnegative(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_nonnegative(double x) { return log1p(x); }

// 1 / (1 + rest). What was summed in float is not too large for one, and from a float it takes
// fewer instructions, with no call among them, than to divide.
__device__ __forceinline__ double inverse_of_total(float rest) {
  const double total = 1.0 + static_cast<double>(rest);
  const double inverse = reciprocal_approximate(static_cast<float>(total));
  return fma(inverse, fma(-total, inverse, 1.0), inverse);
}
__device__ __forceinline__ double inverse_of_total(double rest) { return 1.0 / (1.0 + rest); }

// A row whose target is an index, in the type A; `rest` is a defined one.
template <class A, class X>
__device__ __forceinline__ IndexRow<A> index_row(X max, X rest, A inverse_total, X target_logit,
                                                 X target_weight, const Constants& k) {
  return {static_cast<A>(max),
          static_cast<A>(rest),
          static_cast<A>(log1p_nonnegative(rest)),
          inverse_total,
          static_cast<A>(max - target_logit),
          static_cast<A>(exp_nonpositive(target_logit - max)),
          static_cast<A>(target_weight),
          Common<A>(k)};
}

template <class X>
__device__ __forceinline__ Row<double> probability_row(X max, X rest, double mass,
                                                       const Constants& k) {
  return {max, rest, log1p_nonnegative(rest), inverse_of_total(rest), mass, k};
}

// A function of its own: it would take the registers of a kernel that seldom calls it.
__device__ __noinline__ inline double power(double base, double exponent) {
  return pow(base, exponent);
}

struct Pow {
  template <class A>
  __device__ __forceinline__ A operator()(A base, A exponent) const {
    return static_cast<A>(power(base, exponent));
  }
};

// What goes into every element of a gradient is computed in double and rounded once: the rounding
// of a float for each step would add up to more than an ulp.
template <bool kMayFocus = false, class A>
__device__ __forceinline__ IndexRow<double> exact_index_row(A max, A rest, A target_logit,
                                                            A target_weight, const Constants& k) {
  const A defined = defined_rest(rest, max);
  auto row = index_row(max, defined, inverse_of_total(defined), target_logit, target_weight, k);
  if (kMayFocus && k.focal_gamma > 0.0) row.focus(Pow{});
  return row;
}

// Where the target is probabilities, its logit and weight are not looked at, and the loss may be
// wider than the logits. A power makes more of the roundings before it: a focal loss is in double.
template <bool kProbabilities = false, bool kMayFocus = false, class Sums, class A>
__device__ __forceinline__ auto unweighted_loss(const Sums& sums, A target_logit, A target_weight,
                                                const Constants& k) {
  const A rest = defined_rest(sums.rest, sums.max);
  if constexpr (kProbabilities) {
    return probability_row(sums.max, rest, sums.mass, k).loss(sums.gaps);
  } else {
    if (kMayFocus && k.focal_gamma > 0.0)
      return static_cast<A>(
          exact_index_row<true>(sums.max, sums.rest, target_logit, target_weight, k)
              .loss(sums.gaps));
    return index_row(sums.max, rest, A(0), target_logit, target_weight, k).loss(sums.gaps);
  }
}

template <bool kProbabilities = false, bool kMayFocus = false, class Index, class Sums, class A>
__device__ __forceinline__ auto row_loss(const Problem& p, const Index& index, const Sums& sums,
                                         A target_logit, A target_weight, const Constants& k) {
  auto loss = unweighted_loss<kProbabilities, kMayFocus>(sums, target_logit, target_weight, k);
  if (p.weighs_samples()) loss *= sample_weight(p, index);
  return loss;
}

// The gradient of a row, from what is the same for all its classes.
template <class A>
struct RowGradient {
  A base;             // what logits are relative to
  A factor;           // of exp(x_c - base); where classes do not spread, with the scale in it
  A scale;            // grad_output / denominator
  A factor_rest = 0;  // what the factor loses as an A, where coefficients are probabilities

  // For a class other than the target.
  __device__ __forceinline__ A of(A x) const { return factor * exp_nonpositive(x - base); }

  // The difference comes before the scale, so that equal terms cancel.
  __device__ __forceinline__ A of(A x, A coefficient) const {
    return scale * fma(factor, exp_nonpositive(x - base), -coefficient);
  }

  __device__ __forceinline__ A of_probability(A x, A coefficient) const {
    const A e = exp_nonpositive(x - base);
    return scale * fma(factor_rest, e, fma(factor, e, -coefficient));
  }
};

// Which class is the target makes a difference to a focal loss alone.
template <bool kMayFocus = false, class A>
__device__ __forceinline__ RowGradient<A> index_gradient(A max, A rest, A target_logit,
                                                         A target_weight, double scale,
                                                         const Constants& k) {
  const A logit = kMayFocus ? target_logit : max;
  const double factor = exact_index_row<kMayFocus>(max, rest, logit, target_weight, k).exp_factor();
  return {base_of(max), static_cast<A>(k.spreads() ? factor : scale * factor),
          static_cast<A>(scale)};
}

// For the target itself.
template <bool kMayFocus = false, class A>
__device__ __forceinline__ A target_gradient(A max, A rest, A target_logit, A target_weight,
                                             double scale, const Constants& k) {
  const auto row = exact_index_row<kMayFocus>(max, rest, target_logit, target_weight, k);
  return static_cast<A>(scale * row.target_grad());
}

template <class A>
__device__ __forceinline__ RowGradient<A> probability_gradient(A max, A rest, double mass,
                                                               double scale, const Constants& k) {
  const auto row = probability_row(max, defined_rest(rest, max), mass, k);
  const double factor = row.exp_factor();
  return {base_of(max), static_cast<A>(factor), static_cast<A>(scale),
          k.z_loss != 0.0 ? static_cast<A>(lost_as<A>(factor)) : A(0)};
}

template <bool kProbabilities, class A>
__device__ __forceinline__ RowGradient<A> row_gradient(A max, A rest, double mass, A target_logit,
                                                       A target_weight, double scale,
                                                       const Constants& k) {
  if constexpr (kProbabilities) return probability_gradient(max, rest, mass, scale, k);
  return index_gradient<true>(max, rest, target_logit, target_weight, scale, k);
}

// What the row's gradient is multiplied by.
template <class Index>
__device__ __forceinline__ double unweighted_scale(const Problem& p, const Index& row,
                                                   const Constants& k) {
  if (!p.grad_output.data) return k.inverse_denominator;
  return load_value<double>(p.grad_output, row.offset(p, p.grad_output)) * k.inverse_denominator;
}

template <class Index>
__device__ __forceinline__ double row_scale(const Problem& p, const Index& row,
                                            const Constants& k) {
  return sample_weight(p, row) * unweighted_scale(p, row, k);
}

// By one thread of the row's.
template <class Index, class Sums>
__device__ __forceinline__ void store_statistics(const Problem& p, const Index& row,
                                                 const Sums& sums) {
  if (!p.row_max.data) return;
  using A = decltype(sums.max);
  static_cast<A*>(p.row_max.data)[row.offset(p, p.row_max)] = sums.max;
  static_cast<A*>(p.row_rest.data)[row.offset(p, p.row_rest)] = sums.rest;
  if (!p.row_mass.data) return;
  const A mass = static_cast<A>(sums.mass);
  static_cast<A*>(p.row_mass.data)[row.offset(p, p.row_mass)] = mass;
  static_cast<A*>(p.row_mass_low.data)[row.offset(p, p.row_mass_low)] =
      mass - mass == A(0) ? static_cast<A>(sums.mass - mass) : A(0);
}

template <class A, class Index>
__device__ __forceinline__ A load_max(const Problem& p, const Index& row) {
  return static_cast<const A*>(p.row_max.data)[row.offset(p, p.row_max)];
}

template <class A, class Index>
__device__ __forceinline__ A load_rest(const Problem& p, const Index& row) {
  return static_cast<const A*>(p.row_rest.data)[row.offset(p, p.row_rest)];
}

// Of a row whose target is probabilities.
template <class A, class Index>
__device__ __forceinline__ double load_mass(const Problem& p, const Index& row) {
  const double mass = static_cast<const A*>(p.row_mass.data)[row.offset(p, p.row_mass)];
  return mass + static_cast<const A*>(p.row_mass_low.data)[row.offset(p, p.row_mass_low)];
}

// Whether a gradient that is there already is the one asked for.
__device__ __forceinline__ bool grad_output_is_one(const Problem& p) {
  return load_value<double>(p.grad_output, 0) == 1.0;
}

}  // namespace fused_ce::cuda
