// Long rows, fewer of them than threads: each is cut into pieces that the threads share.
//
// A piece is a run of whole blocks, and a block comes down to the same numbers whoever computes it,
// so the result has the same bits as RowKernel's own walk through the row. One kernel leads each
// row: it reads what belongs to the row as a whole, before any of it is overwritten, and brings the
// blocks together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../stack.h"
#include "../vector/simd.h"
#include "parts.h"
#include "row_kernel.h"

namespace fused_ce::cpu {

template <class A, simd::Level kLevel>
class SharedRows {
 public:
  SharedRows(const Problem& p, const Tiling& tiling, const Threads& threads)
      : p_(p),
        tiling_(tiling),
        threads_(threads),
        kernels_(p, tiling),
        blocks_(tiling.count * blocks_of(p)) {
    for (int64_t t = 0; t < tiling.count; t++)
      leaders_.push_back(std::make_unique<RowKernel<A, kLevel>>(p, tiling));
  }

  void forward(double* tile_losses) {
    for_rows([&](RowKernel<A, kLevel>& leader, const Tile& tile, int64_t) {
      leader.begin_forward(tile);
    });
    for_pieces([&](RowKernel<A, kLevel>& kernel, int64_t t, int64_t first, int64_t last) {
      kernel.reduce(0, blocks(t), first, last);
    });
    for_rows([&](RowKernel<A, kLevel>& leader, const Tile& tile, int64_t t) {
      tile_losses[t] = leader.finish(tile, blocks(t));
    });
    if (!p_.grad.data) return;
    for_pieces([&](RowKernel<A, kLevel>& kernel, int64_t t, int64_t first, int64_t last) {
      kernel.write_gradients(1, blocks(t), first, last);
    });
  }

  void backward() {
    for_rows([&](RowKernel<A, kLevel>& leader, const Tile& tile, int64_t) {
      leader.begin_backward(tile);
    });
    for_pieces([&](RowKernel<A, kLevel>& kernel, int64_t, int64_t first, int64_t last) {
      kernel.rewrite_gradients(1, first, last);
    });
  }

 private:
  static constexpr int64_t kPiece = 32 * kRowBlock;

  BlockSums<A>* blocks(int64_t t) { return blocks_.data() + t * blocks_of(p_); }

  template <class Use>
  void for_rows(const Use& use) {
    simd::run_as<kLevel>([&] {
      for (int64_t t = 0; t < tiling_.count; t++) use(*leaders_[t], Tile(p_, tiling_, t), t);
    });
  }

  template <class Use>
  void for_pieces(const Use& use) {
    const int64_t per_row = (p_.classes + kPiece - 1) / kPiece;
    const auto use_pieces = [&](RowKernel<A, kLevel>& kernel, int64_t begin, int64_t end) {
      simd::run_as<kLevel>([&] {
        for (int64_t i = begin; i < end; i++) {
          const int64_t t = i / per_row, first = i % per_row * kPiece;
          kernel.join(*leaders_[t]);
          use(kernel, t, first, std::min(first + kPiece, p_.classes));
        }
      });
    };
    run_parts(threads_, tiling_.count * per_row, 1, [&](int64_t begin, int64_t end) {
      kernels_.lend([&](RowKernel<A, kLevel>& kernel) { use_pieces(kernel, begin, end); });
    });
  }

  const Problem& p_;
  const Tiling& tiling_;
  const Threads& threads_;
  Kernels<RowKernel<A, kLevel>, Problem, Tiling> kernels_;
  std::vector<std::unique_ptr<RowKernel<A, kLevel>>> leaders_;
  std::vector<BlockSums<A>> blocks_;
};

}  // namespace fused_ce::cpu
