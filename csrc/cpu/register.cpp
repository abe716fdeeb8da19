// The operators on the CPU: scans the targets and hands the tiles to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <string>
#include <vector>

#include "../calls.h"
#include "huge_pages.h"
#include "kernels.h"
#include "span.h"
#include "sum.h"

namespace fused_ce::cpu {

namespace {

template <class Kernel>
void for_tiles(const Tiling& tiling, const Kernel& kernel) {
  if (tiling.count > tiling.grain)
    torch::stable::parallel_for(0, tiling.count, tiling.grain, kernel);
  else if (tiling.count > 0)
    kernel(0, tiling.count);
}

bool shares_rows(const Problem& p) {
  return has_long_rows(p) && p.rows < torch::stable::get_num_threads();
}

void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  torch::stable::parallel_for(0, count, 1, work);
}

// Raises for a target out of range, and finds what the sum of the losses is divided by.
void settle_targets(Problem& p, const std::vector<TargetScan>& scans) {
  double counted = static_cast<double>(p.rows);
  if (!p.probabilities) {
    CompensatedSum weights;
    for (const TargetScan& scan : scans) {
      if (scan.has_bad_index)
        throw std::out_of_range("Target " + std::to_string(scan.bad_index) + " is out of bounds.");
      weights.add(scan.weights);
    }
    counted = weights.value();
  }
  if (p.reduction == Reduction::kMean) {
    // A total weight of zero makes the mean nan, also where smoothing leaves a loss to divide.
    const bool undefined = counted == 0.0 && p.label_smoothing > 0.0;
    p.denominator = undefined ? std::numeric_limits<double>::quiet_NaN() : counted;
  }
}

void find_weight_sum(Problem& p) {
  if (p.label_smoothing > 0.0 && !p.probabilities) p.weight_sum = sum_weights(p);
}

void scan(Problem& p) {
  find_weight_sum(p);
  std::vector<TargetScan> scans;
  if (!p.probabilities) {
    const Tiling tiling = scan_tiling(p);
    scans.resize(tiling.count);
    for_tiles(tiling, [&](int64_t begin, int64_t end) {
      scan_targets(p, tiling, begin, end, scans.data());
    });
  }
  settle_targets(p, scans);
}

// A gradient needs the targets' sums, and targets in range, before it is written; a loss alone can
// wait for what its own pass over the targets finds.
void run_forward(Problem& p) {
  const Tiling tiling = row_tiling(p);
  std::vector<double> tile_losses(tiling.count);
  std::vector<TargetScan> scans;
  const bool shares = shares_rows(p), scans_first = p.grad.data || p.probabilities || shares;
  if (scans_first) {
    scan(p);
  } else {
    find_weight_sum(p);
    scans.resize(tiling.count);
  }
  if (shares)
    forward_shared(p, tiling, parallel_for, tile_losses.data());
  else
    for_tiles(tiling, [&](int64_t begin, int64_t end) {
      forward(p, tiling, begin, end, tile_losses.data(), scans.empty() ? nullptr : scans.data());
    });
  if (!scans_first) settle_targets(p, scans);
  if (p.reduction == Reduction::kNone) return;
  CompensatedSum sum;
  for (const double loss : tile_losses) sum.add(loss);
  store_value(sum.value() / p.denominator, p.loss, 0);
}

void run_backward(Problem& p) {
  const Tiling tiling = row_tiling(p);
  if (shares_rows(p))
    backward_shared(p, tiling, parallel_for);
  else
    for_tiles(tiling, [&](int64_t begin, int64_t end) { backward(p, tiling, begin, end); });
}

class Cpu {
 public:
  static constexpr bool kFindsTotals = false;

  explicit Cpu(const Tensor&) {}

  void forward(Problem& p) { run_forward(p); }

  void backward(Problem& p) {
    scan(p);
    run_backward(p);
  }

  void rescale(Problem& p) { backward(p); }

  void backward_target(Problem& p) {
    scan(p);
    const Tiling tiling = row_tiling(p);
    for_tiles(tiling,
              [&](int64_t begin, int64_t end) { cpu::backward_target(p, tiling, begin, end); });
  }

  void scale(const Elements& elements, const Operand& factor) {
    const double value = load_value<double>(factor, 0);
    constexpr int64_t kGrainBlocks = 16;
    torch::stable::parallel_for(
        0, scale_blocks(elements), kGrainBlocks,
        [&](int64_t begin, int64_t end) { cpu::scale(elements, value, begin, end); });
  }

  static bool is_known_to_be_one(const Operand& factor) {
    return load_value<double>(factor, 0) == 1.0;
  }

  static void prepare(const Tensor& grad) {
    advise_huge_pages(grad.data_ptr(), static_cast<size_t>(grad.numel()) * grad.element_size());
  }
};

void advise_huge_pages_cpu(const Tensor& memory) {
  if (memory.is_cpu()) Cpu::prepare(memory);
}

std::string instruction_set_cpu() { return instruction_set(); }

}  // namespace

}  // namespace fused_ce::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) { fused_ce::register_calls<fused_ce::cpu::Cpu>(m); }

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CompositeExplicitAutograd, m) {
  m.impl("check_overwritable", TORCH_BOX(&fused_ce::check_overwritable));
  m.impl("advise_huge_pages", TORCH_BOX(&fused_ce::cpu::advise_huge_pages_cpu));
  m.impl("instruction_set", TORCH_BOX(&fused_ce::cpu::instruction_set_cpu));
}
