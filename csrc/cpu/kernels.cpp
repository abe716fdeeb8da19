// What every call consists of: a scan of the targets, the kernels for rows, and the sum of the
// losses, each over tiles that threads share out between them.
//
// A gradient needs the targets in range, and what they add up to, before it is written; a loss
// alone can wait for what its own pass over the targets finds.
#include "kernels.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "rows/parts.h"
#include "rows/row_kernels.h"
#include "vector/simd.h"
#include "vector/span.h"
#include "vector/sum.h"

namespace fused_ce::cpu {

namespace {

// Calls f with a value of the type that the problem's arithmetic is done in.
template <class F>
void with_accumulation_type(const Problem& p, const F& f) {
  if (p.accumulates_in_double())
    f(double{});
  else
    f(float{});
}

// The problem of all classes, as far as it is about targets.
Problem vocabulary_of(const Problem& shard) {
  Problem p = shard;
  p.classes = shard.vocabulary;
  p.vocabulary = 0;
  p.options.weight = {};
  return p;
}

std::vector<TargetScan> scan_targets(const Problem& p, const Threads& threads, bool weighs) {
  if (p.is_shard()) return scan_targets(vocabulary_of(p), threads, false);
  constexpr int64_t kScanRows = 4096;
  const Tiling tiling = make_tiling(p, kScanRows, 4);
  std::vector<TargetScan> scans(tiling.count);
  for_tiles(tiling, threads, [&](int64_t begin, int64_t end) {
    simd::run([&] {
      for (int64_t t = begin; t < end; t++) scans[t] = scan_tile(p, Tile(p, tiling, t), weighs);
    });
  });
  return scans;
}

// Raises for a target out of range.
void check_range(const std::vector<TargetScan>& scans) {
  for (const TargetScan& scan : scans)
    if (scan.has_bad_index)
      throw std::out_of_range("Target " + std::to_string(scan.bad_index) + " is out of bounds.");
}

// Whether it takes a scan to know which rows count.
bool scans_targets(const Problem& p) { return !p.probabilities || p.weighs_samples(); }

// Of the rows that count, whose targets must be in range.
TargetScan add_scans(const Problem& p, const std::vector<TargetScan>& scans) {
  const auto rows = static_cast<double>(p.rows);
  if (!scans_targets(p)) return {rows, rows, p.rows};
  check_range(scans);
  CompensatedSum weights, sample_weights;
  TargetScan all;
  for (const TargetScan& scan : scans) {
    weights.add(scan.weights);
    sample_weights.add(scan.sample_weights);
    all.counted += scan.counted;
  }
  all.weights = weights.value(), all.sample_weights = sample_weights.value();
  return all;
}

}  // namespace

void find_denominators(Problem& p, const TargetScan& all) {
  if (!p.divides()) return;
  const auto set = [&](double of_losses, double of_z_losses) {
    p.known.denominator = of_losses, p.known.z_denominator = of_z_losses;
  };
  if (all.counted == 0 && p.options.on_all_ignored == OnAllIgnored::kZero) return set(1.0, 1.0);
  if (const Values& given = p.options.denominator; given.data)
    return set(load_value<double>(given, 0), load_value<double>(given, given.count - 1));
  // A total weight of zero makes the mean nan, also where smoothing leaves a loss to divide.
  const bool is_undefined = all.weights == 0.0 && p.is_smoothed();
  set(is_undefined ? std::numeric_limits<double>::quiet_NaN() : all.weights, all.sample_weights);
}

TargetScan scan_rows(const Problem& p, const Threads& threads) {
  std::vector<TargetScan> scans;
  if (scans_targets(p)) scans = scan_targets(p, threads, p.options.weight.data);
  return add_scans(p, scans);
}

double sum_class_weights(const Problem& p) {
  if (!p.options.weight.data) return static_cast<double>(p.classes);
  CompensatedSum sum;
  for (int64_t c = 0; c < p.classes; c++) sum.add(load_value<double>(p.options.weight, c));
  return sum.value();
}

namespace {

bool shares_rows(const Problem& p, const Threads& threads) {
  return has_long_rows(p) && p.rows < threads.count();
}

// What a backward needs to know before it writes: that the targets are in range, those of a shard
// in that of the whole vocabulary.
void begin_backward(Problem& p, const Threads& threads) {
  if (!p.probabilities && !p.allows_bad_targets()) check_targets(p, threads);
  p.known = *p.totals;
}

}  // namespace

void check_targets(const Problem& p, const Threads& threads) {
  check_range(scan_targets(p, threads, false));
}

void find_denominators(Problem& p, const Threads& threads) {
  std::vector<TargetScan> scans;
  if (p.weighs_samples()) scans = scan_targets(p, threads, false);
  find_denominators(p, add_scans(p, scans));
}

void find_shard_sums(const Problem& p, const Threads& threads) {
  const Tiling tiling = row_tiling(p);
  std::vector<double> no_losses(tiling.count);
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    if (shares_rows(p, threads)) return forward_shared<A>(p, tiling, threads, no_losses.data());
    forward_tiles<A>(p, tiling, threads, no_losses.data(), nullptr);
  });
}

void store_loss(const Problem& p, const std::vector<double>& tile_losses) {
  CompensatedSum sum;
  for (const double loss : tile_losses) sum.add(loss);
  store_value(sum.value() / p.known.denominator, p.loss, 0);
}

void forward(Problem& p, const Threads& threads) {
  const Tiling tiling = row_tiling(p);
  std::vector<double> tile_losses(tiling.count);
  std::vector<TargetScan> scans;
  const bool shares = shares_rows(p, threads);
  const bool mixes_means = p.options.z_loss > 0.0 && p.divides();
  const bool scans_first = scans_targets(p) && (p.grad.data || shares || mixes_means);
  const bool scans_along = scans_targets(p) && !scans_first;
  if (p.is_smoothed() && !p.probabilities) p.known.weight_sum = sum_class_weights(p);
  if (scans_first) scans = scan_targets(p, threads, p.options.weight.data);
  if (scans_along)
    scans.resize(tiling.count);
  else
    find_denominators(p, add_scans(p, scans));
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    if (shares) return forward_shared<A>(p, tiling, threads, tile_losses.data());
    forward_tiles<A>(p, tiling, threads, tile_losses.data(), scans_along ? scans.data() : nullptr);
  });
  if (scans_along) find_denominators(p, add_scans(p, scans));
  if (p.totals) *p.totals = p.known;
  if (p.reduces()) store_loss(p, tile_losses);
}

void backward(Problem& p, const Threads& threads) {
  begin_backward(p, threads);
  const Tiling tiling = row_tiling(p);
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    if (shares_rows(p, threads)) return backward_shared<A>(p, tiling, threads);
    backward_tiles<A>(p, tiling, threads);
  });
}

void backward_target(Problem& p, const Threads& threads) {
  begin_backward(p, threads);
  const Tiling tiling = row_tiling(p);
  with_accumulation_type(
      p, [&](auto zero) { backward_target_tiles<decltype(zero)>(p, tiling, threads); });
}

void backward_logit_scale(Problem& p, const Threads& threads) {
  begin_backward(p, threads);
  const Tiling tiling = row_tiling(p);
  std::vector<double> tile_sums(tiling.count);
  with_accumulation_type(p, [&](auto zero) {
    backward_scale_tiles<decltype(zero)>(p, tiling, threads, tile_sums.data());
  });
  CompensatedSum sum;
  for (const double part : tile_sums) sum.add(part);
  store_value(sum.value(), p.scale_grad, 0);
}

const char* instruction_set() { return simd::level_name(); }

}  // namespace fused_ce::cpu
