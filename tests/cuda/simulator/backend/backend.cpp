// The package's operators on the CPU's tensors, computed by the CUDA kernels on the simulator.
//
// In the place of the registration of both backends: what is in front of the kernels, checks and
// all, is then what a GPU has in front of them, and the whole parity suite can ask.
#include <cstring>
#include <vector>

#include "../../../../csrc/cuda/kernels.h"
#include "../../../../csrc/divergence_operators.h"
#include "../../../../csrc/operators.h"
#include "../../../../csrc/pointwise_operators.h"
#include "../../../../csrc/shard_operators.h"
#include "../../../../csrc/statistics_operators.h"
#include "../engine.h"

namespace fused_ce::cuda {

namespace {

constexpr Device kDevice{3, true};

class Simulated {
 public:
  explicit Simulated(const Tensor&) {
    static uint64_t seed = 0;
    simulator::set_seed(seed++);
  }

  void forward(Problem& p) { cuda::forward(p, kDevice, workspace_for(p).pieces.data(), nullptr); }

  void backward(Problem& p) { cuda::backward(p, kDevice, When::kAlways, nullptr); }
  void rescale(Problem& p) { cuda::backward(p, kDevice, When::kUnlessGradOutputIsOne, nullptr); }
  void backward_target(Problem& p) { cuda::backward_target(p, kDevice, nullptr); }
  void backward_logit_scale(Problem& p) {
    cuda::backward_logit_scale(p, kDevice, workspace_for(p).pieces.data(), nullptr);
  }
  void find_statistics(Problem& p, const Statistics& s) {
    cuda::find_statistics(p, s, kDevice, nullptr);
  }
  void find_statistics_gradient(Problem& p, const Statistics& s) {
    cuda::find_statistics_gradient(p, s, kDevice, nullptr);
  }
  void evaluate_pointwise(const Problem& p, const Pointwise& s) {
    Workspace workspace(pointwise_workspace_bytes(p, kDevice));
    cuda::evaluate_pointwise(p, s, kDevice, When::kAlways, workspace.pieces.data(), nullptr);
  }
  void rescale_pointwise(const Problem& p, const Pointwise& s) {
    cuda::evaluate_pointwise(p, s, kDevice, When::kUnlessGradOutputIsOne, nullptr, nullptr);
  }
  void find_divergence(Problem& p, const Divergence& d) {
    Workspace workspace(divergence_workspace_bytes(p, kDevice));
    cuda::find_divergence(p, d, kDevice, workspace.pieces.data(), nullptr);
  }
  void find_divergence_gradient(Problem& p, const Divergence& d) {
    cuda::find_divergence_gradient(p, d, kDevice, When::kAlways, nullptr);
  }
  void rescale_divergence_gradient(Problem& p, const Divergence& d) {
    cuda::find_divergence_gradient(p, d, kDevice, When::kUnlessGradOutputIsOne, nullptr);
  }
  void pack_shard(const Problem& p, const Shards& s) {
    Workspace workspace(pack_workspace_bytes(p));
    cuda::pack_shard(p, s, kDevice, workspace.pieces.data(), nullptr);
  }
  void merge_shards(const Problem& p, const Shards& s) {
    Workspace workspace(merge_workspace_bytes(p, kDevice));
    cuda::merge_shards(p, s, kDevice, workspace.pieces.data(), nullptr);
  }
  void find_shard_gradient(const Problem& p, const Shards& s) {
    cuda::find_shard_gradient(p, s, kDevice, nullptr);
  }
  void find_shard_target_gradient(const Problem& p, const Shards& s) {
    cuda::find_shard_target_gradient(p, s, kDevice, nullptr);
  }
  void scale(const Elements& elements, const Operand& factor) {
    cuda::scale(elements, factor, kDevice, nullptr);
  }

  // Of contents that are as good as none.
  struct Workspace {
    struct alignas(16) Piece {
      unsigned char bytes[16];
    };
    explicit Workspace(size_t bytes) : pieces(bytes / sizeof(Piece) + 1) {
      std::memset(static_cast<void*>(pieces.data()), 0xcd, pieces.size() * sizeof(Piece));
    }
    std::vector<Piece> pieces;
  };
  static Workspace workspace_for(const Problem& p) {
    return Workspace(workspace_bytes(p, kDevice));
  }

  static bool is_known_to_be_one(const Operand&) { return false; }

  // An element that no kernel writes is nan.
  static void prepare(const Tensor& grad) {
    if (grad.numel()) std::memset(grad.data_ptr(), 0xff, grad.numel() * grad.element_size());
  }
};

std::string instruction_set() { return "simulator"; }

}  // namespace

}  // namespace fused_ce::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) {
  fused_ce::register_operators<fused_ce::cuda::Simulated>(m);
  fused_ce::register_statistics<fused_ce::cuda::Simulated>(m);
  fused_ce::register_pointwise<fused_ce::cuda::Simulated>(m);
  fused_ce::register_divergence<fused_ce::cuda::Simulated>(m);
  fused_ce::register_shards<fused_ce::cuda::Simulated>(m);
}

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CompositeExplicitAutograd, m) {
  m.impl("check_overwritable", &fused_ce::boxed<&fused_ce::check_overwritable>);
  m.impl("check_pointwise_overwritable", &fused_ce::boxed<&fused_ce::check_pointwise_overwritable>);
  m.impl("instruction_set", &fused_ce::boxed<&fused_ce::cuda::instruction_set>);
}
