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

template <class Work>
void for_tiles(const Tiling& tiling, const Threads& threads, const Work& work) {
  if (tiling.count > tiling.grain)
    threads.run(tiling.count, tiling.grain, work);
  else if (tiling.count > 0)
    work(0, tiling.count);
}

std::vector<TargetScan> scan_targets(const Problem& p, const Threads& threads, bool weighs) {
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

// The weight of the rows that count, whose targets must be in range.
double counted_weight(const Problem& p, const std::vector<TargetScan>& scans) {
  if (p.probabilities) return static_cast<double>(p.rows);
  check_range(scans);
  CompensatedSum weights;
  for (const TargetScan& scan : scans) weights.add(scan.weights);
  return weights.value();
}

double denominator_for(const Problem& p, double counted) {
  if (!p.divides()) return 1.0;
  if (const Values& given = p.options.denominator; given.data) return load_value<double>(given, 0);
  // A total weight of zero makes the mean nan, also where smoothing leaves a loss to divide.
  const bool is_undefined = counted == 0.0 && p.is_smoothed();
  return is_undefined ? std::numeric_limits<double>::quiet_NaN() : counted;
}

double sum_class_weights(const Problem& p) {
  if (!p.options.weight.data) return static_cast<double>(p.classes);
  CompensatedSum sum;
  for (int64_t c = 0; c < p.classes; c++) sum.add(load_value<double>(p.options.weight, c));
  return sum.value();
}

bool shares_rows(const Problem& p, const Threads& threads) {
  return has_long_rows(p) && p.rows < threads.count();
}

// What a backward needs to know before it writes: that the targets are in range.
void begin_backward(Problem& p, const Threads& threads) {
  if (!p.probabilities) check_targets(p, threads);
  p.known = *p.totals;
}

}  // namespace

void check_targets(const Problem& p, const Threads& threads) {
  check_range(scan_targets(p, threads, false));
}

void forward(Problem& p, const Threads& threads) {
  const Tiling tiling = row_tiling(p);
  std::vector<double> tile_losses(tiling.count);
  std::vector<TargetScan> scans;
  const bool shares = shares_rows(p, threads);
  const bool scans_first = !p.probabilities && (p.grad.data || shares);
  const bool scans_along = !p.probabilities && !scans_first;
  if (p.is_smoothed() && !p.probabilities) p.known.weight_sum = sum_class_weights(p);
  if (scans_first) scans = scan_targets(p, threads, p.options.weight.data);
  if (scans_along)
    scans.resize(tiling.count);
  else
    p.known.denominator = denominator_for(p, counted_weight(p, scans));
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    if (shares) return forward_shared<A>(p, tiling, threads, tile_losses.data());
    for_tiles(tiling, threads, [&](int64_t begin, int64_t end) {
      forward_tiles<A>(p, tiling, begin, end, tile_losses.data(),
                       scans_along ? scans.data() : nullptr);
    });
  });
  if (scans_along) p.known.denominator = denominator_for(p, counted_weight(p, scans));
  if (p.totals) *p.totals = p.known;
  if (!p.reduces()) return;
  CompensatedSum sum;
  for (const double loss : tile_losses) sum.add(loss);
  store_value(sum.value() / p.known.denominator, p.loss, 0);
}

void backward(Problem& p, const Threads& threads) {
  begin_backward(p, threads);
  const Tiling tiling = row_tiling(p);
  with_accumulation_type(p, [&](auto zero) {
    using A = decltype(zero);
    if (shares_rows(p, threads)) return backward_shared<A>(p, tiling, threads);
    for_tiles(tiling, threads,
              [&](int64_t begin, int64_t end) { backward_tiles<A>(p, tiling, begin, end); });
  });
}

void backward_target(Problem& p, const Threads& threads) {
  begin_backward(p, threads);
  const Tiling tiling = row_tiling(p);
  with_accumulation_type(p, [&](auto zero) {
    for_tiles(tiling, threads, [&](int64_t begin, int64_t end) {
      backward_target_tiles<decltype(zero)>(p, tiling, begin, end);
    });
  });
}

const char* instruction_set() { return simd::level_name(); }

}  // namespace fused_ce::cpu
