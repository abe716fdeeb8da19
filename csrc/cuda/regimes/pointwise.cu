// The losses of single elements, and their gradients (pointwise.h), for operands of any layout.
//
// Dense tensors of one type that begin on a 16-byte boundary are taken 16 bytes at a time; others
// element by element, each thread finding where its own lies. Either way the input and the target
// are read once and the gradient is written once, which may be over the input. Functions are the
// exact ones: the memory takes longer than they do.
#include <cmath>
#include <cstdint>

#include "../../pointwise.h"
#include "../regimes.h"

namespace fused_ce::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / kWarp;

template <class A>
struct OnePlus {
  A inverse, log;
};

template <class A>
struct DeviceMath;

template <>
struct DeviceMath<float> {
  __device__ __forceinline__ float abs(float x) const { return fabsf(x); }
  __device__ __forceinline__ float exp_nonpositive(float x) const { return expf(x); }
  __device__ __forceinline__ float exp(float x) const { return expf(x); }
  __device__ __forceinline__ OnePlus<float> one_plus(float y) const {
    return {1.0f / (1.0f + y), log1pf(y)};
  }
  __device__ __forceinline__ float log_or_zero(float x) const { return x == 0.0f ? x : logf(x); }
  __device__ __forceinline__ float pow_nonnegative(float base, float exponent) const {
    return powf(base, exponent);
  }
};

template <>
struct DeviceMath<double> {
  __device__ __forceinline__ double abs(double x) const { return fabs(x); }
  __device__ __forceinline__ double exp_nonpositive(double x) const { return ::exp(x); }
  __device__ __forceinline__ double exp(double x) const { return ::exp(x); }
  __device__ __forceinline__ OnePlus<double> one_plus(double y) const {
    return {1.0 / (1.0 + y), log1p(y)};
  }
  __device__ __forceinline__ double log_or_zero(double x) const { return x == 0.0 ? x : log(x); }
  __device__ __forceinline__ double pow_nonnegative(double base, double exponent) const {
    return pow(base, exponent);
  }
};

// What a thread does with an element, besides reading it and writing its gradient.
template <class A, class Loss>
class ElementWork {
 public:
  __device__ __forceinline__ ElementWork(const Problem& p, const Pointwise& s, const Loss& loss)
      : p_(p), s_(s), loss_(loss), scale_(scale_of(p, s, [](const Operand& operand) {
          return load_value<double>(operand, 0);
        })) {}

  // Returns the gradient.
  template <class Index>
  __device__ __forceinline__ A take(A x, A y, const Index& at) {
    const A pos_weight = Loss::kWeighsTarget ? value_of(s_.pos_weight, at) : A(1);
    Element<A> element = loss_(x, y, pos_weight, DeviceMath<A>{});
    if (s_.weight.data) {
      const A weight = value_of(s_.weight, at);
      element.loss *= weight;
      element.slope *= weight;
    }
    if (p_.reduces()) {
      sum += element.loss;
      return scale_ * element.slope;
    }
    if (p_.loss.data) store_value(element.loss, p_.loss, at.offset(p_, p_.loss));
    return p_.grad_output.data ? element.slope * value_of(p_.grad_output, at) : element.slope;
  }

  double sum = 0;

 private:
  template <class Index>
  __device__ __forceinline__ A value_of(const Operand& operand, const Index& at) const {
    return load_value<A>(operand, at.offset(p_, operand));
  }

  const Problem& p_;
  const Pointwise& s_;
  const Loss& loss_;
  const Scale<A> scale_;
};

// Of an element of operands that have one dimension.
struct LinearIndex {
  int64_t element;

  __device__ __forceinline__ int64_t offset(const Problem&, const Operand& operand) const {
    return element * operand.row_strides[0];
  }
};

// For all threads of the block.
__device__ __forceinline__ void finish(const Problem& p, const Pointwise& s, const BlockSum<>& sums,
                                       double sum) {
  auto* shared = static_cast<double*>(shared_memory());
  sum = sum_lanes<kWarp>(sum);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  sum = sum_lanes<kWarp>(threadIdx.x < kWarps ? shared[threadIdx.x] : 0.0);
  double total;
  if (!add_blocks(sums, sum, blockIdx.x, gridDim.x, total)) return;
  if (threadIdx.x == 0) store_value(total / s.denominator, p.loss, 0);
}

template <class T, class Loss, bool kDense>
__global__ void __launch_bounds__(kBlock, 2)
    pointwise_kernel(const __grid_constant__ Problem p, const __grid_constant__ Pointwise s,
                     const __grid_constant__ Loss loss, const __grid_constant__ BlockSum<> sums,
                     When when) {
  using A = Accumulation<T>;
  if (when == When::kUnlessGradOutputIsOne && grad_output_is_one(p)) return;
  ElementWork<A, Loss> elements(p, s, loss);
  const int64_t first = blockIdx.x * int64_t{kBlock} + threadIdx.x;
  const int64_t step = gridDim.x * int64_t{kBlock};
  int64_t single = 0;  // where the elements begin that are taken one by one
  if constexpr (kDense) {
    constexpr int kPack = Pack<T>::kSize;
    const auto *x = static_cast<const T*>(p.input.data), *y = static_cast<const T*>(p.target.data);
    auto* grad = static_cast<T*>(p.grad.data);
    single = p.rows / kPack * kPack;
    for (int64_t i = first * kPack; i < single; i += step * kPack) {
      const Pack<T> inputs = Pack<T>::load(x + i), targets = Pack<T>::load(y + i);
      float grads[kPack];
#pragma unroll
      for (int j = 0; j < kPack; j++)
        grads[j] = elements.take(inputs[j], targets[j], LinearIndex{i + j});
      if (!grad) continue;
      Pack<T> pack;
      pack.set(grads);
      pack.store(grad + i);
    }
  }
  for (int64_t i = single + first; i < p.rows; i += step) {
    const RowIndex at(p, i);
    const A x = widen(static_cast<const T*>(p.input.data)[at.offset(p, p.input)]);
    const A y = load_value<A>(p.target, at.offset(p, p.target));
    const A value = elements.take(x, y, at);
    if (p.grad.data) static_cast<T*>(p.grad.data)[at.offset(p, p.grad)] = narrow<T>(value);
  }
  if (p.loss.data && p.reduces()) finish(p, s, sums, elements.sum);
}

bool is_dense(const Problem& p) {
  const auto has_packs = [&](const Operand& operand) {
    return operand.dtype == p.input.dtype && operand.row_strides[0] == 1 &&
           reinterpret_cast<uintptr_t>(operand.data) % sizeof(Bits128) == 0;
  };
  return p.row_dims == 1 && p.input.dtype != DType::kFloat64 && has_packs(p.input) &&
         has_packs(p.target) && (!p.grad.data || has_packs(p.grad));
}

// Even without elements it is one: there is a mean to be written.
int64_t blocks_for(const Problem& p, const Device& device, When when) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t per_thread = is_dense(p) ? int64_t{sizeof(Bits128)} / size_of(p.input.dtype) : 1;
  const int64_t wanted = ceil_divide(p.rows, kBlock * per_thread);
  const int64_t per_multiprocessor =
      when == When::kAlways ? kBlocksPerMultiprocessor : int64_t{kResidentBlocks};
  const int64_t most = device.multiprocessors * per_multiprocessor;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

// Device memory for the sum of the losses.
struct PointwiseWorkspace {
  BlockSum<> sums;
  size_t ticket_bytes, bytes;

  PointwiseWorkspace(int64_t blocks, void* memory) {
    const int64_t groups = block_groups(blocks);
    auto* parts = static_cast<double*>(memory);
    sums = {parts, parts + blocks, reinterpret_cast<unsigned*>(parts + blocks + groups)};
    ticket_bytes = static_cast<size_t>(1 + groups) * sizeof(unsigned);
    bytes = static_cast<size_t>(blocks + groups) * sizeof(double) + ticket_bytes;
  }
};

}  // namespace

size_t pointwise_workspace_bytes(const Problem& p, const Device& device) {
  return PointwiseWorkspace(blocks_for(p, device, When::kAlways), nullptr).bytes;
}

void evaluate_pointwise(const Problem& p, const Pointwise& s, const Device& device, When when,
                        void* memory, Stream stream) {
  const Grid grid{blocks_for(p, device, when), kBlock, kWarps * sizeof(double)};
  const PointwiseWorkspace workspace(grid.blocks, memory);
  if (p.loss.data && p.reduces())
    cudaMemsetAsync(workspace.sums.tickets, 0, workspace.ticket_bytes, stream);
  with_logits_type(p, [&](auto zero) {
    using T = decltype(zero);
    with_pointwise_loss<Accumulation<T>>(s, [&](const auto& loss) {
      using Loss = std::decay_t<decltype(loss)>;
      if constexpr (!std::is_same_v<T, double>)
        if (is_dense(p))
          return launch_kernel(pointwise_kernel<T, Loss, true>, grid, stream, p, s, loss,
                               workspace.sums, when);
      launch_kernel(pointwise_kernel<T, Loss, false>, grid, stream, p, s, loss, workspace.sums,
                    when);
    });
  });
}

}  // namespace fused_ce::cuda
