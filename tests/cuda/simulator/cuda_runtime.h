// What the kernels use of CUDA C++ and its runtime, for g++: found on the include path where nvcc
// would find CUDA's own.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>  // has a use of its own for the name __noinline__
#include <utility>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)

inline const simulator::Index& threadIdx = simulator::thread_index;
inline const simulator::Index& blockIdx = simulator::block_index;
inline const simulator::Index& blockDim = simulator::block_dim;
inline const simulator::Index& gridDim = simulator::grid_dim;

struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() { simulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffff) { simulator::warp_barrier(mask); }

namespace simulator {

template <class T>
T shuffle(T value, unsigned source, unsigned mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source, mask, sizeof(T) == 8 ? "wide shuffle" : "shuffle");
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return simulator::shuffle(value, static_cast<unsigned>(source), mask);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return simulator::shuffle(value, threadIdx.x ^ static_cast<unsigned>(distance), mask);
}

inline void __threadfence() { simulator::fence(); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  simulator::observe(address);
  return std::atomic_ref(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T __ldcg(const T* address) {
  return *simulator::aligned(address);
}

inline void __trap() { simulator::fail("the kernel ends itself"); }

inline void __cluster_barrier_arrive() { simulator::cluster_arrive(true); }
inline void __cluster_barrier_arrive_relaxed() { simulator::cluster_arrive(false); }
inline void __cluster_barrier_wait() { simulator::cluster_wait(); }
inline unsigned __clusterRelativeBlockRank() { return simulator::cluster_rank(); }
inline void* __cluster_map_shared_rank(const void* own, unsigned rank) {
  return simulator::peer_memory(own, rank);
}

using cudaStream_t = struct SimulatedStream*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  simulator::run({config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes},
                 [=] { kernel(arguments...); });
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t count, cudaStream_t) {
  simulator::count_launch();
  std::memset(to, value, count);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
