// The statistics of rows of any layout, and their gradient (statistics.h).
//
// A row has a warp or a block, whose threads read neighbouring classes together; where the rows lie
// side by side and their classes do not, it has a thread, and the threads of a warp read a class of
// neighbouring rows together. The logits are read once for the results, and once more for the
// gradient, which may be written over them.
#include <cstdint>

#include "../../statistics.h"
#include "../regimes.h"

namespace fused_ce::cuda {

namespace {

constexpr int kBlock = 256;

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

// What a thread, and then all threads of a row, found of it. A thread that has many classes adds
// up in double what a few of them come down to.
template <class A>
struct Found : StatisticsSums<A, double> {
  int64_t first = INT64_MAX;  // where the largest logit is; of several the first
};

// Over the lanes of a warp, every one of which gets the same bits.
template <class A>
__device__ __forceinline__ void add_lanes(Found<A>& found, double factor) {
  const A max = max_lanes<kWarp>(found.max);
  if (found.max != max) found.first = INT64_MAX;
  found.raise(max, factor, Exp{});
  found.rest = sum_lanes<kWarp>(found.rest);
  found.ones = sum_lanes<kWarp>(found.ones);
  found.gaps = sum_lanes<kWarp>(found.gaps);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, found.first, distance);
    found.first = other < found.first ? other : found.first;
  }
}

// For all threads of the row.
template <class A>
__device__ __forceinline__ void add_threads(Shape shape, Found<A>& found, double factor,
                                            Found<A>* shared) {
  if (shape.threads == 1) return;
  add_lanes(found, factor);
  if (shape.threads == kWarp) return;
  constexpr int kWarps = kBlock / kWarp;
  const int lane = threadIdx.x % kWarp;
  __syncthreads();  // all are through with the row before
  if (lane == 0) shared[threadIdx.x / kWarp] = found;
  __syncthreads();
  found = lane < kWarps ? shared[lane] : Found<A>{};
  add_lanes(found, factor);
}

// The logits of a row, through their map where they have one that bends.
template <class T, bool kBends>
class Logits {
 public:
  using A = Accumulation<T>;

  __device__ __forceinline__ Logits(const Problem& p, const Statistics& s, const RowIndex& row)
      : x_(static_cast<const T*>(p.input.data) + row.offset(p, p.input)),
        stride_(p.input.class_stride) {
    map_.factor = static_cast<A>(1.0 / s.temperature);
    map_.cap = static_cast<A>(p.options.softcap);
  }

  __device__ __forceinline__ A unmapped(int64_t c) const { return widen(x_[c * stride_]); }

  __device__ __forceinline__ typename LogitMap<A>::Mapped operator[](int64_t c) const {
    if constexpr (!kBends) return {unmapped(c), A(1)};
    return map_(unmapped(c), Tanh{});
  }

  // Of the differences of what is mapped.
  __device__ __forceinline__ A factor() const { return kBends ? A(1) : map_.factor; }

 private:
  const T* x_;
  int64_t stride_;
  LogitMap<A> map_;
};

template <class A>
__device__ __forceinline__ StatisticsRow<double> row_of(A max, A rest, double factor) {
  const double wide = rest;
  return {static_cast<double>(max), log1p_nonnegative(wide), inverse_of_total(wide), factor};
}

// One thread's part: the classes rank, rank + threads, ...
template <class L, class A>
__device__ __forceinline__ void add_row(const L& logits, int64_t rank, int64_t threads,
                                        int64_t classes, Found<A>& found) {
  constexpr int kUnroll = 4;  // logits on their way at a time
  const A factor = logits.factor();
  for (int64_t c = rank; c < classes; c += threads * kUnroll) {
    A x[kUnroll];
    A max = found.max;
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      x[i] = c + i * threads < classes ? logits[c + i * threads].logit : -kInfinity<A>;
      max = larger(max, x[i]);
    }
    if (max > found.max) {
#pragma unroll
      for (int i = kUnroll - 1; i >= 0; i--)
        if (x[i] == max) found.first = c + i * threads;
      found.raise(max, factor, Exp{});
    }
    const A base = base_of(max);
    EntropySums<A> few;
#pragma unroll
    for (int i = 0; i < kUnroll; i++) {
      const A difference = difference_of(x[i], base, factor);
      few.add_class(difference, exp_nonpositive(difference));
    }
    found.add(few);
  }
}

// A row with a nan or an infinite maximum: argmax takes the first nan for the largest, and
// logsumexp is the infinity where there is none.
template <bool kBends, class L, class A>
__device__ __noinline__ double inspect(const L& logits, int64_t classes, A max, int64_t& first) {
  for (int64_t c = 0; c < classes; c++) {
    const A x = logits.unmapped(c);
    if (x == x) continue;
    first = c;
    return kNan<double>;
  }
  if constexpr (!kBends) {
    first = 0;
    while (first < classes - 1 && logits.unmapped(first) != max) first++;
  }
  return max;
}

template <class T>
__device__ __forceinline__ void store_rows(T value, const Operand& to, const Problem& p,
                                           const RowIndex& row) {
  if (to.data) static_cast<T*>(to.data)[row.offset(p, to)] = value;
}

template <class T, bool kBends>
__global__ void __launch_bounds__(kBlock, 2)
    statistics_kernel(const __grid_constant__ Problem p, const __grid_constant__ Statistics s,
                      Shape shape) {
  using A = Accumulation<T>;
  auto* shared = static_cast<Found<A>*>(shared_memory());
  const int64_t rank = threadIdx.x % shape.threads, step = gridDim.x * int64_t{shape.rows()};
  const double factor = kBends ? 1.0 : 1.0 / s.temperature;
  for (int64_t r = blockIdx.x * int64_t{shape.rows()} + threadIdx.x / shape.threads; r < p.rows;
       r += step) {
    const RowIndex row(p, r);
    const int64_t target = p.target.data ? load_index(p.target, row.offset(p, p.target)) : 0;
    const bool is_ignored = p.target.data && target == p.options.ignore_index;
    Found<A> found;
    const Logits<T, kBends> logits(p, s, row);
    A target_logit = 0;
    if (!is_ignored) {
      if (p.target.data && rank == 0) {
        const int64_t t = target, n_classes = p.classes;
        assert(t >= 0 && t < n_classes);  // as PyTorch words it
        target_logit = logits[target].logit;
      }
      add_row(logits, rank, shape.threads, p.classes, found);
      add_threads<A>(shape, found, logits.factor(), shared);
    }
    if (rank != 0) continue;
    double log_prob = 0, entropy = 0, logsumexp = 0;
    int64_t first = -1;
    A max = 0, rest = 0;
    if (!is_ignored) {
      max = found.max, first = found.first;
      rest = static_cast<A>(closed_rest<double>(max, found.rest, found.ones));
      const StatisticsRow<double> of_row = row_of(max, rest, factor);
      log_prob = of_row.log_prob(factor * (static_cast<double>(target_logit) - max));
      entropy = of_row.entropy(found.gaps);
      logsumexp = of_row.logsumexp();
      if (!(logsumexp - logsumexp == 0.0))
        logsumexp = inspect<kBends>(logits, p.classes, max, first);
    }
    store_rows(static_cast<A>(log_prob), s.log_prob, p, row);
    store_rows(static_cast<A>(entropy), s.entropy, p, row);
    store_rows(static_cast<A>(logsumexp), s.logsumexp, p, row);
    store_rows(first, s.argmax, p, row);
    store_rows(max, p.row_max, p, row);
    store_rows(rest, p.row_rest, p, row);
  }
}

__device__ __forceinline__ double arrived(const Operand& grad, const Problem& p,
                                          const RowIndex& row) {
  return grad.data ? load_value<double>(grad, row.offset(p, grad)) : 0.0;
}

// A thread reads no logit but those whose places it writes.
template <class T, bool kBends>
__global__ void __launch_bounds__(kBlock, 2)
    statistics_backward_kernel(const __grid_constant__ Problem p,
                               const __grid_constant__ Statistics s, Shape shape) {
  using A = Accumulation<T>;
  const int64_t rank = threadIdx.x % shape.threads, step = gridDim.x * int64_t{shape.rows()};
  const double scale = 1.0 / s.temperature;
  for (int64_t r = blockIdx.x * int64_t{shape.rows()} + threadIdx.x / shape.threads; r < p.rows;
       r += step) {
    const RowIndex row(p, r);
    int64_t target = p.target.data ? load_index(p.target, row.offset(p, p.target)) : -1;
    T* grad = static_cast<T*>(p.grad.data) + row.offset(p, p.grad);
    if (p.target.data && target == p.options.ignore_index) {
      for (int64_t c = rank; c < p.classes; c += shape.threads) grad[c * p.grad.class_stride] = T{};
      continue;
    }
    if (p.target.data && rank == 0) {
      const int64_t t = target, n_classes = p.classes;
      assert(t >= 0 && t < n_classes);  // as PyTorch words it
    }
    if (!s.grad_log_prob.data) target = -1;
    const A max = load_max<A>(p, row), rest = load_rest<A>(p, row);
    const StatisticsRow<double> of_row = row_of(max, rest, 1.0);
    const StatisticsGrads<double> grads{arrived(s.grad_log_prob, p, row),
                                        arrived(s.grad_entropy, p, row),
                                        arrived(s.grad_logsumexp, p, row)};
    const double spread =
        s.grad_entropy.data
            ? load_value<double>(s.entropy, row.offset(p, s.entropy)) - of_row.log_total
            : 0.0;
    const StatisticsGradient<double> exact(grads, spread, of_row.inverse_total, scale);
    const StatisticsGradient<A> gradient(static_cast<A>(exact.constant),
                                         static_cast<A>(exact.by_difference));
    const Logits<T, kBends> logits(p, s, row);
#pragma unroll 2
    for (int64_t c = rank; c < p.classes; c += shape.threads) {
      const auto [x, slope] = logits[c];
      const A difference = difference_of(x, max, logits.factor());
      const A e = exp_nonpositive(difference);
      A value = gradient.at(difference, e);
      if (c == target)
        value = static_cast<A>(target_gradient<double>(grads, difference, e, rest, spread,
                                                       of_row.inverse_total, scale));
      grad[c * p.grad.class_stride] = narrow<T>(slope * value);
    }
  }
}

int64_t blocks_for(const Problem& p, const Device& device) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t wanted = ceil_divide(p.rows, shape_for(p).rows());
  const int64_t most = device.multiprocessors * kBlocksPerMultiprocessor;
  return wanted < most ? wanted : most;
}

}  // namespace

void find_statistics(const Problem& p, const Statistics& s, const Device& device, Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    const Grid grid{blocks_for(p, device), kBlock,
                    sizeof(Found<Accumulation<T>>) * (kBlock / kWarp)};
    const auto kernel =
        p.options.softcap > 0.0 ? statistics_kernel<T, true> : statistics_kernel<T, false>;
    launch_kernel(kernel, grid, stream, p, s, shape_for(p));
  });
}

void find_statistics_gradient(const Problem& p, const Statistics& s, const Device& device,
                              Stream stream) {
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    const Grid grid{blocks_for(p, device), kBlock};
    const auto kernel = p.options.softcap > 0.0 ? statistics_backward_kernel<T, true>
                                                : statistics_backward_kernel<T, false>;
    launch_kernel(kernel, grid, stream, p, s, shape_for(p));
  });
}

}  // namespace fused_ce::cuda
