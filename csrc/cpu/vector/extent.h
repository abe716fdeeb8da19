// The smallest and the largest of some numbers, NaN left out.
#pragma once

namespace fused_ce::cpu {

template <class A>
struct Extent {
  A min, max;
};

}  // namespace fused_ce::cpu
