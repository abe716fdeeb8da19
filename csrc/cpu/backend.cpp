// The operators on the CPU, with torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "../divergence_operators.h"
#include "../operators.h"
#include "../pointwise_operators.h"
#include "../shard_operators.h"
#include "../statistics_operators.h"
#include "divergence/divergence.h"
#include "kernels.h"
#include "pointwise/pointwise.h"
#include "shard/shard.h"
#include "statistics/statistics.h"
#include "vector/huge_pages.h"
#include "vector/span.h"

namespace fused_ce::cpu {

namespace {

constexpr Threads kThreads{
    [] { return static_cast<int64_t>(torch::stable::get_num_threads()); },
    [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
      torch::stable::parallel_for(0, count, grain, work);
    }};

class Cpu {
 public:
  explicit Cpu(const Tensor&) {}

  void forward(Problem& p) { cpu::forward(p, kThreads); }
  void backward(Problem& p) { cpu::backward(p, kThreads); }
  void rescale(Problem& p) { backward(p); }
  void backward_target(Problem& p) { cpu::backward_target(p, kThreads); }
  void backward_logit_scale(Problem& p) { cpu::backward_logit_scale(p, kThreads); }

  void find_statistics(Problem& p, const Statistics& s) { cpu::find_statistics(p, s, kThreads); }
  void find_statistics_gradient(Problem& p, const Statistics& s) {
    cpu::find_statistics_gradient(p, s, kThreads);
  }

  void evaluate_pointwise(const Problem& p, const Pointwise& s) {
    cpu::evaluate_pointwise(p, s, kThreads);
  }
  void rescale_pointwise(const Problem& p, const Pointwise& s) { evaluate_pointwise(p, s); }
  void find_divergence(Problem& p, const Divergence& d) { cpu::find_divergence(p, d, kThreads); }
  void find_divergence_gradient(Problem& p, const Divergence& d) {
    cpu::find_divergence_gradient(p, d, kThreads);
  }
  void rescale_divergence_gradient(Problem& p, const Divergence& d) {
    find_divergence_gradient(p, d);
  }

  void pack_shard(const Problem& p, const Shards& s) { cpu::pack_shard(p, s, kThreads); }
  void merge_shards(Problem& p, const Shards& s) { cpu::merge_shards(p, s, kThreads); }
  void find_shard_gradient(Problem& p, const Shards& s) {
    cpu::find_shard_gradient(p, s, kThreads);
  }
  void find_shard_target_gradient(Problem& p, const Shards& s) {
    cpu::find_shard_target_gradient(p, s, kThreads);
  }

  void scale(const Elements& elements, const Operand& factor) {
    cpu::scale(elements, load_value<double>(factor, 0), kThreads);
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

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) {
  fused_ce::register_operators<fused_ce::cpu::Cpu>(m);
  fused_ce::register_statistics<fused_ce::cpu::Cpu>(m);
  fused_ce::register_pointwise<fused_ce::cpu::Cpu>(m);
  fused_ce::register_divergence<fused_ce::cpu::Cpu>(m);
  fused_ce::register_shards<fused_ce::cpu::Cpu>(m);
}

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CompositeExplicitAutograd, m) {
  m.impl("check_overwritable", &fused_ce::boxed<&fused_ce::check_overwritable>);
  m.impl("check_pointwise_overwritable", &fused_ce::boxed<&fused_ce::check_pointwise_overwritable>);
  m.impl("advise_huge_pages", &fused_ce::boxed<&fused_ce::cpu::advise_huge_pages_cpu>);
  m.impl("instruction_set", &fused_ce::boxed<&fused_ce::cpu::instruction_set_cpu>);
}
