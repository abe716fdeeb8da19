// The operators for pointwise losses in front of a backend; see operators.h.
//
// Besides what is said there, a backend's class has
//   void evaluate_pointwise(const Problem&, const Pointwise&);    what the problem has memory for
//   void rescale_pointwise(const Problem&, const Pointwise&);     the same, unless grad_output is 1
#pragma once

#include <cmath>

#include "operators.h"
#include "pointwise_problem.h"

namespace fused_ce {

// Throws unless `input` may be overwritten; see check_overwritable().
inline void check_pointwise_overwritable(const Tensor& input, const Tensor& target,
                                         const std::optional<Tensor>& weight,
                                         const std::optional<Tensor>& pos_weight) {
  check_overwritable(input, target, {});
  if (weight) check_apart(input, *weight, "weight");
  if (pos_weight) check_apart(input, *pos_weight, "pos_weight");
}

template <class Backend>
class PointwiseOperators {
  using OptionalTensor = std::optional<Tensor>;
  using OptionalType = std::optional<ScalarType>;

  // What a mean is over, besides the reductions of options.h.
  static constexpr int64_t kBatchMean = 3;

  static OptionArguments options_of(int64_t reduction) {
    OptionArguments options;
    options.reduction = reduction == 0 ? Reduction::kNone : Reduction::kSum;
    return options;
  }

  // What every operator begins with.
  struct Call {
    Call(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
         const OptionalTensor& pos_weight, int64_t loss, int64_t reduction, double alpha,
         double gamma)
        : input(input),
          builder(input, options_of(reduction), ProblemBuilder::Rows::kOfElements),
          reduces(reduction != 0),
          backend(input) {
      FCE_CHECK(loss >= 0 && loss <= static_cast<int64_t>(PointwiseLoss::kKlDivergenceOfLogs),
                "there is no pointwise loss " + std::to_string(loss));
      FCE_CHECK(reduction >= 0 && reduction <= kBatchMean,
                "reduction must be 0 (none), 1 (mean), 2 (sum) or 3 (batchmean), got " +
                    std::to_string(reduction));
      FCE_CHECK(alpha <= 1.0, "alpha must be at most 1, got " + std::to_string(alpha));
      FCE_CHECK(gamma >= 0.0 && std::isfinite(gamma),
                "gamma must be finite and not negative, got " + std::to_string(gamma));
      pointwise.loss = static_cast<PointwiseLoss>(loss);
      pointwise.alpha = alpha;
      pointwise.gamma = gamma;
      FCE_CHECK(!pos_weight || pointwise.loss == PointwiseLoss::kBinaryCrossEntropy,
                "pos_weight goes with a binary cross entropy alone");
      builder.set_element_target(target);
      if (weight) builder.add_expanded(pointwise.weight, *weight, "weight");
      if (pos_weight) builder.add_expanded(pointwise.pos_weight, *pos_weight, "pos_weight");
      if (reduction == 1) pointwise.denominator = static_cast<double>(input.numel());
      if (reduction == kBatchMean && input.dim() > 0)
        pointwise.denominator = static_cast<double>(input.size(0));
    }

    Tensor make_loss(const OptionalType& dtype) {
      Tensor loss = empty(reduces ? Sizes() : builder.row_sizes(),
                          dtype ? *dtype : input.scalar_type(), input);
      builder.set_loss(loss);
      return loss;
    }

    void run() { backend.evaluate_pointwise(builder.build(), pointwise); }

    const Tensor& input;
    ProblemBuilder builder;
    Pointwise pointwise;
    bool reduces;
    Backend backend;
  };

 public:
  static Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                        const OptionalTensor& pos_weight, int64_t loss, int64_t reduction,
                        double alpha, double gamma, OptionalType loss_dtype) {
    Call call(input, target, weight, pos_weight, loss, reduction, alpha, gamma);
    Tensor result = call.make_loss(loss_dtype);
    call.run();
    return result;
  }

  static std::tuple<Tensor, Tensor> forward_grad(const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight,
                                                 const OptionalTensor& pos_weight, int64_t loss,
                                                 int64_t reduction, double alpha, double gamma,
                                                 OptionalType loss_dtype) {
    Call call(input, target, weight, pos_weight, loss, reduction, alpha, gamma);
    Tensor grad = Operators<Backend>::empty_gradient(input);
    call.builder.set_grad(grad);
    Tensor result = call.make_loss(loss_dtype);
    call.run();
    return {result, grad};
  }

  static Handle forward_grad_(const Tensor& input, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& pos_weight,
                              int64_t loss, int64_t reduction, double alpha, double gamma,
                              OptionalType loss_dtype) {
    check_pointwise_overwritable(input, target, weight, pos_weight);
    Call call(input, target, weight, pos_weight, loss, reduction, alpha, gamma);
    call.builder.set_grad(input);
    Handle result = handle_of(call.make_loss(loss_dtype));
    call.run();
    return result;
  }

  static Tensor backward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& pos_weight, const Tensor& grad_output, int64_t loss,
                         int64_t reduction, double alpha, double gamma) {
    Call call(input, target, weight, pos_weight, loss, reduction, alpha, gamma);
    Tensor grad = Operators<Backend>::empty_gradient(input);
    call.builder.set_grad(grad);
    call.builder.set_grad_output(grad_output);
    call.run();
    return grad;
  }

  static Handle backward_(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                          const OptionalTensor& pos_weight, const Tensor& grad_output, int64_t loss,
                          int64_t reduction, double alpha, double gamma) {
    check_pointwise_overwritable(input, target, weight, pos_weight);
    check_apart(input, grad_output, "incoming gradient");
    Call call(input, target, weight, pos_weight, loss, reduction, alpha, gamma);
    call.builder.set_grad(input);
    call.builder.set_grad_output(grad_output);
    Handle result = handle_of(input);
    call.run();
    return result;
  }

  static Handle rescale_(const Tensor& grad, const Tensor& grad_output, const Tensor& input,
                         const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& pos_weight, int64_t loss, int64_t reduction,
                         double alpha, double gamma) {
    Handle result = handle_of(grad);
    if (Backend::is_known_to_be_one(scalar_of(grad_output, grad))) return result;
    Call call(input, target, weight, pos_weight, loss, reduction, alpha, gamma);
    call.builder.set_grad(grad);
    call.builder.set_grad_output(grad_output);
    call.backend.rescale_pointwise(call.builder.build(), call.pointwise);
    return result;
  }
};

// As register_operators().
template <class Backend, class Library>
void register_pointwise(Library& m) {
  using All = PointwiseOperators<Backend>;
  m.impl("pointwise", &boxed<&All::forward>);
  m.impl("pointwise_grad", &boxed<&All::forward_grad>);
  m.impl("pointwise_grad_", &boxed<&All::forward_grad_>);
  m.impl("pointwise_backward", &boxed<&All::backward>);
  m.impl("pointwise_backward_", &boxed<&All::backward_>);
  m.impl("pointwise_rescale_", &boxed<&All::rescale_>);
  m.impl("graph_pointwise", &boxed<&All::forward>);
  m.impl("graph_pointwise_backward", &boxed<&All::backward>);
}

}  // namespace fused_ce
