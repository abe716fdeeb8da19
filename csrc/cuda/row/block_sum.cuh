// Adds up one value from each block of a grid, a number or a few, always in the same order.
//
// Every block leaves its value in memory and takes a ticket. The one that draws the last ticket of
// its group of blocks adds up the group, the one that draws the last group's adds up the groups: no
// further launch, and never one block alone with a million numbers. Which block is last changes
// from run to run, the order of the additions does not.
#pragma once

#include "row_sums.cuh"

namespace fused_ce::cuda {

template <class Value = double>
struct BlockSum {
  Value* parts;        // [blocks]
  Value* group_parts;  // [groups]
  unsigned* tickets;   // [1 + groups], zero before the launch
};

// As other blocks have written it, whatever this one's cache holds.
__device__ __forceinline__ double load_part(const double* part) { return __ldcg(part); }

constexpr int64_t kGroupBlocks = 1024;

__host__ __device__ constexpr int64_t block_groups(int64_t blocks) {
  return (blocks + kGroupBlocks - 1) / kGroupBlocks;
}

// By one warp; only lane 0 needs to bring the part.
template <class Value>
__device__ __forceinline__ bool leave_part(const Value& part, Value* parts, int64_t index,
                                           unsigned* ticket, int64_t count) {
  bool is_last = false;
  if (threadIdx.x % kWarp == 0) {
    parts[index] = part;
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == count - 1;
  }
  return __shfl_sync(kAllLanes, is_last, 0);
}

template <class Value>
__device__ __forceinline__ Value add_parts_in_order(const Value* parts, int64_t count) {
  __threadfence();
  __syncwarp();  // what lane 0 may read, which drew the ticket, the others may from here on
  Value sum{};
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += load_part(parts + i);
  return sum_lanes<kWarp>(sum);
}

// For the first warp of each of `count` blocks. True for the warp that ends up with the total.
template <class Value>
__device__ __forceinline__ bool add_blocks(const BlockSum<Value>& b, const Value& part,
                                           int64_t index, int64_t count, Value& total) {
  const int64_t group = index / kGroupBlocks, first = group * kGroupBlocks;
  const int64_t size = count - first < kGroupBlocks ? count - first : kGroupBlocks;
  if (!leave_part(part, b.parts, index, b.tickets + 1 + group, size)) return false;
  total = add_parts_in_order(b.parts + first, size);
  if (count <= kGroupBlocks) return true;
  if (!leave_part(total, b.group_parts, group, b.tickets, block_groups(count))) return false;
  total = add_parts_in_order(b.group_parts, block_groups(count));
  return true;
}

}  // namespace fused_ce::cuda
