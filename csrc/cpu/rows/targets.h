// The rows that count: their targets proved in range, and what the mean divides by added up.
//
// The scan runs before any kernel, so an out-of-range target is an error before a byte is written.
// Kernels test the range once more: a tensor may be changed by another thread meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../problem.h"
#include "../vector/span.h"
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

// What the rows that count add up to, of one tile or of all.
struct TargetScan {
  double weights = 0.0;         // of the samples, times those of their classes
  double sample_weights = 0.0;  // or the number of rows
  int64_t counted = 0;
  int64_t bad_index = 0;
  bool has_bad_index = false;

  void add(const TargetScan& scan) {
    weights += scan.weights;
    sample_weights += scan.sample_weights;
    counted += scan.counted;
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
  const auto rows = static_cast<double>(counted);
  if (bad == 0 || p.allows_bad_targets()) return {rows, rows, counted};
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = targets[i * stride];
    if (index != ignored && !in_range(p, index)) return {.bad_index = index, .has_bad_index = true};
  }
  return {};
}

// The same of the rows [row, row + n) of a tile, where samples or classes have weights. target(i)
// is that of row + i, and of a row of probabilities any class; class_weight(t) is not asked of what
// is no class.
template <class Target, class ClassWeight>
inline TargetScan add_rows(const Problem& p, const Tile& tile, int64_t row, int64_t n,
                           const Target& target, const ClassWeight& class_weight) {
  const Operand& samples = p.options.sample_weight;
  const Runs runs = tile.runs(samples);
  CompensatedSum weights, sample_weights;
  TargetScan scan;
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = target(i);
    const double sample = p.weighs_samples() ? load_value<double>(samples, runs.at(row + i)) : 1.0;
    if (sample == 0.0 || (index == p.options.ignore_index && !p.probabilities)) continue;
    const bool is_class = in_range(p, index);
    if (!is_class && !p.allows_bad_targets()) return {.bad_index = index, .has_bad_index = true};
    scan.counted++;
    sample_weights.add(sample);
    weights.add(is_class ? sample * class_weight(index) : sample);
  }
  scan.weights = weights.value(), scan.sample_weights = sample_weights.value();
  return scan;
}

// Of one tile, where `weighs` says so by the class weights, which are in the accumulation type: of
// indices alone, since a row of probabilities has no class of its own.
inline TargetScan scan_tile(const Problem& p, const Tile& tile, bool weighs) {
  const bool by_class = weighs && p.options.weight.data && !p.probabilities;
  const auto add = [&](int64_t row, int64_t n, const auto& target) {
    const auto with_weights = [&](const auto* weight) {
      return add_rows(p, tile, row, n, target, [=](int64_t t) -> double { return weight[t]; });
    };
    const void* weight = p.options.weight.data;
    if (!by_class) return add_rows(p, tile, row, n, target, [](int64_t) { return 1.0; });
    if (p.accumulates_in_double()) return with_weights(static_cast<const double*>(weight));
    return with_weights(static_cast<const float*>(weight));
  };
  if (p.probabilities) return add(0, tile.rows, [](int64_t) { return int64_t{0}; });
  const Runs runs = tile.runs(p.target);
  TargetScan all;
  with_index_pointer(p.target, 0, [&](const auto* first) {
    runs.for_each([&](int64_t row, int64_t offset) {
      const auto* targets = first + offset;
      if (by_class || p.weighs_samples())
        all.add(
            add(row, runs.length, [=](int64_t i) -> int64_t { return targets[i * runs.stride]; }));
      else
        all.add(with_stride(
            runs.stride, [&](auto stride) { return scan_run(p, targets, stride, runs.length); }));
    });
  });
  return all;
}

}  // namespace fused_ce::cpu
