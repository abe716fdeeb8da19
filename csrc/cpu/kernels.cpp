// Chooses the kernel and the tiles for a problem, and runs it on the widest vectors there are.
#include "kernels.h"

#include <algorithm>
#include <limits>

#include "lane_kernel.h"
#include "row_kernel.h"
#include "simd.h"

namespace fused_ce::cpu {

namespace {

// Up to here a row of adjacent classes is faster as a lane among others than on its own.
constexpr int64_t kMaxLaneClasses = 64;
// Up to here gathering a scattered row into a tile of its neighbours is.
constexpr int64_t kMaxGatheredClasses = 1024;

bool prefers_lanes(const Problem& p) {
  if (p.classes > std::numeric_limits<int32_t>::max()) return false;
  if (p.classes <= kMaxLaneClasses) return true;
  if (p.input.class_stride == 1) return false;
  const int64_t lane_stride = p.input.row_strides[p.row_dims - 1];
  if (lane_stride == 1) return true;
  return p.input.class_stride > lane_stride && p.classes <= kMaxGatheredClasses;
}

int64_t lanes_per_tile(const Problem& p) {
  constexpr int64_t kTileElements = 32768;
  constexpr int64_t kMinLanes = 128;  // fewer would read too little of each class at a time
  const int64_t lanes = kTileElements / std::max<int64_t>(1, p.classes) / 16 * 16;
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

template <class A>
void run_forward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
                 double* tile_losses) {
  if (prefers_lanes(p)) {
    LaneKernel<A> kernel(p, tiling);
    for (int64_t t = begin; t < end; t++) tile_losses[t] = kernel.forward(Tile(p, tiling, t));
    return;
  }
  RowKernel<A> kernel(p, tiling);
  for (int64_t t = begin; t < end; t++) tile_losses[t] = kernel.forward(Tile(p, tiling, t));
}

template <class A>
void run_backward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  if (prefers_lanes(p)) {
    LaneKernel<A> kernel(p, tiling);
    for (int64_t t = begin; t < end; t++) kernel.backward(Tile(p, tiling, t));
    return;
  }
  RowKernel<A> kernel(p, tiling);
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
  for (int64_t t = begin; t < end; t++) {
    const Tile tile(p, tiling, t);
    const Run targets = tile.run(p.target);
    TargetScan scan;
    for (int64_t i = 0; i < tile.rows; i++) {
      const int64_t index = load_index(p.target, targets.at(i));
      if (index == p.ignore_index) continue;
      if (!in_range(p, index)) {
        scan = {0.0, index, true};
        break;
      }
      if (!p.weight)
        scan.weights += 1.0;
      else if (p.accumulates_in_double())
        scan.weights += static_cast<const double*>(p.weight)[index];
      else
        scan.weights += static_cast<const float*>(p.weight)[index];
    }
    scans[t] = scan;
  }
}

double sum_weights(const Problem& p) {
  if (!p.weight) return static_cast<double>(p.classes);
  double sum = 0.0;
  with_accumulation_type(p, [&](auto zero) {
    const auto* weight = static_cast<const decltype(zero)*>(p.weight);
    for (int64_t c = 0; c < p.classes; c++) sum += weight[c];
  });
  return sum;
}

void forward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end,
             double* tile_losses) {
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    simd::run([&] { run_forward<A>(p, tiling, begin, end, tile_losses); });
  });
}

void backward(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    simd::run([&] { run_backward<A>(p, tiling, begin, end); });
  });
}

void backward_target(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end) {
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    simd::run([&] { run_backward_target<A>(p, tiling, begin, end); });
  });
}

const char* instruction_set() { return simd::level_name(); }

}  // namespace fused_ce::cpu
