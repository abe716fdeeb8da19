// Loss and gradient from one read of the logits: the row stays in the registers of the threads that
// share it, which are a warp, a block, or the blocks of a cluster.
//
// The warps find their maxima and sums on their own and exchange them once, through shared memory,
// in a cluster through every block's. By then all have read their logits, so the gradient may be
// written in their place.
#pragma once

#include "../kernel_launch.h"
#include "../row/result.cuh"
#include "vector_row.cuh"

namespace fused_ce::cuda {

// How a row is spread out: over `kThreads` threads of each of `kCluster` blocks, `kPacks` packs to
// a thread. Where a warp will do, a block has several rows.
template <int kThreads_, int kPacks_, int kCluster_>
struct RowLayout {
  static constexpr int kThreads = kThreads_, kPacks = kPacks_, kCluster = kCluster_;
  static constexpr int kRows = kThreads == kWarp ? 4 : 1;
  static constexpr int kBlock = kThreads * kRows;
  static constexpr int kWarps = kThreads / kWarp * kCluster;  // of a row
  // At most 80 registers to a thread, or 128: while one block stores, others must be there to load.
  static constexpr int kMinBlocks = (kPacks <= 8 ? 768 : 512) / kBlock;
  static constexpr int kMaxPacks = kThreads * kPacks * kCluster;

  struct Shared {
    LogitSums<float> parts[kWarps];
    double losses[kRows];
  };
};

// The part of a cluster's exchange for which code that knows no clusters has no instructions.
template <class Layout>
struct Peers {
  static constexpr bool kAny = Layout::kCluster > 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr bool kMissing = false;
#else
  static constexpr bool kMissing = kAny;
#endif

  __device__ __forceinline__ static int rank() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (kAny) return static_cast<int>(__clusterRelativeBlockRank());
#endif
    return 0;
  }

  // That this block is there, and its shared memory may be written.
  __device__ __forceinline__ static void announce() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (kAny) __cluster_barrier_arrive_relaxed();
#endif
  }

  __device__ __forceinline__ static void await() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (kAny) __cluster_barrier_wait();
#endif
  }

  // That everything this thread has written is there for the others to read.
  __device__ __forceinline__ static void arrive() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (kAny) __cluster_barrier_arrive();
#endif
  }

  template <class Object>
  __device__ __forceinline__ static Object* of(Object* own, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    return static_cast<Object*>(__cluster_map_shared_rank(own, static_cast<unsigned>(rank)));
#else
    return own;
#endif
  }
};

// From the sums of each warp to those of the row, for all of its threads.
template <bool kSmoothed, class Layout>
__device__ __forceinline__ void exchange(typename Layout::Shared& shared, LogitSums<float>& sums) {
  using Peer = Peers<Layout>;
  constexpr int kBlockWarps = Layout::kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x % Layout::kThreads / kWarp;
  if constexpr (Layout::kWarps == 1) {
    __syncwarp();
    return;
  } else if constexpr (Peer::kAny) {
    LogitSums<float>* own = &shared.parts[Peer::rank() * kBlockWarps + warp];
    Peer::await();
    if (lane < Layout::kCluster) *Peer::of(own, lane) = sums;
    Peer::arrive();
    Peer::await();  // nobody touches another's memory after this
  } else {
    if (lane == 0) shared.parts[warp] = sums;
    __syncthreads();
  }
  add_parts<Layout::kWarps, kSmoothed>(shared.parts, sums);
}

template <class T, class Layout, bool kSmoothed>
__global__ void __launch_bounds__(Layout::kBlock, Layout::kMinBlocks)
    on_chip_kernel(const __grid_constant__ Problem p, const __grid_constant__ Result result,
                   const Unpacking unpacking) {
  using Peer = Peers<Layout>;
  if constexpr (Peer::kMissing) {  // the host knows, and does not launch it
    __trap();
    return;
  }
  constexpr int kThreads = Layout::kThreads, kPacks = Layout::kPacks;
  auto& shared = *static_cast<typename Layout::Shared*>(shared_memory());
  const int thread = threadIdx.x % kThreads, slot = threadIdx.x / kThreads, rank = Peer::rank();
  const unsigned cluster = blockIdx.x / Layout::kCluster;  // its blocks share rows
  const unsigned r = cluster * Layout::kRows + slot;
  const bool leads = rank == 0 && thread == 0;
  float loss = 0;
  if (r < p.rows) {
    const ShortRowIndex index(p, r);
    const RowTarget target(Plain{}, p, index);
    const T* x = static_cast<const T*>(p.input.data) + index.offset(p, p.input);
    T* grad = static_cast<T*>(p.grad.data) + index.offset(p, p.grad);
    const VectorRow<T> row(x, p.classes);
    const int share = (row.packs + Layout::kCluster - 1) / Layout::kCluster;
    const int begin = rank * share + thread;
    const int end = rank * share + share < row.packs ? rank * share + share : row.packs;
    const int single = rank == 0 ? row.single(thread, p.classes) : -1;

    if (!target.is_counted) {
      // No logit is read. All threads of a cluster come here, or none.
      if (p.grad.data) {
        for (int i = begin; i < end; i += kThreads) Pack<T>::filled(0).store(grad + row.first(i));
        if (single >= 0) grad[single] = T{};
      }
      if (leads) store_row(p, index, 0.0f, LogitSums<float>{});
    } else {
      Peer::announce();
      if (leads) target.check(p);
      const int t = static_cast<int>(target.index);
      const float weight = target.weight<float>(p);
      const float target_logit = target.in_range(p) ? widen(x[target.index]) : 0.0f;
      Pack<T> packs[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        const int pack = begin + i * kThreads;
        packs[i] =
            pack < end ? Pack<T>::load(x + row.first(pack)) : Pack<T>::filled(-kInfinity<float>);
      }
      const float own = single >= 0 ? widen(x[single]) : -kInfinity<float>;

      LogitSums<float> sums;
      sums.max = own;
#pragma unroll
      for (int i = 0; i < kPacks; i++) sums.max = larger(sums.max, packs[i].max());
      sums.max = max_lanes<kWarp>(larger(sums.max, -kInfinity<float>));
      const float base = base_of(sums.max);
      unsigned with_max = 0;  // a bit for each pack: their maxima would each take a register
#pragma unroll
      for (int i = 0; i < kPacks; i++) with_max |= (packs[i].max() == base ? 1u : 0u) << i;
      sums.add_logit(own, base, Exp{});
      if (kSmoothed && single >= 0) sums.add_gap(base - own, 1.0f);
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        // What fills up the last packs adds nothing but to the gaps and the mass.
        if (kSmoothed && begin + i * kThreads >= end) continue;
        add_pack<kSmoothed>(packs[i], base, with_max >> i & 1, sums);
      }
      spread_out<kSmoothed>(p, sums);
      add_lanes<kWarp, kSmoothed>(sums);
      exchange<kSmoothed, Layout>(shared, sums);
      sums.close();

      const Constants k(Plain{}, p);
      if (leads) {
        loss = unweighted_loss(sums, target_logit, weight, k);
        store_row(p, index, loss, sums);
      }
      if (p.grad.data) {
        const double scale = unweighted_scale(p, index, k);
        const float coefficient = static_cast<float>(k.smoothing.smooth);
        const RowGradient<float> gradient =
            index_gradient(sums.max, sums.rest, sums.max, weight, scale, k);
        const float target_value =
            target_gradient(sums.max, sums.rest, target_logit, weight, scale, k);
        if (single >= 0) {
          const float value = kSmoothed ? gradient.of(own, coefficient) : gradient.of(own);
          grad[single] = narrow<T>(single == t ? target_value : value);
        }
#pragma unroll
        for (int i = 0; i < kPacks; i++) {
          const int pack = begin + i * kThreads, first = row.first(pack);
          if (pack >= end) break;
          gradient_pack<kSmoothed>(packs[i], gradient, coefficient, t - first, target_value,
                                   unpacking)
              .store(grad + first);
        }
      }
    }
  }
  if (rank != 0) return;
  double losses = loss;
  if constexpr (Layout::kRows > 1) {
    if (thread == 0) shared.losses[slot] = loss;
    __syncthreads();
    for (int i = 1; i < Layout::kRows && threadIdx.x == 0; i++) losses += shared.losses[i];
  }
  if (threadIdx.x < kWarp) store_block(p, result, losses, cluster, gridDim.x / Layout::kCluster);
}

// The layouts from the narrowest on, and which of them a row needs.
template <int kIndex>
struct LayoutAt;
template <>
struct LayoutAt<0> : RowLayout<32, 8, 1> {};
template <>
struct LayoutAt<1> : RowLayout<128, 8, 1> {};
template <>
struct LayoutAt<2> : RowLayout<256, 8, 1> {};
template <>
struct LayoutAt<3> : RowLayout<256, 8, 2> {};
template <>
struct LayoutAt<4> : RowLayout<256, 8, 4> {};
template <>
struct LayoutAt<5> : RowLayout<256, 8, 8> {};
template <>
struct LayoutAt<6> : RowLayout<256, 16, 8> {};

// Calls use(Layout{}) for the narrowest layout that holds the problem's rows.
template <int kIndex = 0, class Use>
void with_row_layout(const Problem& p, const Use& use) {
  using Layout = LayoutAt<kIndex>;
  if constexpr (kIndex < 6) {
    const int64_t packs = p.classes * size_of(p.input.dtype) / 16;
    if (packs > Layout::kMaxPacks) return with_row_layout<kIndex + 1>(p, use);
  }
  use(Layout{});
}

template <class T>
void launch_row_on_chip(const Problem& p, const Result& result, Stream stream) {
  with_row_layout(p, [&](auto layout) {
    using Layout = decltype(layout);
    const int64_t clusters = ceil_divide(p.rows, Layout::kRows);
    const Grid grid{clusters * Layout::kCluster, Layout::kBlock, sizeof(typename Layout::Shared),
                    Layout::kCluster};
    const auto kernel =
        p.is_smoothed() ? on_chip_kernel<T, Layout, true> : on_chip_kernel<T, Layout, false>;
    launch_kernel(kernel, grid, stream, p, result, Unpacking{});
  });
}

}  // namespace fused_ce::cuda
