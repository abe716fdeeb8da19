// Chooses the kernel and the tiles for a problem, and runs it on the widest vectors there are.
#include "kernels.h"

#include <algorithm>

#include "lane_kernel.h"
#include "row_kernel.h"
#include "shared_rows.h"
#include "simd.h"
#include "sum.h"

namespace fused_ce::cpu {

namespace {

// Up to here a row of adjacent classes is faster as a lane among others than on its own.
constexpr int64_t kMaxLaneClasses = 64;
// Up to here gathering a scattered row into a tile of its neighbours is.
constexpr int64_t kMaxGatheredClasses = 1024;

// Lanes count the largest logits of a row in the accumulation type, exactly up to here.
constexpr int64_t kMaxCountedClasses = int64_t{1} << 24;

// With fewer rows side by side, each is better taken on its own however far apart its classes lie.
constexpr int64_t kMinLaneRows = 4;

bool prefers_lanes(const Problem& p) {
  if (p.classes > kMaxCountedClasses) return false;
  if (p.classes <= kMaxLaneClasses) return true;
  if (p.input.class_stride == 1 || inner_rows(p) < kMinLaneRows) return false;
  const int64_t lane_stride = p.input.row_strides[p.row_dims - 1];
  if (lane_stride == 1) return true;
  return p.input.class_stride > lane_stride && p.classes <= kMaxGatheredClasses;
}

int64_t lanes_per_tile(const Problem& p) {
  // Rows side by side are walked through twice, the second time in the first-level cache; rows that
  // are turned over are walked through in a copy, and long runs of memory count for more.
  constexpr int64_t kBesideElements = 2560, kTurnedElements = 32768;
  constexpr int64_t kMinLanes = 128;  // fewer would read too little of each class at a time
  const bool beside = p.input.row_strides[p.row_dims - 1] == 1;
  const int64_t elements = beside ? kBesideElements : kTurnedElements;
  const int64_t lanes = elements / std::max<int64_t>(1, p.classes) / 16 * 16;
  return std::clamp(lanes, kMinLanes, kMaxBatch);
}

// Calls f with a value of the type that the problem's arithmetic is done in.
template <class F>
void with_accumulation_type(const Problem& p, const F& f) {
  if (p.accumulates_in_double())
    f(double{});
  else
    f(float{});
}

// How many rows count; a row that counts but is out of range is looked for only if there is one.
template <class Index>
TargetScan scan_run(const Problem& p, const Index* targets, int64_t stride, int64_t n) {
  const int64_t ignored = p.ignore_index, classes = p.classes;
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
double add_weights(const Problem& p, const Index* targets, int64_t stride, int64_t n) {
  const A* weight = static_cast<const A*>(p.weight);
  CompensatedSum total;
  for (int64_t i = 0; i < n; i++) {
    const int64_t index = targets[i * stride];
    if (is_counted(p, index)) total.add(weight[index]);
  }
  return total.value();
}

TargetScan scan_tile(const Problem& p, const Tile& tile) {
  const Run run = tile.run(p.target);
  TargetScan scan;
  with_index_pointer(p.target, run.first, [&](const auto* targets) {
    scan = scan_run(p, targets, run.stride, tile.rows);
    if (!p.weight || scan.has_bad_index) return;
    with_accumulation_type(p, [&](auto zero) {
      scan.weights = add_weights<decltype(zero)>(p, targets, run.stride, tile.rows);
    });
  });
  return scan;
}

template <class Kernel>
void run_forward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
                 double* tile_losses, TargetScan* scans) {
  Kernel kernel(p, tiling);
  for (int64_t t = begin; t < end; t++) {
    const Tile tile(p, tiling, t);
    if (scans) scans[t] = scan_tile(p, tile);
    tile_losses[t] = kernel.forward(tile);
  }
}

template <class Kernel>
void run_backward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  Kernel kernel(p, tiling);
  for (int64_t t = begin; t < end; t++) kernel.backward(Tile(p, tiling, t));
}

template <class A>
void run_backward_target(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  RowKernel<A> kernel(p, tiling);
  for (int64_t t = begin; t < end; t++) kernel.backward_target(Tile(p, tiling, t));
}

}  // namespace

Tiling scan_tiling(const Problem& p) {
  constexpr int64_t kScanRows = 4096;
  return make_tiling(p, kScanRows, 4);
}

Tiling row_tiling(const Problem& p) {
  constexpr int64_t kTileElements = 4096;
  const int64_t rows = prefers_lanes(p)
                           ? lanes_per_tile(p)
                           : std::min(kMaxBatch, kTileElements / std::max<int64_t>(1, p.classes));
  return make_tiling(p, rows, p.classes);
}

void scan_targets(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
                  TargetScan* scans) {
  simd::run([&] {
    for (int64_t t = begin; t < end; t++) scans[t] = scan_tile(p, Tile(p, tiling, t));
  });
}

double sum_weights(const Problem& p) {
  if (!p.weight) return static_cast<double>(p.classes);
  CompensatedSum sum;
  with_accumulation_type(p, [&](auto zero) {
    const auto* weight = static_cast<const decltype(zero)*>(p.weight);
    for (int64_t c = 0; c < p.classes; c++) sum.add(weight[c]);
  });
  return sum.value();
}

void forward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
             double* tile_losses, TargetScan* scans) {
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    simd::run([&] {
      if (prefers_lanes(p))
        run_forward<LaneKernel<A>>(p, tiling, begin, end, tile_losses, scans);
      else
        run_forward<RowKernel<A>>(p, tiling, begin, end, tile_losses, scans);
    });
  });
}

void backward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    simd::run([&] {
      if (prefers_lanes(p))
        run_backward<LaneKernel<A>>(p, tiling, begin, end);
      else
        run_backward<RowKernel<A>>(p, tiling, begin, end);
    });
  });
}

// Shorter rows are not worth it, and may keep their terms in memory that belongs to one thread.
bool has_long_rows(const Problem& p) { return p.classes > kMaxScratch && !prefers_lanes(p); }

void forward_shared(const Problem& p, const Tiling& tiling, const ParallelFor& parallel_for,
                    double* tile_losses) {
  with_accumulation_type(p, [&](auto zero) {
    SharedRows<decltype(zero)>(p, tiling, parallel_for).forward(tile_losses);
  });
}

void backward_shared(const Problem& p, const Tiling& tiling, const ParallelFor& parallel_for) {
  with_accumulation_type(
      p, [&](auto zero) { SharedRows<decltype(zero)>(p, tiling, parallel_for).backward(); });
}

void backward_target(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    simd::run([&] { run_backward_target<A>(p, tiling, begin, end); });
  });
}

const char* instruction_set() { return simd::level_name(); }

}  // namespace fused_ce::cpu
