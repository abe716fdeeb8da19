// The rows that count: their targets proved in range, and what the mean divides by added up.
//
// The scan runs before any kernel, so an out-of-range target is an error before a byte is written.
// Kernels test the range once more: a tensor may be changed by another thread meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>

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

// What the rows that count add up to, of one tile or of all.
struct TargetScan {
  double weights = 0.0;         // of the samples, times those of their classes
  double sample_weights = 0.0;  // or the number of rows
  int64_t counted = 0;
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
  const auto rows = static_cast<double>(counted);
  if (bad == 0 || p.allows_bad_targets()) return {rows, rows, counted};
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = targets[i * stride];
    if (index != ignored && !in_range(p, index)) return {.bad_index = index, .has_bad_index = true};
  }
  return {};
}

// The same row by row, where samples or classes have weights. target(i) is that of row i, and of a
// row of probabilities any class; class_weight(t) is not asked of what is no class.
template <class Target, class ClassWeight>
inline TargetScan add_rows(const Problem& p, const Tile& tile, const Target& target,
                           const ClassWeight& class_weight) {
  constexpr int64_t kPart = 256;
  double samples[kPart];
  std::fill(samples, samples + kPart, 1.0);
  const Run run = tile.run(p.options.sample_weight);
  CompensatedSum weights, sample_weights;
  TargetScan scan;
  for (int64_t first = 0; first < tile.rows; first += kPart) {
    const int64_t n = std::min(kPart, tile.rows - first);
    if (p.weighs_samples())
      load_span(p.options.sample_weight, run.at(first), run.stride, n, samples);
    for (int64_t i = 0; i < n; i++) {
      const int64_t index = target(first + i);
      if (samples[i] == 0.0 || index == p.options.ignore_index) continue;
      const bool is_class = in_range(p, index);
      if (!is_class && !p.allows_bad_targets()) return {.bad_index = index, .has_bad_index = true};
      scan.counted++;
      sample_weights.add(samples[i]);
      weights.add(is_class ? samples[i] * class_weight(index) : samples[i]);
    }
  }
  scan.weights = weights.value(), scan.sample_weights = sample_weights.value();
  return scan;
}

// Of one tile, where `weighs` says so by the class weights, which are in the accumulation type.
inline TargetScan scan_tile(const Problem& p, const Tile& tile, bool weighs) {
  const auto one = [](int64_t) { return 1.0; };
  if (p.probabilities) {
    constexpr auto any = [](int64_t) { return int64_t{0}; };
    return add_rows(p, tile, any, one);
  }
  const Run run = tile.run(p.target);
  TargetScan scan;
  with_index_pointer(p.target, run.first, [&](const auto* targets) {
    const auto target = [=](int64_t i) -> int64_t { return targets[i * run.stride]; };
    const auto add = [&](const auto* weight) {
      return add_rows(p, tile, target, [=](int64_t t) -> double { return weight[t]; });
    };
    const void* weight = p.options.weight.data;
    if (!weighs || !weight)
      scan = p.weighs_samples() ? add_rows(p, tile, target, one)
                                : scan_run(p, targets, run.stride, tile.rows);
    else if (p.accumulates_in_double())
      scan = add(static_cast<const double*>(weight));
    else
      scan = add(static_cast<const float*>(weight));
  });
  return scan;
}

}  // namespace fused_ce::cpu
