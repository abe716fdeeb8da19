// The divergence of rows of any layout, and its gradient (divergence.h).
//
// A row has a warp or a block, whose threads read neighbouring classes together; where the rows lie
// side by side and their classes do not, it has a thread, and the threads of a warp read a class of
// neighbouring rows together. Both rows of logits are read once for the sums and, where there is a
// gradient, once more by the same threads, which find them in the cache; it may be written over the
// student's.
#include <cstdint>
#include <type_traits>

#include "../../divergence.h"
#include "../regimes.h"

namespace fused_ce::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / kWarp;

struct Shape {
  int threads;  // of a row: one, a warp or the block

  __host__ __device__ constexpr int rows() const { return kBlock / threads; }
};

Shape shape_for(const Problem& p) {
  constexpr int64_t kMaxWarpClasses = 1024;
  const int inner = p.row_dims - 1;
  if (p.input.class_stride != 1 && p.input.row_strides[inner] < p.input.class_stride) return {1};
  return {p.classes <= kMaxWarpClasses ? kWarp : kBlock};
}

// What a thread, and then all threads of a row, found of it. A thread that has many classes adds up
// in double what a few of them come down to.
template <class A>
using Part = DivergencePart<A, double>;

template <class A>
struct Shared {
  Part<A> parts[kWarps];
  double losses[kWarps];
};

// Over the lanes of a warp, every one of which gets the same bits.
template <class A>
__device__ __forceinline__ void add_lanes(Part<A>& part, double factor) {
  part.raise(max_lanes<kWarp>(part.first_max), max_lanes<kWarp>(part.second_max), factor, Exp{});
  part.first_rest = sum_lanes<kWarp>(part.first_rest);
  part.first_ones = sum_lanes<kWarp>(part.first_ones);
  part.second_rest = sum_lanes<kWarp>(part.second_rest);
  part.second_ones = sum_lanes<kWarp>(part.second_ones);
  part.gaps = sum_lanes<kWarp>(part.gaps);
  part.excess = sum_lanes<kWarp>(part.excess);
}

// For all threads of the row.
template <class A>
__device__ __forceinline__ void add_threads(Shape shape, Part<A>& part, double factor,
                                            Shared<A>& shared) {
  if (shape.threads == 1) return;
  add_lanes(part, factor);
  if (shape.threads == kWarp) {
    __syncwarp();  // what the warp has read may be overwritten now
    return;
  }
  const int lane = threadIdx.x % kWarp;
  __syncthreads();  // all are through with the row before
  if (lane == 0) shared.parts[threadIdx.x / kWarp] = part;
  __syncthreads();
  part = lane < kWarps ? shared.parts[lane] : Part<A>{};
  add_lanes(part, factor);
}

// The logits of a row, of the type T or, where the two rows have different ones, of any.
template <class T, class A>
class Logits {
 public:
  __device__ __forceinline__ Logits(const Problem& p, const Operand& operand, const RowIndex& row)
      : data_(static_cast<const T*>(operand.data) + row.offset(p, operand)),
        stride_(operand.class_stride) {}

  __device__ __forceinline__ A operator[](int64_t c) const { return widen(data_[c * stride_]); }

 private:
  const T* data_;
  int64_t stride_;
};

template <class A>
class Logits<void, A> {
 public:
  __device__ __forceinline__ Logits(const Problem& p, const Operand& operand, const RowIndex& row)
      : operand_(operand), first_(row.offset(p, operand)) {}

  __device__ __forceinline__ A operator[](int64_t c) const {
    return load_value<A>(operand_, first_ + c * operand_.class_stride);
  }

 private:
  const Operand& operand_;
  int64_t first_;
};

// Both rows of a problem, and where the gradient of one of them goes.
template <class T, class A, bool kReverse>
struct Rows {
  Logits<T, A> first, second;

  __device__ __forceinline__ Rows(const Problem& p, const RowIndex& row)
      : first(p, kReverse ? p.input : p.target, row),
        second(p, kReverse ? p.target : p.input, row) {}
};

template <class T, class A>
__device__ __forceinline__ void store_gradient(A value, const Problem& p, int64_t offset) {
  if constexpr (std::is_void_v<T>)
    store_value(value, p.grad, offset);
  else
    static_cast<T*>(p.grad.data)[offset] = narrow<T>(value);
}

// One thread's part: the classes rank, rank + threads, ...
template <class R, class A>
__device__ __forceinline__ void add_row(const R& rows, int64_t rank, int64_t threads,
                                        int64_t classes, A factor, double wide_factor,
                                        Part<A>& part) {
  constexpr int kUnroll = 4;  // logits of each row on their way at a time
  for (int64_t c = rank; c < classes; c += threads * kUnroll) {
    A first[kUnroll], second[kUnroll];
    A first_max = part.first_max, second_max = part.second_max;
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      const bool is_class = c + i * threads < classes;
      first[i] = is_class ? rows.first[c + i * threads] : -kInfinity<A>;
      second[i] = is_class ? rows.second[c + i * threads] : -kInfinity<A>;
      first_max = larger(first_max, first[i]);
      second_max = larger(second_max, second[i]);
    }
    part.raise(first_max, second_max, wide_factor, Exp{});
    const A first_base = base_of(first_max), second_base = base_of(second_max);
    DivergenceSums<A> few;
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      const A of_first = factor * (first[i] - first_base);
      const A of_second = factor * (second[i] - second_base);
      few.add_class(of_first, of_second,
                    {of_first, of_second, exp_nonpositive(of_first), exp_nonpositive(of_second)});
    }
    part.add(few);
  }
}

// A thread reads no logit of the student's but those whose places it writes.
template <class T, class A, bool kReverse>
__device__ __forceinline__ void write_gradient(const Problem& p, const Rows<T, A, kReverse>& rows,
                                               const RowIndex& row, const DivergenceRow& found,
                                               A first_max, A second_max, double mean_gap,
                                               double scale, A factor, int64_t rank,
                                               int64_t threads) {
  const auto exact = [&] {
    if constexpr (kReverse)
      return ReverseDivergenceGradient<double>::of(found, mean_gap, scale);
    else
      return DivergenceGradient<double>::of(found, scale);
  }();
  const int64_t offset = row.offset(p, p.grad);
#pragma unroll 2
  for (int64_t c = rank; c < p.classes; c += threads) {
    const A of_first = factor * (rows.first[c] - first_max);
    const A of_second = factor * (rows.second[c] - second_max);
    const A e = exp_nonpositive(of_first);
    A value;
    if constexpr (kReverse) {
      const ReverseDivergenceGradient<A> gradient{static_cast<A>(exact.mean_gap),
                                                  static_cast<A>(exact.by_exp)};
      value = gradient.at(e, e == A(0) ? A(0) : of_second - of_first);
    } else {
      const DivergenceGradient<A> gradient{static_cast<A>(exact.by_student),
                                           static_cast<A>(exact.by_teacher),
                                           static_cast<A>(exact.of_largest)};
      value = gradient.at(exp_nonpositive(of_second), e);
    }
    store_gradient<T>(value, p, offset + c * p.grad.class_stride);
  }
}

template <class T>
__device__ __forceinline__ void write_nothing(const Problem& p, const RowIndex& row, int64_t rank,
                                              int64_t threads) {
  const int64_t offset = row.offset(p, p.grad);
  for (int64_t c = rank; c < p.classes; c += threads)
    store_gradient<T>(0.0f, p, offset + c * p.grad.class_stride);
}

__device__ __forceinline__ void store_number(double value, const Operand& to, const Problem& p,
                                             const RowIndex& row) {
  if (to.data) store_value(value, to, row.offset(p, to));
}

template <class A>
__device__ __forceinline__ A factor_of(const Divergence& d) {
  return static_cast<A>(1.0 / d.temperature);
}

__device__ __forceinline__ DivergenceRow row_of(double first_rest, double second_rest) {
  return {first_rest, second_rest, inverse_of_total(first_rest), inverse_of_total(second_rest)};
}

// Of the row's weight, of what arrives and of what all rows share.
__device__ __forceinline__ double scale_of(const Problem& p, const Divergence& d,
                                           const RowIndex& row, double weight) {
  const Operand& arrived = p.grad_output;
  const double grad = arrived.data ? load_value<double>(arrived, row.offset(p, arrived)) : 1.0;
  return weight * grad / denominator(p) / d.temperature;
}

// By all threads of the block: what its rows' first threads bring, in the first warp.
template <class A>
__device__ __forceinline__ double add_losses(double losses, Shared<A>& shared) {
  losses = sum_lanes<kWarp>(losses);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared.losses[threadIdx.x / kWarp] = losses;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return sum_lanes<kWarp>(lane < kWarps ? shared.losses[lane] : 0.0);
}

template <class T, class A, bool kReverse>
__global__ void __launch_bounds__(kBlock, 2)
    divergence_kernel(const __grid_constant__ Problem p, const __grid_constant__ Divergence d,
                      const __grid_constant__ Result result, Shape shape) {
  auto& shared = *static_cast<Shared<A>*>(shared_memory());
  const int64_t rank = threadIdx.x % shape.threads, step = gridDim.x * int64_t{shape.rows()};
  const A factor = factor_of<A>(d);
  const double wide_factor = factor;
  double losses = 0;
  for (int64_t r = blockIdx.x * int64_t{shape.rows()} + threadIdx.x / shape.threads; r < p.rows;
       r += step) {
    const RowIndex row(p, r);
    const double weight = sample_weight(p, row);
    double loss = 0, first_max = 0, second_max = 0, mean_gap = 0;
    DivergenceRow found{};
    if (weight != 0.0) {
      const Rows<T, A, kReverse> rows(p, row);
      Part<A> part;
      add_row(rows, rank, shape.threads, p.classes, factor, wide_factor, part);
      add_threads(shape, part, wide_factor, shared);
      first_max = part.first_max, second_max = part.second_max;
      found = row_of(closed_rest<double>(first_max, part.first_rest, part.first_ones),
                     closed_rest<double>(second_max, part.second_rest, part.second_ones));
      mean_gap = part.gaps * found.first_inverse;
      if (rank == 0) {
        const auto log1p = [](double y, double) { return log1p_nonnegative(y); };
        loss = weight * divergence_of(found, part.gaps, part.excess, log1p);
      }
      if (p.grad.data)
        write_gradient(p, rows, row, found, part.first_max, part.second_max, mean_gap,
                       scale_of(p, d, row, weight), factor, rank, shape.threads);
    } else if (p.grad.data) {
      write_nothing<T>(p, row, rank, shape.threads);
    }
    if (rank != 0) continue;
    losses += loss;
    if (!p.reduces()) store_value(loss, p.loss, row.offset(p, p.loss));
    store_number(first_max, d.first_max, p, row);
    store_number(found.first_rest, d.first_rest, p, row);
    store_number(second_max, d.second_max, p, row);
    store_number(found.second_rest, d.second_rest, p, row);
    if (kReverse) store_number(mean_gap, d.mean_gap, p, row);
  }
  losses = add_losses(losses, shared);
  if (threadIdx.x < kWarp) store_block(p, result, losses, blockIdx.x, gridDim.x);
}

__device__ __forceinline__ double load_number(const Operand& from, const Problem& p,
                                              const RowIndex& row) {
  return load_value<double>(from, row.offset(p, from));
}

template <class T, class A, bool kReverse>
__global__ void __launch_bounds__(kBlock, 2)
    divergence_backward_kernel(const __grid_constant__ Problem p,
                               const __grid_constant__ Divergence d, When when, Shape shape) {
  if (when == When::kUnlessGradOutputIsOne && grad_output_is_one(p)) return;
  const int64_t rank = threadIdx.x % shape.threads, step = gridDim.x * int64_t{shape.rows()};
  const A factor = factor_of<A>(d);
  for (int64_t r = blockIdx.x * int64_t{shape.rows()} + threadIdx.x / shape.threads; r < p.rows;
       r += step) {
    const RowIndex row(p, r);
    const double weight = sample_weight(p, row);
    if (weight == 0.0) {
      write_nothing<T>(p, row, rank, shape.threads);
      continue;
    }
    const DivergenceRow found =
        row_of(load_number(d.first_rest, p, row), load_number(d.second_rest, p, row));
    const double mean_gap = kReverse ? load_number(d.mean_gap, p, row) : 0.0;
    write_gradient(p, Rows<T, A, kReverse>(p, row), row, found,
                   static_cast<A>(load_number(d.first_max, p, row)),
                   static_cast<A>(load_number(d.second_max, p, row)), mean_gap,
                   scale_of(p, d, row, weight), factor, rank, shape.threads);
  }
}

// Calls use(Types<T, A>, reverse) with the logits' type, or void where they have two, and the type
// to compute in.
template <class T, class A>
struct Types {
  using Logits = T;
  using Accumulation = A;
};

template <class Use>
void with_types(const Problem& p, const Divergence& d, const Use& use) {
  const auto with_direction = [&](auto types) {
    if (d.reverse)
      use(types, std::true_type{});
    else
      use(types, std::false_type{});
  };
  if (p.target.dtype != p.input.dtype)
    return d.in_double ? with_direction(Types<void, double>{})
                       : with_direction(Types<void, float>{});
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    with_direction(Types<T, Accumulation<T>>{});
  });
}

}  // namespace

int64_t divergence_blocks(const Problem& p, const Device& device) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t wanted = ceil_divide(p.rows, shape_for(p).rows());
  const int64_t most = device.multiprocessors * kBlocksPerMultiprocessor;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

void divergence_forward(const Problem& p, const Divergence& d, const Result& result,
                        const Device& device, Stream stream) {
  with_types(p, d, [&](auto types, auto reverse) {
    using T = typename decltype(types)::Logits;
    using A = typename decltype(types)::Accumulation;
    const Grid grid{divergence_blocks(p, device), kBlock, sizeof(Shared<A>)};
    launch_kernel(divergence_kernel<T, A, reverse>, grid, stream, p, d, result, shape_for(p));
  });
}

void divergence_backward(const Problem& p, const Divergence& d, const Device& device, When when,
                         Stream stream) {
  with_types(p, d, [&](auto types, auto reverse) {
    using T = typename decltype(types)::Logits;
    using A = typename decltype(types)::Accumulation;
    const Grid grid{divergence_blocks(p, device), kBlock};
    launch_kernel(divergence_backward_kernel<T, A, reverse>, grid, stream, p, d, when,
                  shape_for(p));
  });
}

}  // namespace fused_ce::cuda
