// The operators on the CPU: allocates the results, scans the targets, hands the tiles to threads.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "huge_pages.h"
#include "kernels.h"
#include "span.h"
#include "sum.h"

namespace fused_ce::cpu {

namespace {

Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(Sizes sizes, ScalarType dtype) {
  std::array<int64_t, kMaxRowDims + 1> strides;
  FCE_CHECK(sizes.size() <= strides.size(), "the tensor has too many dimensions");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  return empty_strided(sizes, Sizes(strides.data(), sizes.size()), dtype);
}

// With the strides of a dense tensor, else contiguous: what autograd keeps as a leaf's .grad.
Tensor empty_gradient(const Tensor& like) {
  const Sizes sizes = like.sizes();
  const ScalarType dtype = like.scalar_type();
  Tensor grad = is_dense(like) ? empty_strided(sizes, like.strides(), dtype) : empty(sizes, dtype);
  advise_huge_pages(grad.data_ptr(), static_cast<size_t>(grad.numel()) * grad.element_size());
  return grad;
}

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
void scan(Problem& p) {
  double counted = static_cast<double>(p.rows);
  if (!p.probabilities) {
    const Tiling tiling = scan_tiling(p);
    std::vector<TargetScan> scans(tiling.count);
    for_tiles(tiling, [&](int64_t begin, int64_t end) {
      scan_targets(p, tiling, begin, end, scans.data());
    });
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
  if (p.label_smoothing > 0.0 && !p.probabilities) p.weight_sum = sum_weights(p);
}

void run_forward(Problem& p) {
  const Tiling tiling = row_tiling(p);
  std::vector<double> tile_losses(tiling.count);
  if (shares_rows(p))
    forward_shared(p, tiling, parallel_for, tile_losses.data());
  else
    for_tiles(tiling, [&](int64_t begin, int64_t end) {
      forward(p, tiling, begin, end, tile_losses.data());
    });
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

// One call of any forward operator: which of the outputs are wanted, and where they are.
struct Forward {
  Forward(const Arguments& arguments, std::optional<ScalarType> loss_dtype)
      : builder(arguments),
        reduction(arguments.reduction),
        loss_type(loss_dtype ? *loss_dtype : arguments.input.scalar_type()) {}

  void keep_stats() {
    stats = empty(builder.stats_sizes(), builder.stats_dtype());
    builder.set_stats(*stats);
  }

  Tensor run(const std::optional<Tensor>& grad) {
    const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
    Tensor loss = empty(none ? builder.row_sizes() : Sizes(), loss_type);
    builder.set_loss(loss);
    if (grad) builder.set_grad(*grad);
    Problem& problem = builder.build();
    scan(problem);
    run_forward(problem);
    return loss;
  }

  ProblemBuilder builder;
  int64_t reduction;
  ScalarType loss_type;
  std::optional<Tensor> stats;
};

void write_gradient(const Arguments& arguments, const Tensor& stats, const Tensor& grad_output,
                    const Tensor& grad) {
  ProblemBuilder builder(arguments);
  builder.set_stats(stats);
  builder.set_grad_output(grad_output);
  builder.set_grad(grad);
  Problem& problem = builder.build();
  scan(problem);
  run_backward(problem);
}

double read_scalar(const Tensor& value) {
  FCE_CHECK(value.numel() == 1 && value.is_cpu(), "grad_output must hold one value on the CPU");
  const Elements element = elements_of(value);
  return load_value<double>(Operand{element.data, element.dtype}, 0);
}

Tensor forward_cpu(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                   int64_t reduction, int64_t ignore_index, double label_smoothing,
                   std::optional<ScalarType> loss_dtype) {
  const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
  return Forward(arguments, loss_dtype).run(std::nullopt);
}

std::tuple<Tensor, Tensor> forward_stats_cpu(const Tensor& input, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t reduction,
                                             int64_t ignore_index, double label_smoothing,
                                             std::optional<ScalarType> loss_dtype) {
  const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
  Forward call(arguments, loss_dtype);
  call.keep_stats();
  Tensor loss = call.run(std::nullopt);
  return {loss, *call.stats};
}

std::tuple<Tensor, Tensor, Tensor> forward_grad_cpu(const Tensor& input, const Tensor& target,
                                                    const std::optional<Tensor>& weight,
                                                    int64_t reduction, int64_t ignore_index,
                                                    double label_smoothing,
                                                    std::optional<ScalarType> loss_dtype) {
  const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
  Forward call(arguments, loss_dtype);
  call.keep_stats();
  Tensor grad = empty_gradient(input);
  Tensor loss = call.run(grad);
  return {loss, *call.stats, grad};
}

Tensor forward_grad_cpu_(const Tensor& input, const Tensor& target,
                         const std::optional<Tensor>& weight, int64_t reduction,
                         int64_t ignore_index, double label_smoothing,
                         std::optional<ScalarType> loss_dtype) {
  const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
  check_overwritable(input, target, weight);
  return Forward(arguments, loss_dtype).run(input);
}

Tensor backward_cpu(const Tensor& input, const Tensor& target, const Tensor& stats,
                    const Tensor& grad_output, const std::optional<Tensor>& weight,
                    int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
  Tensor grad = empty_gradient(input);
  write_gradient(arguments, stats, grad_output, grad);
  return grad;
}

Tensor backward_cpu_(const Tensor& input, const Tensor& target, const Tensor& stats,
                   const Tensor& grad_output, const std::optional<Tensor>& weight,
                   int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
  check_overwritable(input, target, weight);
  check_apart(input, grad_output);
  check_apart(input, stats);
  write_gradient(arguments, stats, grad_output, input);
  return input;
}

Tensor backward_target_cpu(const Tensor& input, const Tensor& target, const Tensor& stats,
                           const Tensor& grad_output, const std::optional<Tensor>& weight,
                           int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
  ProblemBuilder builder(arguments);
  FCE_CHECK(builder.has_probabilities(), "only a target of probabilities has a gradient");
  Tensor target_grad = empty_gradient(target);
  builder.set_stats(stats);
  builder.set_grad_output(grad_output);
  builder.set_target_grad(target_grad);
  Problem& problem = builder.build();
  scan(problem);
  const Tiling tiling = row_tiling(problem);
  for_tiles(tiling,
            [&](int64_t begin, int64_t end) { backward_target(problem, tiling, begin, end); });
  return target_grad;
}

Tensor rescale_cpu_(const Tensor& grad, const Tensor& grad_output, const Tensor& input,
                  const Tensor& target, const Tensor& stats, const std::optional<Tensor>& weight,
                  int64_t reduction, int64_t ignore_index, double label_smoothing) {
  if (read_scalar(grad_output) == 1.0) return grad;
  const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
  write_gradient(arguments, stats, grad_output, grad);
  return grad;
}

Tensor scale_cpu_(const Tensor& grad, const Tensor& grad_output) {
  const double factor = read_scalar(grad_output);
  if (factor == 1.0 || grad.numel() == 0) return grad;
  constexpr int64_t kGrainBlocks = 16;
  const Elements elements = elements_of(grad);
  torch::stable::parallel_for(
      0, scale_blocks(elements), kGrainBlocks,
      [&](int64_t begin, int64_t end) { scale(elements, factor, begin, end); });
  return grad;
}

std::string instruction_set_cpu() { return instruction_set(); }

}  // namespace

}  // namespace fused_ce::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) {
  using namespace fused_ce::cpu;
  m.impl("forward", TORCH_BOX(&forward_cpu));
  m.impl("forward_stats", TORCH_BOX(&forward_stats_cpu));
  m.impl("forward_grad", TORCH_BOX(&forward_grad_cpu));
  m.impl("forward_grad_", TORCH_BOX(&forward_grad_cpu_));
  m.impl("backward", TORCH_BOX(&backward_cpu));
  m.impl("backward_", TORCH_BOX(&backward_cpu_));
  m.impl("backward_target", TORCH_BOX(&backward_target_cpu));
  m.impl("graph_forward", TORCH_BOX(&forward_stats_cpu));
  m.impl("graph_backward", TORCH_BOX(&backward_cpu));
  m.impl("graph_backward_target", TORCH_BOX(&backward_target_cpu));
  m.impl("rescale_", TORCH_BOX(&rescale_cpu_));
  m.impl("scale_", TORCH_BOX(&scale_cpu_));
}

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CompositeExplicitAutograd, m) {
  m.impl("check_overwritable", TORCH_BOX(&fused_ce::check_overwritable));
  m.impl("instruction_set", TORCH_BOX(&fused_ce::cpu::instruction_set_cpu));
}
