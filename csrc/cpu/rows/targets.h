// Class-index targets: reading them, proving them in range, and adding up what the mean divides by.
//
// The scan runs before any kernel, so an out-of-range target is an error before a byte is written.
// Kernels test the range once more: a tensor may be changed by another thread meanwhile.
#pragma once

#include <cstdint>
#include <type_traits>

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

  void add(const TargetScan& scan) {
    weights += scan.weights;
    if (scan.has_bad_index && !has_bad_index) bad_index = scan.bad_index;
    has_bad_index |= scan.has_bad_index;
  }
};

// Calls use(stride), with a constant where it is 1: only then do loops over small integers become
// loads of whole vectors.
template <class Use>
inline auto with_stride(int64_t stride, const Use& use) {
  return stride == 1 ? use(std::integral_constant<int64_t, 1>{}) : use(stride);
}

// How many rows count; a row that counts but is out of range is looked for only if there is one.
template <class Index, class Stride>
inline TargetScan scan_run(const Problem& p, const Index* targets, Stride stride, int64_t n) {
  const int64_t ignored = p.options.ignore_index, classes = p.classes;
  int64_t counted = 0, bad = 0;
#pragma omp simd reduction(+ : counted, bad)
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = targets[i * stride];
    // Without a branch, which would keep the loop from being vectorised.
    const int64_t counts = index != ignored;
    counted += counts;
    bad += counts & (static_cast<int64_t>(index < 0) | static_cast<int64_t>(index >= classes));
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
  const Runs runs = tile.runs(p.target);
  TargetScan all;
  with_index_pointer(p.target, 0, [&](const auto* first) {
    runs.for_each([&](int64_t, int64_t offset) {
      const auto* targets = first + offset;
      TargetScan scan = with_stride(
          runs.stride, [&](auto stride) { return scan_run(p, targets, stride, runs.length); });
      if (weighs && !scan.has_bad_index)
        scan.weights = p.accumulates_in_double()
                           ? add_weights<double>(p, targets, runs.stride, runs.length)
                           : add_weights<float>(p, targets, runs.stride, runs.length);
      all.add(scan);
    });
  });
  return all;
}

}  // namespace fused_ce::cpu
