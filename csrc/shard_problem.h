// A shard's part of a row as it travels, and what travels with it.
//
// A packet is [4, rows + 3] in the accumulation type: of each row the largest logit M, the sum of
// exp(x_c - M) over all classes but one of the largest, the sum of a_c (M - x_c) and that of a_c,
// each over the shard's own classes (formula.h). The last columns hold a ShardFacts, bit by bit.
#pragma once

#include <cstdint>

#include "problem.h"

namespace fused_ce {

constexpr int64_t kShardNumbers = 4, kShardColumns = 3;

// The first class of a shard, without classes, whose process has found something wrong before the
// exchange: the others wait for its packet, and then raise too.
constexpr int64_t kRefused = -1;

// What a shard says of itself and of what all shards must agree on.
struct ShardFacts {
  double target_weights = 0.0;  // of the samples whose target is in the shard, times those of these
  double class_weights = 0.0;   // of the shard's classes
  int64_t first_class = 0, end_class = 0;
  int64_t bad_target = 0;  // one that is no class; 0 is one, and means that there is none
  uint32_t options = 0, targets = 0;  // a hash of each
};

// An element of the packet's last columns is filled by its own size of the facts.
static_assert(sizeof(ShardFacts) <= kShardNumbers * kShardColumns * sizeof(float));

// One call as plain data, beside the Problem that has its logits and targets.
struct Shards {
  void* packets = nullptr;  // [count, 4, rows + 3]
  int64_t count = 1;
  bool has_weights = false;  // of the classes, none of which may be in this shard
  int64_t padding = 0;       // columns after the shard's classes, whose gradient is 0
  Operand max, rest, mass;   // [rows] in float64: of the whole vocabulary
};

}  // namespace fused_ce
