// The operators for divergences in front of a backend; see operators.h.
//
// Besides what is said there, a backend's class has
//   void find_divergence(Problem&, const Divergence&);
//   void find_divergence_gradient(Problem&, const Divergence&);
//   void rescale_divergence_gradient(Problem&, const Divergence&);  unless grad_output is 1
#pragma once

#include "divergence_problem.h"
#include "operators.h"

namespace fused_ce {

template <class Backend>
class DivergenceOperators {
  using OptionalTensor = std::optional<Tensor>;

  static OptionArguments options_of(const OptionalTensor& sample_weight,
                                    const OptionalTensor& denominator, int64_t reduction) {
    OptionArguments options;
    options.sample_weight = sample_weight;
    options.denominator = denominator;
    options.reduction = static_cast<Reduction>(reduction);
    return options;
  }

  // What all operators begin with.
  struct Call {
    Call(const Tensor& input, const Tensor& target, const OptionArguments& options,
         double temperature, bool reverse)
        : input(input), builder(input, target, options), backend(input) {
      constexpr double kMin = 1e-30, kMax = 1e30;  // whose inverse is a normal float as well
      FCE_CHECK(temperature >= kMin && temperature <= kMax,
                "temperature must be from 1e-30 to 1e30, got " + std::to_string(temperature));
      FCE_CHECK(builder.has_probabilities(), "target_logits must be of a floating type");
      divergence.temperature = temperature;
      divergence.reverse = reverse;
      divergence.in_double =
          input.scalar_type() == ScalarType::Double || target.scalar_type() == ScalarType::Double;
      dtype = divergence.in_double ? ScalarType::Double : ScalarType::Float;
    }

    void set_stats(const Tensor& stats) {
      Divergence& d = divergence;
      if (d.reverse)
        builder.add_stats({&d.first_max, &d.first_rest, &d.second_max, &d.second_rest, &d.mean_gap},
                          stats, dtype);
      else
        builder.add_stats({&d.first_max, &d.first_rest, &d.second_max, &d.second_rest}, stats,
                          dtype);
    }

    const Tensor& input;
    ProblemBuilder builder;
    Divergence divergence;
    ScalarType dtype;
    Backend backend;
  };

  struct Forward : Call {
    Forward(const Tensor& input, const Tensor& target, const OptionalTensor& sample_weight,
            const OptionalTensor& denominator, double temperature, bool reverse, int64_t reduction)
        : Call(input, target, options_of(sample_weight, denominator, reduction), temperature,
               reverse),
          loss(empty(static_cast<Reduction>(reduction) == Reduction::kNone
                         ? this->builder.row_sizes()
                         : Sizes(),
                     this->dtype, input)) {
      this->builder.set_loss(loss);
    }

    void keep_stats() {
      constexpr int64_t kTotals[] = {sizeof(Totals) / sizeof(double)};
      const int64_t sizes[] = {this->divergence.reverse ? 5 : 4, this->builder.rows()};
      stats = empty(Sizes(sizes, 2), this->dtype, this->input);
      totals = empty(kTotals, ScalarType::Double, this->input);
      this->set_stats(*stats);
      this->builder.set_totals(*totals);
    }

    void compute(const OptionalTensor& grad) {
      if (grad) this->builder.set_grad(*grad);
      this->backend.find_divergence(this->builder.build(), this->divergence);
    }

    Tensor loss;
    OptionalTensor stats, totals;
  };

  struct Backward : Call {
    Backward(const Tensor& grad, const Tensor& input, const Tensor& target, const Tensor& stats,
             const Tensor& totals, const Tensor& grad_output, const OptionalTensor& sample_weight,
             double temperature, bool reverse, int64_t reduction)
        : Call(input, target, options_of(sample_weight, std::nullopt, reduction), temperature,
               reverse) {
      this->set_stats(stats);
      this->builder.set_totals(totals);
      this->builder.set_grad_output(grad_output);
      this->builder.set_grad(grad);
    }
  };

  // Throws unless the student's logits may be overwritten, which what else is read must survive.
  static void check_written(const Tensor& input, const Tensor& target,
                            const OptionalTensor& sample_weight,
                            const OptionalTensor& denominator) {
    check_overwritable(input, target, options_of(sample_weight, denominator, 1));
  }

 public:
  static Tensor forward(const Tensor& input, const Tensor& target,
                        const OptionalTensor& sample_weight, const OptionalTensor& denominator,
                        double temperature, bool reverse, int64_t reduction) {
    Forward call(input, target, sample_weight, denominator, temperature, reverse, reduction);
    call.compute(std::nullopt);
    return call.loss;
  }

  static std::tuple<Tensor, Tensor, Tensor> forward_stats(const Tensor& input, const Tensor& target,
                                                          const OptionalTensor& sample_weight,
                                                          const OptionalTensor& denominator,
                                                          double temperature, bool reverse,
                                                          int64_t reduction) {
    Forward call(input, target, sample_weight, denominator, temperature, reverse, reduction);
    call.keep_stats();
    call.compute(std::nullopt);
    return {call.loss, *call.stats, *call.totals};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward_grad(
      const Tensor& input, const Tensor& target, const OptionalTensor& sample_weight,
      const OptionalTensor& denominator, double temperature, bool reverse, int64_t reduction) {
    Forward call(input, target, sample_weight, denominator, temperature, reverse, reduction);
    call.keep_stats();
    Tensor grad = Operators<Backend>::empty_gradient(input);
    call.compute(grad);
    return {call.loss, *call.stats, *call.totals, grad};
  }

  static Handle forward_grad_(const Tensor& input, const Tensor& target,
                              const OptionalTensor& sample_weight,
                              const OptionalTensor& denominator, double temperature, bool reverse,
                              int64_t reduction) {
    check_written(input, target, sample_weight, denominator);
    Forward call(input, target, sample_weight, denominator, temperature, reverse, reduction);
    Handle loss = handle_of(call.loss);
    call.compute(input);
    return loss;
  }

  static Tensor backward(const Tensor& input, const Tensor& target, const Tensor& stats,
                         const Tensor& totals, const Tensor& grad_output,
                         const OptionalTensor& sample_weight, double temperature, bool reverse,
                         int64_t reduction) {
    Tensor grad = Operators<Backend>::empty_gradient(input);
    Backward call(grad, input, target, stats, totals, grad_output, sample_weight, temperature,
                  reverse, reduction);
    call.backend.find_divergence_gradient(call.builder.build(), call.divergence);
    return grad;
  }

  static Handle backward_(const Tensor& input, const Tensor& target, const Tensor& stats,
                          const Tensor& totals, const Tensor& grad_output,
                          const OptionalTensor& sample_weight, double temperature, bool reverse,
                          int64_t reduction) {
    check_written(input, target, sample_weight, std::nullopt);
    for (const Tensor* read : {&grad_output, &stats, &totals}) check_apart(input, *read);
    Backward call(input, input, target, stats, totals, grad_output, sample_weight, temperature,
                  reverse, reduction);
    Handle result = handle_of(input);
    call.backend.find_divergence_gradient(call.builder.build(), call.divergence);
    return result;
  }

  static Handle rescale_(const Tensor& grad, const Tensor& input, const Tensor& target,
                         const Tensor& stats, const Tensor& totals, const Tensor& grad_output,
                         const OptionalTensor& sample_weight, double temperature, bool reverse,
                         int64_t reduction) {
    Handle result = handle_of(grad);
    if (Backend::is_known_to_be_one(scalar_of(grad_output, grad))) return result;
    Backward call(grad, input, target, stats, totals, grad_output, sample_weight, temperature,
                  reverse, reduction);
    call.backend.rescale_divergence_gradient(call.builder.build(), call.divergence);
    return result;
  }
};

// As register_operators().
template <class Backend, class Library>
void register_divergence(Library& m) {
  using All = DivergenceOperators<Backend>;
  m.impl("kl_div_with_logits", &boxed<&All::forward>);
  m.impl("kl_div_with_logits_stats", &boxed<&All::forward_stats>);
  m.impl("kl_div_with_logits_grad", &boxed<&All::forward_grad>);
  m.impl("kl_div_with_logits_grad_", &boxed<&All::forward_grad_>);
  m.impl("kl_div_with_logits_backward", &boxed<&All::backward>);
  m.impl("kl_div_with_logits_backward_", &boxed<&All::backward_>);
  m.impl("graph_kl_div_with_logits", &boxed<&All::forward_stats>);
  m.impl("graph_kl_div_with_logits_backward", &boxed<&All::backward>);
  m.impl("kl_div_with_logits_rescale_", &boxed<&All::rescale_>);
}

}  // namespace fused_ce
