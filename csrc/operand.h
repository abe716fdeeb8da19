// Where the elements of a tensor lie, as plain data: nothing here knows torch.
//
// Strides count elements. A "row" is one prediction over the classes; all dimensions of the logits
// but the class dimension are row dimensions.
#pragma once

#include <cstdint>

namespace fused_ce {

enum class DType : uint8_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt64,
  kInt32,
  kInt16,
  kUInt8
};

constexpr int64_t size_of(DType dtype) {
  constexpr int64_t kSizes[] = {8, 4, 2, 2, 8, 4, 2, 1};
  return kSizes[static_cast<int>(dtype)];
}

// Values that lie next to each other; no data where there are none.
struct Values {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t count = 0;
};

// Row dimensions left after adjacent ones were merged; checks.cpp refuses more.
constexpr int kMaxRowDims = 24;

struct Operand {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t class_stride = 0;
  int64_t row_strides[kMaxRowDims] = {};
};

}  // namespace fused_ce
