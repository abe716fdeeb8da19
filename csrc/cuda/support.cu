// Asks the runtime for a kernel that is compiled for the same architectures as all the others.
//
// Compute capabilities tell less: which of them a build serves depends on TORCH_CUDA_ARCH_LIST and
// on the PTX it carries.
#include <cuda_runtime.h>

#include "support.h"

namespace fused_ce::cuda {

namespace {

__global__ void empty_kernel() {}

}  // namespace

bool has_code_for_current_device() {
  cudaFuncAttributes attributes;
  const bool has_code = cudaFuncGetAttributes(&attributes, empty_kernel) == cudaSuccess;
  cudaGetLastError();  // a failed question is no error of whatever is asked next
  return has_code;
}

}  // namespace fused_ce::cuda
