// The operators for row statistics in front of a backend; see operators.h.
//
// Besides what is said there, a backend's class has
//   void find_statistics(Problem&, const Statistics&);
//   void find_statistics_gradient(Problem&, const Statistics&);
#pragma once

#include "operators.h"
#include "statistics_problem.h"

namespace fused_ce {

template <class Backend>
class StatisticsOperators {
  using OptionalTensor = std::optional<Tensor>;

  static OptionArguments options_of(int64_t ignore_index, double softcap) {
    OptionArguments options;
    options.ignore_index = ignore_index;
    options.softcap = softcap;
    return options;
  }

  // What both operators begin with.
  struct Call {
    Call(const Tensor& input, const OptionalTensor& target, double temperature, double softcap,
         int64_t ignore_index)
        : input(input), builder(input, options_of(ignore_index, softcap)), backend(input) {
      constexpr double kMin = 1e-30, kMax = 1e30;  // whose inverse is a normal float as well
      FCE_CHECK(temperature >= kMin && temperature <= kMax,
                "temperature must be from 1e-30 to 1e30, got " + std::to_string(temperature));
      statistics.temperature = temperature;
      if (!target) return;
      builder.set_target(*target);
      FCE_CHECK(!builder.has_probabilities(), "target must hold class indices");
    }

    Tensor make(Operand& operand, ScalarType dtype, bool wanted, const char* name) {
      constexpr int64_t kNothing[] = {0};
      if (!wanted) return empty(kNothing, dtype, input);
      Tensor result = empty(builder.row_sizes(), dtype, input);
      builder.add_rows(operand, result, name);
      return result;
    }

    const Tensor& input;
    ProblemBuilder builder;
    Statistics statistics;
    Backend backend;
  };

  static void run_backward(const Tensor& input, const Tensor& grad, const OptionalTensor& target,
                           const Tensor& entropy, const Tensor& stats,
                           const OptionalTensor& grad_log_prob, const OptionalTensor& grad_entropy,
                           const OptionalTensor& grad_logsumexp, double temperature, double softcap,
                           int64_t ignore_index) {
    Call call(input, target, temperature, softcap, ignore_index);
    ProblemBuilder& builder = call.builder;
    Statistics& s = call.statistics;
    FCE_CHECK(target || !grad_log_prob, "the gradient of a log_prob needs the target");
    builder.set_stats(stats);
    builder.set_grad(grad);
    const auto add = [&](Operand& operand, const Tensor& tensor, const char* name) {
      FCE_CHECK(is_floating_type(tensor.scalar_type()),
                std::string(name) + " must be of a floating type");
      builder.add_rows(operand, tensor, name);
    };
    if (grad_log_prob) add(s.grad_log_prob, *grad_log_prob, "grad_log_prob");
    if (grad_logsumexp) add(s.grad_logsumexp, *grad_logsumexp, "grad_logsumexp");
    if (grad_entropy) {
      add(s.grad_entropy, *grad_entropy, "grad_entropy");
      add(s.entropy, entropy, "entropy");
    }
    call.backend.find_statistics_gradient(builder.build(), s);
  }

  static bool is_floating_type(ScalarType type) {
    return type == ScalarType::Double || type == ScalarType::Float ||
           type == ScalarType::BFloat16 || type == ScalarType::Half;
  }

 public:
  // log_prob, entropy, logsumexp, argmax and the statistics; what is not wanted is of size 0.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
      const Tensor& input, const OptionalTensor& target, double temperature, double softcap,
      int64_t ignore_index, bool entropy, bool argmax, bool keep_stats) {
    Call call(input, target, temperature, softcap, ignore_index);
    Statistics& s = call.statistics;
    const ScalarType dtype = call.builder.stats_dtype();
    Tensor of_target = call.make(s.log_prob, dtype, target.has_value(), "log_prob");
    Tensor of_entropy = call.make(s.entropy, dtype, entropy, "entropy");
    Tensor of_all = call.make(s.logsumexp, dtype, true, "logsumexp");
    Tensor of_largest = call.make(s.argmax, ScalarType::Long, argmax, "argmax");
    auto stats_sizes = call.builder.stats_sizes();
    if (!keep_stats) stats_sizes[1] = 0;
    Tensor stats = empty(stats_sizes, dtype, input);
    if (keep_stats) call.builder.set_stats(stats);
    call.backend.find_statistics(call.builder.build(), s);
    return {of_target, of_entropy, of_all, of_largest, stats};
  }

  static Tensor backward(const Tensor& input, const OptionalTensor& target, const Tensor& entropy,
                         const Tensor& stats, const OptionalTensor& grad_log_prob,
                         const OptionalTensor& grad_entropy, const OptionalTensor& grad_logsumexp,
                         double temperature, double softcap, int64_t ignore_index) {
    Tensor grad = Operators<Backend>::empty_gradient(input);
    run_backward(input, grad, target, entropy, stats, grad_log_prob, grad_entropy, grad_logsumexp,
                 temperature, softcap, ignore_index);
    return grad;
  }

  static Tensor backward_(const Tensor& input, const OptionalTensor& target, const Tensor& entropy,
                          const Tensor& stats, const OptionalTensor& grad_log_prob,
                          const OptionalTensor& grad_entropy, const OptionalTensor& grad_logsumexp,
                          double temperature, double softcap, int64_t ignore_index) {
    for (const OptionalTensor& read : {target, grad_log_prob, grad_entropy, grad_logsumexp})
      if (read) check_apart(input, *read);
    for (const Tensor* read : {&entropy, &stats}) check_apart(input, *read);
    run_backward(input, input, target, entropy, stats, grad_log_prob, grad_entropy, grad_logsumexp,
                 temperature, softcap, ignore_index);
    return input;
  }
};

// As register_operators().
template <class Backend, class Library>
void register_statistics(Library& m) {
  using All = StatisticsOperators<Backend>;
  m.impl("softmax_stats", &boxed<&All::forward>);
  m.impl("softmax_stats_backward", &boxed<&All::backward>);
  m.impl("softmax_stats_backward_", &boxed<&All::backward_>);
  m.impl("graph_softmax_stats", &boxed<&All::forward>);
  m.impl("graph_softmax_stats_backward", &boxed<&All::backward>);
}

}  // namespace fused_ce
