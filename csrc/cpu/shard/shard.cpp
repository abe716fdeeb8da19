// What a shard's packet has besides its rows' sums, and the merge of packets.
//
// The merge is compiled for no level of simd.h: processes on different processors must get the same
// bits, and it is one exp for each row and shard.
#include "shard.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../shard.h"
#include "../kernels.h"
#include "../rows/parts.h"
#include "../rows/targets.h"
#include "../vector/math.h"
#include "../vector/span.h"
#include "../vector/sum.h"

namespace fused_ce::cpu {

namespace {

constexpr int64_t kTileRows = 4096;

template <class A>
Packet<A> packet_of(const Problem& p, const Shards& s, int64_t shard) {
  return {s.packets, p.rows, shard};
}

// What a shard finds in some rows' targets.
struct ShardScan {
  double weights = 0.0;
  int64_t bad_target = 0;
  uint64_t targets = 0;  // a sum over rows, whose order the shard's memory decides

  void add(const ShardScan& scan) {
    if (bad_target == 0) bad_target = scan.bad_target;
    targets += scan.targets;
  }
};

ShardScan scan_shard(const Problem& p, const Tile& tile) {
  const Runs targets = tile.runs(p.target), samples = tile.runs(p.options.sample_weight);
  const Runs numbers = tile.runs(p.row_max);
  CompensatedSum weights;
  ShardScan scan;
  with_index_pointer(p.target, 0, [&](const auto* data) {
    for (int64_t r = 0; r < tile.rows; r++) {
      const auto index = static_cast<int64_t>(data[targets.at(r)]);
      scan.targets += hash_of_target(index, numbers.at(r));
      if (index == p.options.ignore_index) continue;
      const double sample =
          p.weighs_samples() ? load_value<double>(p.options.sample_weight, samples.at(r)) : 1.0;
      if (sample == 0.0) continue;
      if (index < 0 || index >= p.vocabulary) {
        if (scan.bad_target == 0) scan.bad_target = index;
        if (counts_bad_targets(p)) weights.add(sample);
        continue;
      }
      if (!has_class(p, index)) continue;
      const Values& weight = p.options.weight;
      weights.add(weight.data ? sample * load_value<double>(weight, index - p.first_class)
                              : sample);
    }
  });
  scan.weights = weights.value();
  return scan;
}

ShardFacts facts_of(const Problem& p, const Shards& s, const Threads& threads) {
  ShardFacts facts;
  facts.first_class = p.first_class;
  facts.end_class = p.first_class + p.classes;
  facts.options = hash_of_options(hash_of_numbers(p, s), p.options);
  if (p.probabilities) return facts;
  if (p.is_smoothed()) facts.class_weights = sum_class_weights(p);
  const Tiling tiling = make_tiling(p, kTileRows, 4);
  std::vector<ShardScan> scans(tiling.count);
  for_tiles(tiling, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) scans[t] = scan_shard(p, Tile(p, tiling, t));
  });
  CompensatedSum weights;
  ShardScan all;
  for (const ShardScan& scan : scans) {
    weights.add(scan.weights);
    all.add(scan);
  }
  facts.target_weights = weights.value();
  facts.bad_target = p.allows_bad_targets() ? 0 : all.bad_target;
  facts.targets = static_cast<uint32_t>(all.targets >> 32);
  return facts;
}

// A shard without classes.
template <class A>
void fill_empty(const Packet<A>& packet) {
  const int64_t n = packet.distance();
  std::fill(packet.data(), packet.data() + n, -kInfinity<A>);
  std::fill(packet.data() + n, packet.data() + kShardNumbers * n, A(0));
}

// In an order in which every rank raises the same.
void check_facts(const Problem& p, const std::vector<ShardFacts>& all) {
  const auto fail = [](const std::string& message) {
    throw std::invalid_argument("fused_ce: " + message);
  };
  for (size_t shard = 0; shard < all.size(); shard++)
    if (all[shard].first_class == kRefused)
      fail("rank " + std::to_string(shard) + " refused its arguments; its own error says why");
  int64_t next = 0;
  for (size_t shard = 0; shard < all.size(); shard++) {
    const ShardFacts& facts = all[shard];
    if (facts.first_class != next || facts.end_class < next)
      fail("the classes of rank " + std::to_string(shard) + " should begin at " +
           std::to_string(next) + ", where those before it end, and are " +
           std::to_string(facts.first_class) + " to " + std::to_string(facts.end_class) +
           "; pass another class_offset");
    next = facts.end_class;
  }
  for (size_t shard = 0; shard < all.size(); shard++) {
    const char* which = all[shard].options != all[0].options   ? "options"
                        : all[shard].targets != all[0].targets ? "targets"
                                                               : nullptr;
    if (which)
      fail("the " + std::string(which) + " of rank " + std::to_string(shard) +
           " differ from those of rank 0; pass the same");
  }
  if (next != p.vocabulary)
    fail("the shards end at class " + std::to_string(next) + " of " + std::to_string(p.vocabulary) +
         "; pass another num_classes or class_offset");
  for (const ShardFacts& facts : all)
    if (facts.bad_target != 0)
      throw std::out_of_range("Target " + std::to_string(facts.bad_target) + " is out of bounds.");
}

// What the facts add up to, into p.known.
void find_totals(Problem& p, const Shards& s, const std::vector<ShardFacts>& all,
                 const Threads& threads) {
  CompensatedSum target_weights, class_weights;
  for (const ShardFacts& facts : all) {
    target_weights.add(facts.target_weights);
    class_weights.add(facts.class_weights);
  }
  TargetScan rows = scan_rows(p, threads);
  if (!p.probabilities && s.has_weights) rows.weights = target_weights.value();
  p.known.weight_sum = class_weights.value();
  find_denominators(p, rows);
}

// Whether a row counts, and if not its loss.
struct RowState {
  bool is_counted;
  double loss;
};

RowState state_of(const Problem& p, int64_t target, double sample) {
  if (sample == 0.0) return {false, 0.0};
  if (p.probabilities) return {true, 0.0};
  if (target == p.options.ignore_index) return {false, 0.0};
  if (target >= 0 && target < p.vocabulary) return {true, 0.0};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return {false, p.allows_bad_targets() ? nan : 0.0};
}

template <class A>
RowSums<double> merged_row(const Problem& p, const Shards& s, int64_t row) {
  RowSums<double> sums;
  const auto exp = [](double x) { return math::exp_nonpositive(x); };
  for (int64_t shard = 0; shard < s.count; shard++)
    packet_of<A>(p, s, shard).merge_into(sums, row, exp);
  sums.close();
  return sums;
}

double loss_of(const RowSums<double>& sums, const Common<double>& common) {
  // A row whose largest logit is infinite has no softmax.
  const bool is_defined = sums.max - sums.max == 0.0;
  const double rest = is_defined ? sums.rest : std::numeric_limits<double>::quiet_NaN();
  const double inverse = 1.0 / (1.0 + rest);
  return Row<double>(sums.max, rest, math::log1p_nonnegative(rest, inverse), inverse, sums.mass,
                     common)
      .loss(sums.gaps);
}

// Returns the sum of the losses.
template <class A>
double merge_tile(const Problem& p, const Shards& s, const Tile& tile,
                  const Common<double>& common) {
  const Runs numbers = tile.runs(p.row_max), stats = tile.runs(s.max), losses = tile.runs(p.loss);
  const Runs targets = tile.runs(p.target), samples = tile.runs(p.options.sample_weight);
  const auto target_at = [&](int64_t r) {
    int64_t target = 0;
    with_index_pointer(p.target, targets.at(r),
                       [&](const auto* at) { target = static_cast<int64_t>(*at); });
    return target;
  };
  double total = 0.0;
  for (int64_t r = 0; r < tile.rows; r++) {
    const double sample =
        p.weighs_samples() ? load_value<double>(p.options.sample_weight, samples.at(r)) : 1.0;
    const RowState state = state_of(p, p.probabilities ? 0 : target_at(r), sample);
    RowSums<double> sums;
    sums.max = 0.0;
    double loss = state.loss;
    if (state.is_counted) {
      sums = merged_row<A>(p, s, numbers.at(r));
      loss = sample * loss_of(sums, common);
    }
    const int64_t at = stats.at(r);
    static_cast<double*>(s.max.data)[at] = sums.max;
    static_cast<double*>(s.rest.data)[at] = sums.rest;
    static_cast<double*>(s.mass.data)[at] = sums.mass;
    if (!p.reduces()) store_value(loss, p.loss, losses.at(r));
    total += loss;
  }
  return total;
}

template <class A>
void merge(Problem& p, const Shards& s, const Threads& threads) {
  std::vector<ShardFacts> facts;
  for (int64_t shard = 0; shard < s.count; shard++)
    facts.push_back(packet_of<A>(p, s, shard).load_facts());
  check_facts(p, facts);
  find_totals(p, s, facts, threads);
  const Common<double> common(p, p.known);
  const Tiling tiling = make_tiling(p, kTileRows, 16 * s.count);
  std::vector<double> tile_losses(tiling.count);
  for_tiles(tiling, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      tile_losses[t] = merge_tile<A>(p, s, Tile(p, tiling, t), common);
  });
  *p.totals = p.known;
  if (p.reduces()) store_loss(p, tile_losses);
}

// Columns that are no classes have a gradient of 0.
void clear_padding(const Problem& p, const Operand& grad, int64_t padding, const Threads& threads) {
  if (padding == 0) return;
  const Tiling tiling = make_tiling(p, kTileRows, padding);
  for_tiles(tiling, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const Tile tile(p, tiling, t);
      const Runs rows = tile.runs(grad);
      for (int64_t r = 0; r < tile.rows; r++)
        for (int64_t c = p.classes; c < p.classes + padding; c++)
          store_value(0.0, grad, rows.at(r) + c * grad.class_stride);
    }
  });
}

}  // namespace

void pack_shard(const Problem& p, const Shards& s, const Threads& threads) {
  if (p.classes > 0) find_shard_sums(p, threads);
  const auto finish = [&](const auto& packet) {
    if (p.classes == 0) fill_empty(packet);
    packet.store_facts(facts_of(p, s, threads));
  };
  if (p.accumulates_in_double())
    finish(packet_of<double>(p, s, 0));
  else
    finish(packet_of<float>(p, s, 0));
}

void merge_shards(Problem& p, const Shards& s, const Threads& threads) {
  if (p.accumulates_in_double())
    merge<double>(p, s, threads);
  else
    merge<float>(p, s, threads);
}

void find_shard_gradient(Problem& p, const Shards& s, const Threads& threads) {
  if (p.classes > 0) backward(p, threads);
  clear_padding(p, p.grad, s.padding, threads);
}

void find_shard_target_gradient(Problem& p, const Shards& s, const Threads& threads) {
  if (p.classes > 0) backward_target(p, threads);
  clear_padding(p, p.target_grad, s.padding, threads);
}

}  // namespace fused_ce::cpu
