// Memory for a kernel's own use, not initialised, on a cache line's boundary.
//
// At any other address every second load of a whole vector would touch two lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fused_ce::cpu {

constexpr size_t kLine = 64;

template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : lines_(size > 0 ? new Line[(size + kPerLine - 1) / kPerLine] : nullptr) {}

  bool empty() const { return !lines_; }
  A* data() const { return lines_ ? lines_[0].elements : nullptr; }

 private:
  static constexpr int64_t kPerLine = kLine / sizeof(A);

  struct alignas(kLine) Line {
    A elements[kPerLine];
  };

  std::unique_ptr<Line[]> lines_;
};

}  // namespace fused_ce::cpu
