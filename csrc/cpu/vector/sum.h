// A sum whose rounding errors are summed as well (Knuth's TwoSum), and added at the end.
//
// Rows may be many and alike: then every addition of a plain sum rounds the same way.
#pragma once

#include <cmath>

namespace fused_ce::cpu {

class CompensatedSum {
 public:
  void add(double value) {
    const double total = total_ + value;
    const double part = total - total_;
    lost_ += (total_ - (total - part)) + (value - part);
    total_ = total;
  }

  // Beside an infinity, what was lost is nan.
  double value() const { return std::isfinite(total_) ? total_ + lost_ : total_; }

 private:
  double total_ = 0.0, lost_ = 0.0;
};

}  // namespace fused_ce::cpu
