// How the elements are cut into tiles, and what comes after these; see pointwise.h.
#include "pointwise.h"

#include <vector>

#include "../rows/parts.h"
#include "../vector/span.h"
#include "../vector/sum.h"
#include "kernels.h"

namespace fused_ce::cpu {

namespace {

Tiling pointwise_tiling(const Problem& p) {
  // Of long runs several blocks, so that a tile's own cost is that of few elements; short runs are
  // put together to no more than a block.
  constexpr int64_t kTileElements = 8 * kPointwiseBlock;
  return make_tiling(p, inner_rows(p) >= kPointwiseBlock ? kTileElements : kPointwiseBlock, 1);
}

}  // namespace

void evaluate_pointwise(const Problem& p, const Pointwise& s, const Threads& threads) {
  const Tiling tiling = pointwise_tiling(p);
  std::vector<double> tile_sums(tiling.count);
  for_tiles(tiling, threads, [&](int64_t begin, int64_t end) {
    const auto tiles = p.accumulates_in_double() ? pointwise_tiles<double> : pointwise_tiles<float>;
    tiles(p, s, tiling, begin, end, tile_sums.data());
  });
  if (!p.loss.data || !p.reduces()) return;
  CompensatedSum sum;
  for (const double part : tile_sums) sum.add(part);
  store_value(sum.value() / s.denominator, p.loss, 0);
}

}  // namespace fused_ce::cpu
