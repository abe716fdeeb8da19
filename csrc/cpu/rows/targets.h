// Class-index targets: reading them, proving them in range, and adding up what the mean divides by.
//
// The scan runs before any kernel, so an out-of-range target is an error before a byte is written.
// Kernels test the range once more: a tensor may be changed by another thread meanwhile.
#pragma once

#include <cstdint>

#include "../../problem.h"
#include "../vector/sum.h"
#include "tiles.h"

namespace fused_ce::cpu {

// Calls f with a pointer of the target's integer type, at an offset in elements.
template <class F>
inline void with_index_pointer(const Operand& target, int64_t offset, const F& f) {
  switch (target.dtype) {
    case DType::kInt64:
      return f(static_cast<const int64_t*>(target.data) + offset);
    case DType::kInt32:
      return f(static_cast<const int32_t*>(target.data) + offset);
    case DType::kInt16:
      return f(static_cast<const int16_t*>(target.data) + offset);
    case DType::kUInt8:
      return f(static_cast<const uint8_t*>(target.data) + offset);
    default:
      return;
  }
}

inline bool in_range(const Problem& p, int64_t index) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(p.classes);
}

inline bool is_counted(const Problem& p, int64_t index) {
  return index != p.options.ignore_index && in_range(p, index);
}

// What one tile of targets adds up to.
struct TargetScan {
  double weights = 0.0;  // of the counted rows
  int64_t bad_index = 0;
  bool has_bad_index = false;
};

// How many rows count; a row that counts but is out of range is looked for only if there is one.
template <class Index>
inline TargetScan scan_run(const Problem& p, const Index* targets, int64_t stride, int64_t n) {
  const int64_t ignored = p.options.ignore_index, classes = p.classes;
  int64_t counted = 0, bad = 0;
#pragma omp simd reduction(+ : counted, bad)
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = targets[i * stride];
    counted += index != ignored ? 1 : 0;
    bad += index != ignored && (index < 0 || index >= classes) ? 1 : 0;
  }
  if (bad == 0) return {static_cast<double>(counted), 0, false};
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = targets[i * stride];
    if (index != ignored && !in_range(p, index)) return {0.0, index, true};
  }
  return {};
}

// The weight of the counted rows, all of them in range.
template <class A, class Index>
inline double add_weights(const Problem& p, const Index* targets, int64_t stride, int64_t n) {
  const A* weight = static_cast<const A*>(p.options.weight.data);
  CompensatedSum total;
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = targets[i * stride];
    if (is_counted(p, index)) total.add(weight[index]);
  }
  return total.value();
}

// Of one tile, where `weighs` says so by the class weights, which are in the accumulation type.
inline TargetScan scan_tile(const Problem& p, const Tile& tile, bool weighs) {
  const Run run = tile.run(p.target);
  TargetScan scan;
  with_index_pointer(p.target, run.first, [&](const auto* targets) {
    scan = scan_run(p, targets, run.stride, tile.rows);
    if (!weighs || scan.has_bad_index) return;
    scan.weights = p.accumulates_in_double()
                       ? add_weights<double>(p, targets, run.stride, tile.rows)
                       : add_weights<float>(p, targets, run.stride, tile.rows);
  });
  return scan;
}

}  // namespace fused_ce::cpu
