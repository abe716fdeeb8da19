// Multiplies every element of a tensor by a number on the device, for a gradient that is already in
// place. Where the number is 1 the kernel ends at once.
#include "regimes.h"
#include "row/row.cuh"

namespace fused_ce::cuda {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t offset_of(const Elements& e, int64_t index) {
  if (e.dims == 1) return index * e.strides[0];
  int64_t offset = 0;
  for (int d = e.dims - 1; d > 0; d--) {
    const int64_t next = divide(index, e.sizes[d]);
    offset += (index - next * e.sizes[d]) * e.strides[d];
    index = next;
  }
  return offset + index * e.strides[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ Elements e, int64_t count,
                 const __grid_constant__ Operand factor_operand) {
  using A = Accumulation<T>;
  const A factor = load_value<A>(factor_operand, 0);
  if (factor == A(1)) return;
  T* data = static_cast<T*>(e.data);
  const int64_t step = gridDim.x * int64_t{kThreads};
#pragma unroll 4
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += step) {
    T& element = data[offset_of(e, i)];
    const A x = widen(element);
    // A zero stays one, even times nan.
    if (x != A(0)) element = narrow<T>(x * factor);
  }
}

}  // namespace

void scale(const Elements& elements, const Operand& factor, const Device& device, Stream stream) {
  constexpr int64_t kThreadElements = 16, kBlocksPerMultiprocessor = 8;
  int64_t count = 1;
  for (int d = 0; d < elements.dims; d++) count *= elements.sizes[d];
  const int64_t wanted = ceil_divide(count, kThreads * kThreadElements);
  const int64_t most = device.multiprocessors * kBlocksPerMultiprocessor;
  const Grid grid{wanted < most ? wanted : most, kThreads};
  with_floating_type(elements.dtype, [&](auto zero) {
    launch_kernel(scale_kernel<decltype(zero)>, grid, stream, elements, count, factor);
  });
}

}  // namespace fused_ce::cuda
