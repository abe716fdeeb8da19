// Which rows are taken one by one and which side by side, and in tiles of what size.
#include <algorithm>

#include "row_kernels_impl.h"

namespace fused_ce::cpu {

namespace {

// Up to here a row of adjacent classes is faster as a lane among others than on its own.
constexpr int64_t kMaxLaneClasses = 64;
// Up to here gathering a scattered row into a tile of its neighbours is.
constexpr int64_t kMaxGatheredClasses = 1024;

// Lanes count the largest logits of a row in the accumulation type, exactly up to here.
constexpr int64_t kMaxCountedClasses = int64_t{1} << 24;

// With fewer rows side by side, each is better taken on its own however far apart its classes lie;
// all the more where the few of each class are to be loaded, which takes a call.
constexpr int64_t kMinLaneRows = 8, kMinLoadedLaneRows = 40;

}  // namespace

bool prefers_lanes(const Problem& p) {
  if (p.classes > kMaxCountedClasses) return false;
  if (p.classes <= kMaxLaneClasses) return true;
  const int64_t lane_stride = p.input.row_strides[p.row_dims - 1];
  const bool loads = size_of(p.input.dtype) == 2 || lane_stride != 1;
  const int64_t least = loads ? kMinLoadedLaneRows : kMinLaneRows;
  if (p.input.class_stride == 1 || inner_rows(p) < least) return false;
  if (lane_stride == 1) return true;
  return p.input.class_stride > lane_stride && p.classes <= kMaxGatheredClasses;
}

namespace {

int64_t lanes_per_tile(const Problem& p) {
  // Rows side by side are walked through twice, the second time in the first-level cache; rows that
  // are turned over are walked through in a copy, and long runs of memory count for more.
  constexpr int64_t kBesideElements = 2560, kTurnedElements = 32768;
  constexpr int64_t kMinLanes = 128;  // fewer would read too little of each class at a time
  const bool beside = p.input.row_strides[p.row_dims - 1] == 1;
  const int64_t elements = beside ? kBesideElements : kTurnedElements;
  const int64_t lanes =
      std::clamp(elements / std::max<int64_t>(1, p.classes) / 16 * 16, kMinLanes, kMaxBatch);
  // A run that is a tile's worth may be used where it lies, which several runs cannot.
  constexpr int64_t kRunElements = 1024;
  const int64_t run = inner_rows(p);
  return beside && run * p.classes >= kRunElements ? std::min(lanes, run) : lanes;
}

}  // namespace

Tiling row_tiling(const Problem& p) {
  constexpr int64_t kTileElements = 4096;
  const int64_t rows = prefers_lanes(p)
                           ? lanes_per_tile(p)
                           : std::min(kMaxBatch, kTileElements / std::max<int64_t>(1, p.classes));
  return make_tiling(p, rows, p.classes);
}

// Shorter rows are not worth it, and may keep their terms in memory that belongs to one thread.
bool has_long_rows(const Problem& p) { return p.classes > kMaxScratch && !prefers_lanes(p); }

}  // namespace fused_ce::cpu
