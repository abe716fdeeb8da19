// The gradient of short rows (tile_rows.cuh), from the logits and the row statistics.
#include "../regimes.h"
#include "tile_rows.cuh"

namespace fused_ce::cuda {

namespace {

template <class T, int kLanes, int kTerms>
__global__ void __launch_bounds__(256, 4)
    tile_rows_backward_kernel(const __grid_constant__ Problem p, When when, int64_t tiles) {
  if (when == When::kUnlessGradOutputIsOne && grad_output_is_one(p)) return;
  using Tile = RowTile<T, kLanes, kTerms>;
  auto& shared = *static_cast<typename Tile::Shared*>(shared_memory());
  const Constants k(p);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile tile(p, shared, t);
    tile.load(p);
    const ShortRowIndex index(p, tile.has_row() ? tile.row() : 0);
    const RowTarget target(p, index);
    if (tile.leads() && target.is_counted) target.check(p);
    const float max = load_max<float>(p, index), rest = load_rest<float>(p, index);
    const double scale = row_scale(p, index, k);
    __syncthreads();
    differentiate_tile(p, tile, target, target.uncounted_value(p, index), max, rest, scale, k);
    __syncthreads();
    tile.store(p);
    __syncthreads();
  }
}

}  // namespace

void tile_rows_backward(const Problem& p, const Device& device, When when, Stream stream) {
  const int64_t tiles = tile_rows_blocks(p, device);
  const int64_t blocks = backward_blocks(tiles, device, when);
  with_vector_type(p, [&](auto zero) {
    with_tile_shape(p, [&](auto lanes, auto terms) {
      using T = decltype(zero);
      using Tile = RowTile<T, lanes, terms>;
      const Grid grid{blocks, Tile::kBlock, sizeof(typename Tile::Shared)};
      launch_kernel(tile_rows_backward_kernel<T, lanes, terms>, grid, stream, p, when, tiles);
    });
  });
}

}  // namespace fused_ce::cuda
