// The operators in front of a backend: what is checked, allocated and handed back, in which order.
//
// Each backend's registration file includes this with a class of its own, made anew for every call:
//   explicit Backend(const Tensor& input);          the device and stream of the work
//   void forward(Problem&);                         targets out of range included
//   void backward(Problem&), backward_target(Problem&), backward_logit_scale(Problem&);
//   void rescale(Problem&);                         backward(), unless grad_output is 1
//   void scale(const Elements&, const Operand&);    the factor of one value
//   static bool is_known_to_be_one(const Operand&); false where the host cannot look
//   static void prepare(const Tensor&);             for a gradient that was just allocated
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "boxing.h"
#include "checks.h"

// The text of the newest exception; torch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fused_ce {

// Programs that look for the largest batch that fits know a device without memory by torch's words.
[[noreturn]] inline void throw_out_of_memory() {
  std::string text;
  if (torch_exception_get_what_without_backtrace)
    text = torch_exception_get_what_without_backtrace();
  if (text.empty()) text = "fused_ce: torch could not allocate a tensor: out of memory.";
  throw std::runtime_error(text);
}

// On the device of `like`.
inline Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               type, device_type, device_index, &handle);
  if (code != AOTI_TORCH_SUCCESS) throw_out_of_memory();
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
class Operators {
  using OptionalTensor = std::optional<Tensor>;

  // One call of any forward operator: which of the outputs are wanted, and where they are.
  struct Forward {
    Forward(const Tensor& input, const Tensor& target, const OptionArguments& options)
        : input(input),
          builder(input, target, options),
          reduces(options.reduction != Reduction::kNone),
          loss_dtype(options.loss_dtype ? *options.loss_dtype : input.scalar_type()) {}

    void keep_stats() {
      constexpr int64_t kTotals[] = {sizeof(Totals) / sizeof(double)};
      stats = empty(builder.stats_sizes(), builder.stats_dtype(), input);
      totals = empty(kTotals, ScalarType::Double, input);
      builder.set_stats(*stats);
      builder.set_totals(*totals);
    }

    Tensor make_loss() {
      Tensor loss = empty(reduces ? Sizes() : builder.row_sizes(), loss_dtype, input);
      builder.set_loss(loss);
      return loss;
    }

    void compute(const OptionalTensor& grad) {
      if (grad) builder.set_grad(*grad);
      Backend(input).forward(builder.build());
    }

    Tensor run(const OptionalTensor& grad) {
      Tensor loss = make_loss();
      compute(grad);
      return loss;
    }

    const Tensor& input;
    ProblemBuilder builder;
    bool reduces;
    ScalarType loss_dtype;
    OptionalTensor stats, totals;
  };

  // One call of any backward operator.
  struct Backward {
    Backward(const Tensor& input, const Tensor& target, const Tensor& stats, const Tensor& totals,
             const Tensor& grad_output, const OptionArguments& options)
        : builder(input, target, options), backend(input) {
      builder.set_stats(stats);
      builder.set_totals(totals);
      builder.set_grad_output(grad_output);
    }

    ProblemBuilder builder;
    Backend backend;
  };

 public:
  // With the strides of a dense tensor, else contiguous: what autograd keeps as a leaf's .grad.
  static Tensor empty_gradient(const Tensor& like) {
    const Sizes sizes = like.sizes();
    const ScalarType dtype = like.scalar_type();
    Tensor grad = is_dense(like) ? empty_strided(sizes, like.strides(), dtype, like)
                                 : empty(sizes, dtype, like);
    Backend::prepare(grad);
    return grad;
  }

  static Tensor forward(const Tensor& input, const Tensor& target, const OptionArguments& options) {
    return Forward(input, target, options).run(std::nullopt);
  }

  static std::tuple<Tensor, Tensor, Tensor> forward_stats(const Tensor& input, const Tensor& target,
                                                          const OptionArguments& options) {
    Forward call(input, target, options);
    call.keep_stats();
    Tensor loss = call.run(std::nullopt);
    return {loss, *call.stats, *call.totals};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward_grad(const Tensor& input,
                                                                 const Tensor& target,
                                                                 const OptionArguments& options) {
    Forward call(input, target, options);
    call.keep_stats();
    Tensor grad = empty_gradient(input);
    Tensor loss = call.run(grad);
    return {loss, *call.stats, *call.totals, grad};
  }

  static Handle forward_grad_(const Tensor& input, const Tensor& target,
                              const OptionalTensor& grad_output, const OptionArguments& options) {
    check_overwritable(input, target, options);
    Forward call(input, target, options);
    if (grad_output) {
      check_apart(input, *grad_output);
      call.builder.set_grad_output(*grad_output);
    }
    Handle loss = handle_of(call.make_loss());
    call.compute(input);
    return loss;
  }

  static Tensor backward(const Tensor& input, const Tensor& target, const Tensor& stats,
                         const Tensor& totals, const Tensor& grad_output,
                         const OptionArguments& options) {
    Backward call(input, target, stats, totals, grad_output, options);
    Tensor grad = empty_gradient(input);
    call.builder.set_grad(grad);
    call.backend.backward(call.builder.build());
    return grad;
  }

  static Handle backward_(const Tensor& input, const Tensor& target, const Tensor& stats,
                          const Tensor& totals, const Tensor& grad_output,
                          const OptionArguments& options) {
    check_overwritable(input, target, options);
    for (const Tensor* read : {&grad_output, &stats, &totals}) check_apart(input, *read);
    Backward call(input, target, stats, totals, grad_output, options);
    call.builder.set_grad(input);
    Handle result = handle_of(input);
    call.backend.backward(call.builder.build());
    return result;
  }

  static Tensor backward_target(const Tensor& input, const Tensor& target, const Tensor& stats,
                                const Tensor& totals, const Tensor& grad_output,
                                const OptionArguments& options) {
    Backward call(input, target, stats, totals, grad_output, options);
    FCE_CHECK(call.builder.has_probabilities(), "only a target of probabilities has a gradient");
    Tensor target_grad = empty_gradient(target);
    call.builder.set_target_grad(target_grad);
    call.backend.backward_target(call.builder.build());
    return target_grad;
  }

  static Tensor backward_logit_scale(const Tensor& input, const Tensor& target, const Tensor& stats,
                                     const Tensor& totals, const Tensor& grad_output,
                                     const OptionArguments& options) {
    Backward call(input, target, stats, totals, grad_output, options);
    Tensor scale_grad = empty(Sizes(), ScalarType::Double, input);
    call.builder.set_scale_grad(scale_grad);
    call.backend.backward_logit_scale(call.builder.build());
    return scale_grad;
  }

  static Handle rescale_(const Tensor& grad, const Tensor& grad_output, const Tensor& input,
                         const Tensor& target, const Tensor& stats, const Tensor& totals,
                         const OptionArguments& options) {
    Handle result = handle_of(grad);
    if (Backend::is_known_to_be_one(scalar_of(grad_output, grad))) return result;
    Backward call(input, target, stats, totals, grad_output, options);
    call.builder.set_grad(grad);
    call.backend.rescale(call.builder.build());
    return result;
  }

  static Handle scale_(const Tensor& grad, const Tensor& grad_output) {
    Handle result = handle_of(grad);
    const Operand factor = scalar_of(grad_output, grad);
    if (grad.numel() == 0 || Backend::is_known_to_be_one(factor)) return result;
    check_apart(grad, grad_output);
    Backend(grad).scale(elements_of(grad), factor);
    return result;
  }
};

// To be called in a STABLE_TORCH_LIBRARY_IMPL of the backend's dispatch key.
template <class Backend, class Library>
void register_operators(Library& m) {
  using All = Operators<Backend>;
  m.impl("forward", &boxed<&All::forward>);
  m.impl("forward_stats", &boxed<&All::forward_stats>);
  m.impl("forward_grad", &boxed<&All::forward_grad>);
  m.impl("forward_grad_", &boxed<&All::forward_grad_>);
  m.impl("backward", &boxed<&All::backward>);
  m.impl("backward_", &boxed<&All::backward_>);
  m.impl("backward_target", &boxed<&All::backward_target>);
  m.impl("backward_logit_scale", &boxed<&All::backward_logit_scale>);
  m.impl("graph_forward", &boxed<&All::forward_stats>);
  m.impl("graph_backward", &boxed<&All::backward>);
  m.impl("graph_backward_target", &boxed<&All::backward_target>);
  m.impl("rescale_", &boxed<&All::rescale_>);
  m.impl("scale_", &boxed<&All::scale_>);
}

}  // namespace fused_ce
