// Which kernels serve a call, and the memory they share.
//
// A forward call is one launch for unreduced losses. A reduction takes another before it, which
// finds what the mean divides by and sets the tickets of the first (block_sum.cuh) to zero; for
// many rows a memset does the latter.
#include <array>

#include "kernels.h"
#include "regimes.h"

namespace fused_ce::cuda {

namespace {

struct ForwardRegime {
  bool (*serves)(const Problem&, const Device&);
  int64_t (*blocks)(const Problem&, const Device&);
  void (*forward)(const Problem&, const Result&, const Device&, Stream);
};

struct BackwardRegime {
  bool (*serves)(const Problem&, const Device&);
  void (*backward)(const Problem&, const Device&, When, Stream);
};

bool serves_anything(const Problem&, const Device&) { return true; }

constexpr std::array kForward = {
    ForwardRegime{tile_rows_serves, tile_rows_blocks, tile_rows_forward},
    ForwardRegime{on_chip_serves, on_chip_blocks, on_chip_forward},
    ForwardRegime{streaming_serves, streaming_blocks, streaming_forward},
    ForwardRegime{strided_serves, strided_blocks, strided_forward},
    ForwardRegime{serves_anything, general_blocks, general_forward},
};

constexpr std::array kBackward = {
    BackwardRegime{tile_rows_serves, tile_rows_backward},
    BackwardRegime{elementwise_backward_serves, elementwise_backward},
    BackwardRegime{strided_serves, strided_backward},
    BackwardRegime{serves_anything, general_backward},
};

// The first that serves a problem is the fastest for it.
template <class Regimes>
const auto& regime_for(const Regimes& regimes, const Problem& p, const Device& device) {
  for (const auto& regime : regimes)
    if (regime.serves(p, device)) return regime;
  return regimes.back();
}

// The workspace, or with no memory for it its size.
struct Workspace {
  BlockSum<> losses{};
  BlockSum<CountedRows> counted{};
  Totals* totals = nullptr;
  int64_t ticket_count = 0;  // of losses and, behind them, counted
  size_t bytes = 0;

  Workspace(const Problem& p, int64_t blocks, void* memory) : memory_(static_cast<char*>(memory)) {
    const bool reduces = p.reduces();
    if (reduces) losses = take_sum<double>(blocks);
    if (needs_totals(p)) {
      totals = take<Totals>(1);
      counted = take_sum<CountedRows>(totals_blocks(p));
    }
    const int64_t loss_tickets = reduces ? 1 + block_groups(blocks) : 0;
    ticket_count = loss_tickets + 1 + block_groups(totals_blocks(p));
    losses.tickets = take<unsigned>(ticket_count);
    counted.tickets = losses.tickets + loss_tickets;
  }

 private:
  template <class Value>
  BlockSum<Value> take_sum(int64_t blocks) {
    Value* parts = take<Value>(blocks);
    return {parts, take<Value>(block_groups(blocks)), nullptr};
  }

  template <class T>
  T* take(int64_t count) {
    T* memory = memory_ ? reinterpret_cast<T*>(memory_ + bytes) : nullptr;
    bytes += static_cast<size_t>(count) * sizeof(T);
    return memory;
  }

  char* memory_;
};

// The same for the gradient of the logits' factor.
struct ScaleWorkspace {
  BlockSum<> sums;
  size_t ticket_bytes, bytes;

  ScaleWorkspace(const Problem& p, const Device& device, void* memory) {
    const int64_t blocks = general_blocks(p, device), groups = block_groups(blocks);
    auto* parts = static_cast<double*>(memory);
    sums = {parts, parts + blocks, reinterpret_cast<unsigned*>(parts + blocks + groups)};
    ticket_bytes = static_cast<size_t>(1 + groups) * sizeof(unsigned);
    bytes = static_cast<size_t>(blocks + groups) * sizeof(double) + ticket_bytes;
  }
};

// With what is known on the host about the problem as a whole.
Problem completed(const Problem& p) {
  Problem problem = p;
  const bool is_zero = p.rows == 0 && p.options.on_all_ignored == OnAllIgnored::kZero;
  const double denominator = p.divides() && !is_zero ? static_cast<double>(p.rows) : 1.0;
  problem.known = {static_cast<double>(p.classes), denominator, denominator};
  if (is_zero) problem.options.denominator = {};
  if (!needs_totals(p)) problem.totals = nullptr;
  return problem;
}

// Calls run(problem, result) for a launch of so many blocks, after the one that finds what its mean
// divides by.
template <class Run>
void run_forward(const Problem& p, int64_t blocks, void* memory, Stream stream, const Run& run) {
  const Workspace workspace(p, blocks, memory);
  Problem problem = completed(p);
  Result result{workspace.losses, p.totals};
  const bool counts = needs_totals(p);
  if (!(counts && totals_blocks(p) == 1) && p.reduces())
    cudaMemsetAsync(workspace.losses.tickets, 0, workspace.ticket_count * sizeof(unsigned), stream);
  if (counts) {
    problem.totals = workspace.totals;
    result.totals = nullptr;
    find_totals(problem,
                {problem.totals, p.totals, workspace.counted, workspace.losses.tickets,
                 workspace.ticket_count},
                stream);
  }
  run(problem, result);
}

// The problem of all classes, whose weights are in the packets of their shards.
Problem vocabulary_of(const Problem& p) {
  Problem problem = p;
  problem.classes = p.vocabulary;
  problem.options.weight = {};
  problem = completed(problem);
  problem.totals = p.totals;
  return problem;
}

// For what the blocks find that look for a shard's facts.
struct PackWorkspace {
  BlockSum<ShardScan> sums;
  size_t ticket_bytes, bytes;

  PackWorkspace(const Problem& p, void* memory) {
    const int64_t blocks = shard_facts_blocks(p), groups = block_groups(blocks);
    auto* parts = static_cast<ShardScan*>(memory);
    sums = {parts, parts + blocks, reinterpret_cast<unsigned*>(parts + blocks + groups)};
    ticket_bytes = static_cast<size_t>(1 + groups) * sizeof(unsigned);
    bytes = static_cast<size_t>(blocks + groups) * sizeof(ShardScan) + ticket_bytes;
  }
};

}  // namespace

size_t workspace_bytes(const Problem& p, const Device& device) {
  if (p.scale_grad.data) return ScaleWorkspace(p, device, nullptr).bytes;
  return Workspace(p, regime_for(kForward, p, device).blocks(p, device), nullptr).bytes;
}

void forward(const Problem& p, const Device& device, void* memory, Stream stream) {
  const ForwardRegime& regime = regime_for(kForward, p, device);
  run_forward(p, regime.blocks(p, device), memory, stream,
              [&](const Problem& problem, const Result& result) {
                regime.forward(problem, result, device, stream);
              });
}

void backward(const Problem& p, const Device& device, When when, Stream stream) {
  if (p.rows == 0) return;
  regime_for(kBackward, p, device).backward(completed(p), device, when, stream);
}

void backward_logit_scale(const Problem& p, const Device& device, void* memory, Stream stream) {
  const ScaleWorkspace workspace(p, device, memory);
  cudaMemsetAsync(workspace.sums.tickets, 0, workspace.ticket_bytes, stream);
  scale_backward(completed(p), workspace.sums, device, stream);
}

void backward_target(const Problem& p, const Device& device, Stream stream) {
  if (p.rows == 0) return;
  target_backward(completed(p), device, stream);
}

size_t divergence_workspace_bytes(const Problem& p, const Device& device) {
  return Workspace(p, divergence_blocks(p, device), nullptr).bytes;
}

void find_divergence(const Problem& p, const Divergence& d, const Device& device, void* memory,
                     Stream stream) {
  run_forward(p, divergence_blocks(p, device), memory, stream,
              [&](const Problem& problem, const Result& result) {
                divergence_forward(problem, d, result, device, stream);
              });
}

void find_divergence_gradient(const Problem& p, const Divergence& d, const Device& device,
                              When when, Stream stream) {
  if (p.rows == 0) return;
  Problem problem = completed(p);
  if (p.divides()) problem.totals = p.totals;  // a denominator that was given is there alone
  divergence_backward(problem, d, device, when, stream);
}

size_t pack_workspace_bytes(const Problem& p) { return PackWorkspace(p, nullptr).bytes; }

void pack_shard(const Problem& p, const Shards& s, const Device& device, void* memory,
                Stream stream) {
  const PackWorkspace workspace(p, memory);
  if (shard_facts_blocks(p) > 1)
    cudaMemsetAsync(workspace.sums.tickets, 0, workspace.ticket_bytes, stream);
  shard_forward(p, device, stream);
  store_shard_facts(p, s, workspace.sums, stream);
}

size_t merge_workspace_bytes(const Problem& p, const Device& device) {
  return Workspace(vocabulary_of(p), shard_merge_blocks(p, device), nullptr).bytes;
}

void merge_shards(const Problem& p, const Shards& s, const Device& device, void* memory,
                  Stream stream) {
  const Problem problem = vocabulary_of(p);
  const Workspace workspace(problem, shard_merge_blocks(p, device), memory);
  unsigned* tickets = workspace.losses.tickets;
  if (totals_blocks(problem) > 1)
    cudaMemsetAsync(tickets, 0, workspace.ticket_count * sizeof(unsigned), stream);
  const ShardPackets packets{s.packets, s.count, s.has_weights};
  find_totals(problem,
              {p.totals, nullptr, workspace.counted, tickets, workspace.ticket_count, packets},
              stream);
  shard_merge(problem, s, {workspace.losses, nullptr}, device, stream);
}

void find_shard_gradient(const Problem& p, const Shards& s, const Device& device, Stream stream) {
  if (p.rows > 0) shard_backward(p, s, device, stream);
}

void find_shard_target_gradient(const Problem& p, const Shards& s, const Device& device,
                                Stream stream) {
  if (p.rows > 0) shard_target_backward(p, s, device, stream);
}

}  // namespace fused_ce::cuda
