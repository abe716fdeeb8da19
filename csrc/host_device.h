// For functions that the kernels of every backend call: host and device code under nvcc.
#pragma once

#if defined(__CUDACC__)
#define FCE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FCE_HOST_DEVICE inline
#endif
