// Cuts the rows of a problem into tiles: runs of rows along the innermost row dimension.
//
// A tile is the unit of work of a thread and of the sums over rows. Its bounds depend on the
// problem alone, never on the number of threads, and so do the bits of every result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "../../problem.h"

namespace fused_ce::cpu {

// How work gets to threads, which a kernel never starts itself.
struct Threads {
  int64_t (*count)();
  // Calls work(begin, end) for parts of [0, count) that together make up all of it, each of them
  // `grain` long at least or all that is left.
  void (*run)(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work);
};

struct Tiling {
  int64_t tile_rows;  // at most this many rows in a tile
  int64_t per_run;    // tiles in one run of the innermost dimension
  int64_t count;      // tiles in all
  int64_t grain;      // tiles below which another thread is not worth waking
};

inline int64_t inner_rows(const Problem& p) { return p.row_sizes[p.row_dims - 1]; }

inline Tiling make_tiling(const Problem& p, int64_t tile_rows, int64_t work_per_row) {
  constexpr int64_t kGrainWork = 32768;
  Tiling t;
  int64_t inner = inner_rows(p);
  t.tile_rows = std::max<int64_t>(1, std::min(tile_rows, inner));
  t.per_run = inner == 0 ? 0 : (inner + t.tile_rows - 1) / t.tile_rows;
  t.count = inner == 0 ? 0 : p.rows / inner * t.per_run;
  int64_t tile_work = std::max<int64_t>(1, t.tile_rows * work_per_row);
  t.grain = std::max<int64_t>(1, kGrainWork / tile_work);
  return t;
}

// Where the rows of a tile lie in one operand.
struct Run {
  int64_t first;
  int64_t stride;

  int64_t at(int64_t row) const { return first + row * stride; }
};

// One tile: how many rows it has and, per row dimension, where it starts.
class Tile {
 public:
  Tile(const Problem& p, const Tiling& tiling, int64_t number) : row_dims_(p.row_dims) {
    int64_t run = number / tiling.per_run;
    int64_t first = number % tiling.per_run * tiling.tile_rows;
    rows = std::min(tiling.tile_rows, inner_rows(p) - first);
    for (int d = row_dims_ - 2; d >= 0; d--) {
      index_[d] = run % p.row_sizes[d];
      run /= p.row_sizes[d];
    }
    index_[row_dims_ - 1] = first;
  }

  int64_t rows;

  Run run(const Operand& operand) const {
    int64_t first = 0;
    for (int d = 0; d < row_dims_; d++) first += index_[d] * operand.row_strides[d];
    return {first, operand.row_strides[row_dims_ - 1]};
  }

 private:
  int row_dims_;
  int64_t index_[kMaxRowDims];
};

}  // namespace fused_ce::cpu
