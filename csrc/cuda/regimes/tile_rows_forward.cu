// The loss of short rows (tile_rows.cuh), and their gradient.
#include "../regimes.h"
#include "tile_rows.cuh"

namespace fused_ce::cuda {

namespace {

template <class T, int kLanes, int kTerms>
__global__ void __launch_bounds__(256, 4)
    tile_rows_forward_kernel(const __grid_constant__ Problem p,
                             const __grid_constant__ Result result) {
  using Tile = RowTile<T, kLanes, kTerms>;
  auto& shared = *static_cast<typename Tile::Shared*>(shared_memory());
  const Tile tile(p, shared, blockIdx.x);
  tile.load(p);
  const ShortRowIndex index(p, tile.has_row() ? tile.row() : 0);
  const RowTarget target(p, index);
  const bool is_counted = tile.has_row() && target.is_counted;
  const Constants k(p);
  const bool spreads = k.spreads();
  __syncthreads();

  if (is_counted && tile.leads()) target.check(p);
  const float target_logit = tile.target_logit(p, target);
  LogitSums<float> sums;
  tile.for_classes([&](int c) { sums.max = larger(sums.max, tile.logit(c)); });
  sums.max = max_lanes<kLanes>(sums.max);
  const float base = base_of(sums.max);
  tile.for_classes([&](int c) {
    const float x = tile.logit(c);
    sums.add_logit(x, base, Exp{});
    if (spreads) sums.add_gap(base - x, class_coefficient<float>(p, c, k));
  });
  add_lanes<kLanes, true>(sums);
  sums.close();

  float loss = 0;
  if (tile.has_row() && tile.leads()) {
    loss = is_counted ? row_loss(p, index, sums, target_logit, target.weight<float>(p), k)
                      : target.uncounted_value(p, index);
    store_row(p, index, loss, is_counted ? sums : LogitSums<float>{});
  }
  if (p.grad.data) {
    differentiate_tile(p, tile, target, target.uncounted_value(p, index), sums.max, sums.rest,
                       row_scale(p, index, k), k);
    __syncthreads();
    tile.store(p);
  }
  if (!p.reduces() && blockIdx.x > 0) return;
  double losses = sum_lanes<kWarp>(static_cast<double>(loss));
  if (threadIdx.x % kWarp == 0) shared.losses[threadIdx.x / kWarp] = losses;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  for (int i = 1; i < Tile::kBlock / kWarp; i++) losses += shared.losses[i];
  store_block(p, result, losses, blockIdx.x, gridDim.x);
}

}  // namespace

bool tile_rows_serves(const Problem& p, const Device&) {
  const auto is_dense = [&](const Operand& o) { return !o.data || o.row_strides[0] == p.classes; };
  return has_vector_operands(p) && p.classes <= kMaxTileClasses && p.row_dims == 1 &&
         (p.rows == 1 || (is_dense(p.input) && is_dense(p.grad)));
}

int64_t tile_rows_blocks(const Problem& p, const Device&) {
  int64_t blocks = 0;
  with_tile_shape(p, [&](auto lanes, auto terms) {
    blocks = ceil_divide(p.rows, RowTile<float, lanes, terms>::kRows);
  });
  return blocks;
}

void tile_rows_forward(const Problem& p, const Result& result, const Device& device,
                       Stream stream) {
  with_vector_type(p, [&](auto zero) {
    with_tile_shape(p, [&](auto lanes, auto terms) {
      using T = decltype(zero);
      using Tile = RowTile<T, lanes, terms>;
      const Grid grid{tile_rows_blocks(p, device), Tile::kBlock, sizeof(typename Tile::Shared)};
      launch_kernel(tile_rows_forward_kernel<T, lanes, terms>, grid, stream, p, result);
    });
  });
}

}  // namespace fused_ce::cuda
