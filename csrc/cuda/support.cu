// Asks the runtime for a kernel that is compiled for the same architectures as all the others.
//
// Compute capabilities tell less: which of them a build serves depends on TORCH_CUDA_ARCH_LIST and
// on the PTX it carries.
#include <cuda_runtime.h>

#include "support.h"

namespace fused_ce::cuda {

namespace {

__global__ void empty_kernel() {}

bool has_code_for_current_device() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, empty_kernel) == cudaSuccess;
}

}  // namespace

bool has_code_for(int64_t device_index) {
  int previous = 0;
  bool found = false;
  if (cudaGetDevice(&previous) == cudaSuccess &&
      cudaSetDevice(static_cast<int>(device_index)) == cudaSuccess) {
    found = has_code_for_current_device();
    cudaSetDevice(previous);
  }
  cudaGetLastError();  // a failed question is no error of whatever is asked next
  return found;
}

}  // namespace fused_ce::cuda
