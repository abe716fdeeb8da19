// Cuts the rows of a problem into tiles: runs of rows along the innermost row dimension, one of
// them or several from the dimension outside it, where they are short.
//
// A tile is the unit of work of a thread and of the sums over rows. Its bounds depend on the
// problem alone, never on the number of threads, and so do the bits of every result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

#include "../../problem.h"
#include "../vector/runs.h"

namespace fused_ce::cpu {

// How work gets to threads, which a kernel never starts itself.
struct Threads {
  int64_t (*count)();
  // Calls work(begin, end) for parts of [0, count) that together make up all of it, each of them
  // `grain` long at least or all that is left.
  void (*run)(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work);
};

struct Tiling {
  int64_t run_rows;    // at most this many rows of the innermost dimension in a tile
  int64_t runs;        // and at most so many of such runs, along the dimension outside it
  int64_t tile_rows;   // the two together
  int64_t per_run;     // tiles along the innermost dimension
  int64_t per_column;  // tiles along the one outside it
  int64_t count;       // tiles in all
  int64_t grain;       // tiles below which another thread is not worth waking
};

inline int64_t inner_rows(const Problem& p) { return p.row_sizes[p.row_dims - 1]; }

// The dimension outside the innermost one.
inline int64_t outer_rows(const Problem& p) {
  return p.row_dims > 1 ? p.row_sizes[p.row_dims - 2] : 1;
}

// Of at most so many runs, for kernels that take each row's place to be a stride from the last.
inline Tiling make_tiling(const Problem& p, int64_t tile_rows, int64_t work_per_row,
                          int64_t most_runs = std::numeric_limits<int64_t>::max()) {
  constexpr int64_t kGrainWork = 32768;
  Tiling t;
  const int64_t inner = inner_rows(p), outer = outer_rows(p);
  // A dimension that is outside only because it is short is taken whole: its rows share cache
  // lines.
  const bool shares_lines =
      p.row_dims > 1 && p.input.row_strides[p.row_dims - 2] < p.input.row_strides[p.row_dims - 1];
  const int64_t least = shares_lines ? std::min(outer, most_runs) : 1;
  t.run_rows =
      std::clamp<int64_t>(tile_rows / std::max<int64_t>(1, least), 1, std::max<int64_t>(1, inner));
  t.runs = std::clamp<int64_t>(tile_rows / t.run_rows, 1, std::clamp<int64_t>(outer, 1, most_runs));
  t.tile_rows = t.run_rows * t.runs;
  t.per_run = (inner + t.run_rows - 1) / t.run_rows;
  t.per_column = (outer + t.runs - 1) / t.runs;
  t.count = p.rows == 0 ? 0 : p.rows / inner / outer * t.per_run * t.per_column;
  int64_t tile_work = std::max<int64_t>(1, t.tile_rows * work_per_row);
  t.grain = std::max<int64_t>(1, kGrainWork / tile_work);
  return t;
}

// Whether the rows of every tile are one run in this operand.
inline bool is_one_run(const Problem& p, const Tiling& t, const Operand& operand) {
  const int64_t* strides = operand.row_strides + p.row_dims;
  return t.runs == 1 || (t.run_rows == inner_rows(p) && strides[-2] == t.run_rows * strides[-1]);
}

// One tile: how many rows it has and, per row dimension, where it starts.
class Tile {
 public:
  Tile(const Problem& p, const Tiling& tiling, int64_t number) : row_dims_(p.row_dims) {
    const int64_t inner = number % tiling.per_run * tiling.run_rows;
    int64_t rest = number / tiling.per_run;
    const int64_t outer = rest % tiling.per_column * tiling.runs;
    rest /= tiling.per_column;
    for (int d = row_dims_ - 3; d >= 0; d--) {
      index_[d] = rest % p.row_sizes[d];
      rest /= p.row_sizes[d];
    }
    if (row_dims_ > 1) index_[row_dims_ - 2] = outer;
    index_[row_dims_ - 1] = inner;
    length_ = std::min(tiling.run_rows, inner_rows(p) - inner);
    runs_ = std::min(tiling.runs, outer_rows(p) - outer);
    rows = length_ * runs_;
  }

  int64_t rows;

  // Where its rows lie in one operand.
  Runs runs(const Operand& operand) const {
    int64_t first = 0;
    for (int d = 0; d < row_dims_; d++) first += index_[d] * operand.row_strides[d];
    const int64_t* strides = operand.row_strides + row_dims_;
    if (runs_ == 1) return Runs::one(first, strides[-1], length_);
    return Runs{first, strides[-1], length_, runs_, strides[-2]}.merged();
  }

 private:
  int row_dims_;
  int64_t length_, runs_;
  int64_t index_[kMaxRowDims];
};

}  // namespace fused_ce::cpu
