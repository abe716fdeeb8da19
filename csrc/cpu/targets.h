// Class-index targets: reading them, proving them in range, and adding up what the mean divides by.
//
// The scan runs before any kernel, so an out-of-range target is an error before a byte is written.
// Kernels test the range once more: a tensor may be changed by another thread meanwhile.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "tiles.h"

namespace fused_ce {

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
  return index != p.ignore_index && in_range(p, index);
}

// What one tile of targets adds up to.
struct TargetScan {
  double weights = 0.0;  // of the counted rows
  int64_t bad_index = 0;
  bool has_bad_index = false;
};

}  // namespace fused_ce
