// Where some elements of an operand lie: in runs of equal length, as far from one another.
//
// Elements of adjacent dimensions that could be merged are one run; others would take a call for
// each run, which for short ones costs more than moving them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_ce::cpu {

struct Runs {
  int64_t first;   // offset of the first element
  int64_t stride;  // of the elements of a run
  int64_t length;  // of a run
  int64_t count;
  int64_t step;  // from a run to the next

  static Runs one(int64_t first, int64_t stride, int64_t length) {
    return {first, stride, length, 1, length * stride};
  }

  // As one run where they are.
  Runs merged() const {
    return step == length * stride ? one(first, stride, length * count) : *this;
  }

  Runs moved(int64_t distance) const { return {first + distance, stride, length, count, step}; }

  int64_t at(int64_t i) const {
    return i < length ? first + i * stride : first + i / length * step + i % length * stride;
  }

  // Calls use(i, offset) for each run, which begins with element i.
  template <class Use>
  void for_each(const Use& use) const {
    for (int64_t run = 0; run < count; run++) use(run * length, first + run * step);
  }

  // Calls use(i, offset, n) for the runs' parts of the elements [begin, end).
  template <class Use>
  void for_each_of(int64_t begin, int64_t end, const Use& use) const {
    for (int64_t i = begin, n; i < end; i += n) {
      n = std::min(end - i, count == 1 ? end - i : length - i % length);
      use(i, at(i), n);
    }
  }
};

}  // namespace fused_ce::cpu
