// The threads that share a row: a warp, several of which make a block, or the whole block.
#pragma once

#include "../kernel_launch.h"
#include "../row/result.cuh"

namespace fused_ce::cuda {

class RowThreads {
 public:
  static constexpr int kBlock = 256;

  struct Shape {
    int threads;  // a warp or the block

    __host__ __device__ constexpr int rows() const { return kBlock / threads; }
  };

  template <class Sums>
  struct Shared {
    Sums parts[kBlock / kWarp];
    double losses[kBlock / kWarp];
  };

  int rank, slot;

  __device__ __forceinline__ explicit RowThreads(Shape shape)
      : rank(threadIdx.x % shape.threads), slot(threadIdx.x / shape.threads), shape_(shape) {}

  __device__ __forceinline__ int64_t first_row() const {
    return blockIdx.x * int64_t{shape_.rows()} + slot;
  }
  __device__ __forceinline__ int64_t row_step() const { return gridDim.x * int64_t{shape_.rows()}; }

  // Until all threads of the row are here.
  __device__ __forceinline__ void await() const {
    if (shape_.threads == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }

  // For all threads of the row.
  template <class Sums>
  __device__ __forceinline__ void add(Sums& sums, Shared<Sums>& shared) const {
    add_lanes<kWarp, true>(sums);
    if (shape_.threads == kWarp) {
      __syncwarp();  // what the warp has read may be overwritten now
      return;
    }
    __syncthreads();  // all are through with the row before
    if (rank % kWarp == 0) shared.parts[rank / kWarp] = sums;
    __syncthreads();
    add_parts<kBlock / kWarp, true>(shared.parts, sums);
  }

  // For all threads of the block: each row's first thread brings the sum of its losses.
  template <class Sums>
  __device__ __forceinline__ void finish(const Problem& p, const Result& result, double losses,
                                         Shared<Sums>& shared) const {
    if (shape_.rows() > 1) {
      if (rank == 0) shared.losses[slot] = losses;
      __syncthreads();
      for (int i = 1; i < shape_.rows() && threadIdx.x == 0; i++) losses += shared.losses[i];
    }
    if (threadIdx.x < kWarp) store_block(p, result, losses, blockIdx.x, gridDim.x);
  }

 private:
  Shape shape_;
};

// How many threads a row is worth.
inline RowThreads::Shape row_shape(const Problem& p) {
  constexpr int64_t kMaxWarpClasses = 1024;
  return {p.classes <= kMaxWarpClasses ? kWarp : RowThreads::kBlock};
}

// Blocks for all rows, or as many as keep the device busy. Even without rows it is one: there is a
// mean to be written.
inline int64_t row_blocks(const Problem& p, const Device& device) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t wanted = ceil_divide(p.rows, row_shape(p).rows());
  const int64_t most = device.multiprocessors * kBlocksPerMultiprocessor;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

}  // namespace fused_ce::cuda
