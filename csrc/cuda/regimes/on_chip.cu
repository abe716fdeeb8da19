// Which problems have rows that fit on chip.
#include <limits>

#include "../regimes.h"
#include "on_chip.cuh"

namespace fused_ce::cuda {

bool on_chip_serves(const Problem& p, const Device& device) {
  if (!is_vector_problem(p) || !p.has_plain_rows()) return false;
  bool serves = false;
  with_row_layout(p, [&](auto layout) {
    using Layout = decltype(layout);
    const int64_t packs = p.classes * size_of(p.input.dtype) / 16;
    serves = packs <= Layout::kMaxPacks && (Layout::kCluster == 1 || device.has_clusters) &&
             p.rows <= std::numeric_limits<int>::max() / Layout::kCluster;
    // Without a gradient a row need not be kept, unless a block to each row leaves the device idle.
    if (!p.grad.data && Layout::kCluster > 1) serves &= p.rows < 2 * device.multiprocessors;
  });
  return serves;
}

int64_t on_chip_blocks(const Problem& p, const Device&) {
  int64_t blocks = 0;
  with_row_layout(p, [&](auto layout) { blocks = ceil_divide(p.rows, decltype(layout)::kRows); });
  return blocks;
}

void on_chip_forward(const Problem& p, const Result& result, const Device&, Stream stream) {
  switch (p.input.dtype) {
    case DType::kFloat32:
      return on_chip_float32(p, result, stream);
    case DType::kBFloat16:
      return on_chip_bfloat16(p, result, stream);
    default:
      return on_chip_float16(p, result, stream);
  }
}

}  // namespace fused_ce::cuda
