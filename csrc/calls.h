// The operators in front of a backend: what is checked, allocated and handed back, in which order.
//
// Each backend's registration file includes this with a class of its own, made anew for every call:
//   static constexpr bool kFindsTotals;             on the device: statistics have a column more
//   explicit Backend(const Tensor& input);          the device and stream of the work
//   void forward(Problem&);                         targets out of range included
//   void backward(Problem&), backward_target(Problem&);
//   void rescale(Problem&);                         backward(), unless grad_output is 1
//   void scale(const Elements&, const Operand&);    the factor of one value
//   static bool is_known_to_be_one(const Operand&); false where the host cannot look
//   static void prepare(const Tensor&);             for a gradient that was just allocated
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "checks.h"

namespace fused_ce {

// On the device of `like`.
inline Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type, device_type, device_index,
                                                  &handle));
  return Tensor(handle);
}

inline Tensor empty(Sizes sizes, ScalarType dtype, const Tensor& like) {
  std::array<int64_t, kMaxRowDims + 1> strides;
  FCE_CHECK(sizes.size() <= strides.size(), "the tensor has too many dimensions");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  return empty_strided(sizes, Sizes(strides.data(), sizes.size()), dtype, like);
}

template <class Backend>
class Calls {
  using OptionalTensor = std::optional<Tensor>;

  // With the strides of a dense tensor, else contiguous: what autograd keeps as a leaf's .grad.
  static Tensor empty_gradient(const Tensor& like) {
    const Sizes sizes = like.sizes();
    const ScalarType dtype = like.scalar_type();
    Tensor grad = is_dense(like) ? empty_strided(sizes, like.strides(), dtype, like)
                                 : empty(sizes, dtype, like);
    Backend::prepare(grad);
    return grad;
  }

  // One call of any forward operator: which of the outputs are wanted, and where they are.
  struct Forward {
    Forward(const Arguments& arguments, std::optional<ScalarType> loss_dtype)
        : input(arguments.input),
          builder(arguments, Backend::kFindsTotals),
          reduction(arguments.reduction),
          loss_type(loss_dtype ? *loss_dtype : input.scalar_type()) {}

    void keep_stats() {
      stats = empty(builder.stats_sizes(), builder.stats_dtype(), input);
      builder.set_stats(*stats);
    }

    Tensor run(const OptionalTensor& grad) {
      const bool none = static_cast<Reduction>(reduction) == Reduction::kNone;
      Tensor loss = empty(none ? builder.row_sizes() : Sizes(), loss_type, input);
      builder.set_loss(loss);
      if (grad) builder.set_grad(*grad);
      Backend(input).forward(builder.build());
      return loss;
    }

    const Tensor& input;
    ProblemBuilder builder;
    int64_t reduction;
    ScalarType loss_type;
    OptionalTensor stats;
  };

  // One call of any backward operator.
  struct Backward {
    Backward(const Arguments& arguments, const Tensor& stats, const Tensor& grad_output)
        : builder(arguments, Backend::kFindsTotals), backend(arguments.input) {
      builder.set_stats(stats);
      builder.set_grad_output(grad_output);
    }

    ProblemBuilder builder;
    Backend backend;
  };

 public:
  static Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                        int64_t reduction, int64_t ignore_index, double label_smoothing,
                        std::optional<ScalarType> loss_dtype) {
    const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
    return Forward(arguments, loss_dtype).run(std::nullopt);
  }

  static std::tuple<Tensor, Tensor> forward_stats(const Tensor& input, const Tensor& target,
                                                  const OptionalTensor& weight, int64_t reduction,
                                                  int64_t ignore_index, double label_smoothing,
                                                  std::optional<ScalarType> loss_dtype) {
    const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
    Forward call(arguments, loss_dtype);
    call.keep_stats();
    Tensor loss = call.run(std::nullopt);
    return {loss, *call.stats};
  }

  static std::tuple<Tensor, Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& target,
                                                         const OptionalTensor& weight,
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

  static Tensor forward_grad_(const Tensor& input, const Tensor& target,
                              const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                              double label_smoothing, std::optional<ScalarType> loss_dtype) {
    const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
    check_overwritable(input, target, weight);
    return Forward(arguments, loss_dtype).run(input);
  }

  static Tensor backward(const Tensor& input, const Tensor& target, const Tensor& stats,
                         const Tensor& grad_output, const OptionalTensor& weight, int64_t reduction,
                         int64_t ignore_index, double label_smoothing) {
    const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
    Backward call(arguments, stats, grad_output);
    Tensor grad = empty_gradient(input);
    call.builder.set_grad(grad);
    call.backend.backward(call.builder.build());
    return grad;
  }

  static Tensor backward_(const Tensor& input, const Tensor& target, const Tensor& stats,
                          const Tensor& grad_output, const OptionalTensor& weight,
                          int64_t reduction, int64_t ignore_index, double label_smoothing) {
    const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
    check_overwritable(input, target, weight);
    check_apart(input, grad_output);
    check_apart(input, stats);
    Backward call(arguments, stats, grad_output);
    call.builder.set_grad(input);
    call.backend.backward(call.builder.build());
    return input;
  }

  static Tensor backward_target(const Tensor& input, const Tensor& target, const Tensor& stats,
                                const Tensor& grad_output, const OptionalTensor& weight,
                                int64_t reduction, int64_t ignore_index, double label_smoothing) {
    const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
    Backward call(arguments, stats, grad_output);
    FCE_CHECK(call.builder.has_probabilities(), "only a target of probabilities has a gradient");
    Tensor target_grad = empty_gradient(target);
    call.builder.set_target_grad(target_grad);
    call.backend.backward_target(call.builder.build());
    return target_grad;
  }

  static Tensor rescale_(const Tensor& grad, const Tensor& grad_output, const Tensor& input,
                         const Tensor& target, const Tensor& stats, const OptionalTensor& weight,
                         int64_t reduction, int64_t ignore_index, double label_smoothing) {
    if (Backend::is_known_to_be_one(scalar_of(grad_output, grad))) return grad;
    const Arguments arguments{input, target, weight, reduction, ignore_index, label_smoothing};
    Backward call(arguments, stats, grad_output);
    call.builder.set_grad(grad);
    call.backend.rescale(call.builder.build());
    return grad;
  }

  static Tensor scale_(const Tensor& grad, const Tensor& grad_output) {
    const Operand factor = scalar_of(grad_output, grad);
    if (grad.numel() == 0 || Backend::is_known_to_be_one(factor)) return grad;
    Backend(grad).scale(elements_of(grad), factor);
    return grad;
  }
};

// To be called in a STABLE_TORCH_LIBRARY_IMPL of the backend's dispatch key.
template <class Backend, class Library>
void register_calls(Library& m) {
  using Operators = Calls<Backend>;
  m.impl("forward", TORCH_BOX(&Operators::forward));
  m.impl("forward_stats", TORCH_BOX(&Operators::forward_stats));
  m.impl("forward_grad", TORCH_BOX(&Operators::forward_grad));
  m.impl("forward_grad_", TORCH_BOX(&Operators::forward_grad_));
  m.impl("backward", TORCH_BOX(&Operators::backward));
  m.impl("backward_", TORCH_BOX(&Operators::backward_));
  m.impl("backward_target", TORCH_BOX(&Operators::backward_target));
  m.impl("graph_forward", TORCH_BOX(&Operators::forward_stats));
  m.impl("graph_backward", TORCH_BOX(&Operators::backward));
  m.impl("graph_backward_target", TORCH_BOX(&Operators::backward_target));
  m.impl("rescale_", TORCH_BOX(&Operators::rescale_));
  m.impl("scale_", TORCH_BOX(&Operators::scale_));
}

}  // namespace fused_ce
