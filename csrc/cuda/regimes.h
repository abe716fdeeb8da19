// The kernels by the kind of problem that each is for; kernels.cu picks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernel_launch.h"
#include "row/result.cuh"

namespace fused_ce::cuda {

template <class Use>
void with_floating_type(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kFloat64:
      return use(double{});
    case DType::kFloat32:
      return use(float{});
    case DType::kBFloat16:
      return use(BFloat16{});
    default:
      return use(Float16{});
  }
}

template <class Use>
void with_logits_type(const Problem& p, const Use& use) {
  with_floating_type(p.input.dtype, use);
}

// Of the types that have packs.
template <class Use>
void with_vector_type(const Problem& p, const Use& use) {
  switch (p.input.dtype) {
    case DType::kFloat32:
      return use(float{});
    case DType::kBFloat16:
      return use(BFloat16{});
    default:
      return use(Float16{});
  }
}

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a launch

// The blocks of a backward launch. Where they may find that there is nothing to do they are no more
// than the device holds, so that they find it quickly.
constexpr int kResidentBlocks = 4;  // of a multiprocessor
inline int64_t backward_blocks(int64_t wanted, const Device& device, When when) {
  const int64_t resident = int64_t{device.multiprocessors} * kResidentBlocks;
  const int64_t most = when == When::kAlways ? kMaxBlocks : resident;
  return wanted < most ? wanted : most;
}

// The blocks of a forward launch, each of which leaves one number in Result::losses.
int64_t general_blocks(const Problem& p, const Device& device);
void general_forward(const Problem& p, const Result& result, const Device& device, Stream stream);
void general_backward(const Problem& p, const Device& device, When when, Stream stream);
void target_backward(const Problem& p, const Device& device, Stream stream);
void scale_backward(const Problem& p, const BlockSum<>& sums, const Device& device, Stream stream);

bool strided_serves(const Problem& p, const Device& device);
int64_t strided_blocks(const Problem& p, const Device& device);
void strided_forward(const Problem& p, const Result& result, const Device& device, Stream stream);
void strided_backward(const Problem& p, const Device& device, When when, Stream stream);

bool tile_rows_serves(const Problem& p, const Device& device);
int64_t tile_rows_blocks(const Problem& p, const Device& device);
void tile_rows_forward(const Problem& p, const Result& result, const Device& device, Stream stream);
void tile_rows_backward(const Problem& p, const Device& device, When when, Stream stream);

bool on_chip_serves(const Problem& p, const Device& device);
int64_t on_chip_blocks(const Problem& p, const Device& device);
void on_chip_forward(const Problem& p, const Result& result, const Device& device, Stream stream);
void on_chip_float32(const Problem& p, const Result& result, Stream stream);
void on_chip_bfloat16(const Problem& p, const Result& result, Stream stream);
void on_chip_float16(const Problem& p, const Result& result, Stream stream);

bool streaming_serves(const Problem& p, const Device& device);
int64_t streaming_blocks(const Problem& p, const Device& device);
void streaming_forward(const Problem& p, const Result& result, const Device& device, Stream stream);

bool elementwise_backward_serves(const Problem& p, const Device& device);
void elementwise_backward(const Problem& p, const Device& device, When when, Stream stream);

// As general_blocks().
int64_t divergence_blocks(const Problem& p, const Device& device);
void divergence_forward(const Problem& p, const Divergence& d, const Result& result,
                        const Device& device, Stream stream);
void divergence_backward(const Problem& p, const Divergence& d, const Device& device, When when,
                         Stream stream);

// A shard's part of its packet's rows; and with the packets of all, the rows' losses.
void shard_forward(const Problem& p, const Device& device, Stream stream);
int64_t shard_merge_blocks(const Problem& p, const Device& device);
void shard_merge(const Problem& p, const Shards& s, const Result& result, const Device& device,
                 Stream stream);
void shard_backward(const Problem& p, const Shards& s, const Device& device, Stream stream);
void shard_target_backward(const Problem& p, const Shards& s, const Device& device, Stream stream);

// What a shard finds in the targets of some rows, and in its class weights (ShardFacts).
struct ShardScan {
  double target_weights = 0, class_weights = 0;
  uint64_t targets = 0;
  int64_t bad_target = 0;  // any of them

  __device__ __forceinline__ ShardScan& operator+=(const ShardScan& more) {
    target_weights += more.target_weights, class_weights += more.class_weights;
    targets += more.targets;
    if (bad_target == 0) bad_target = more.bad_target;
    return *this;
  }
};

template <int kLanes>
__device__ __forceinline__ ShardScan sum_lanes(ShardScan x) {
  x.target_weights = sum_lanes<kLanes>(x.target_weights);
  x.class_weights = sum_lanes<kLanes>(x.class_weights);
  x.targets = sum_lanes<kLanes>(x.targets);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, x.bad_target, distance);
    if (x.bad_target == 0) x.bad_target = other;
  }
  return x;
}

__device__ __forceinline__ ShardScan load_part(const ShardScan* part) {
  return {__ldcg(&part->target_weights), __ldcg(&part->class_weights), __ldcg(&part->targets),
          __ldcg(&part->bad_target)};
}

// The last columns of a shard's packet. Where there are several blocks, they need tickets that are
// zero.
int64_t shard_facts_blocks(const Problem& p);
void store_shard_facts(const Problem& p, const Shards& s, const BlockSum<ShardScan>& sums,
                       Stream stream);

// What the rows that count add up to.
struct CountedRows {
  double weights = 0;  // of the samples, times those of their classes
  double samples = 0;  // of the samples alone
  double rows = 0;

  __device__ __forceinline__ CountedRows& operator+=(const CountedRows& more) {
    weights += more.weights, samples += more.samples, rows += more.rows;
    return *this;
  }
};

template <int kLanes>
__device__ __forceinline__ CountedRows sum_lanes(const CountedRows& x) {
  return {sum_lanes<kLanes>(x.weights), sum_lanes<kLanes>(x.samples), sum_lanes<kLanes>(x.rows)};
}

__device__ __forceinline__ CountedRows load_part(const CountedRows* part) {
  return {__ldcg(&part->weights), __ldcg(&part->samples), __ldcg(&part->rows)};
}

// Of shards whose packets have come together, or of none.
struct ShardPackets {
  void* data = nullptr;
  int64_t count = 0;
  bool has_weights = false;
};

// Sets the tickets to zero where there is one block, and finds the totals.
struct TotalsWork {
  Totals* totals;                 // to be found
  Totals* kept_totals;            // the same for the backward, where there is one
  BlockSum<CountedRows> counted;  // with tickets of its own
  unsigned* tickets;              // of the launch that follows
  int64_t ticket_count;
  // Where there are any, the problem is one of all their classes, and has no weights of these.
  ShardPackets packets{};
};
bool needs_totals(const Problem& p);
int64_t totals_blocks(const Problem& p);
void find_totals(const Problem& p, const TotalsWork& work, Stream stream);

}  // namespace fused_ce::cuda
