// Asks the runtime for a kernel that is compiled for the same architectures as all the others.
//
// The device's compute capability tells less: which code it runs depends on TORCH_CUDA_ARCH_LIST
// and on the PTX that the build carries, and PTX for an older architecture lacks what came after
// it.
#include <cuda_runtime.h>

#include "architecture.h"

namespace fused_ce::cuda {

namespace {

__global__ void empty_kernel() {}

}  // namespace

int code_for_current_device() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, empty_kernel) == cudaSuccess) return attributes.ptxVersion;
  cudaGetLastError();  // a failed question is no error of whatever is asked next
  return 0;
}

}  // namespace fused_ce::cuda
