// The operators of fused_ce. Each backend registers its implementations in its own folder.
//
// `input` is (C), (N, C) or (N, C, d1, ..., dK); `target` holds class indices over the row
// dimensions, or probabilities of the input's shape; `reduction` counts as in torch.nn._reduction.
// `stats` is each row's maximum and its sum of exp(x - maximum) over all classes but one of the
// largest: [2, rows] in float32, or in float64 for float64 logits.
// A name that ends in an underscore writes the gradient over its (a!) argument.
#include <torch/csrc/stable/library.h>

#define FCE_PROBLEM                                                  \
  "Tensor target, Tensor? weight, int reduction, int ignore_index, " \
  "float label_smoothing"

STABLE_TORCH_LIBRARY(fused_ce, m) {
  m.def("forward(Tensor input, " FCE_PROBLEM ", ScalarType loss_dtype) -> Tensor");
  m.def("forward_stats(Tensor input, " FCE_PROBLEM
        ", ScalarType loss_dtype) -> (Tensor loss, Tensor stats)");
  m.def("forward_grad(Tensor input, " FCE_PROBLEM
        ", ScalarType loss_dtype) -> (Tensor loss, Tensor stats, Tensor grad)");
  m.def("forward_grad_(Tensor(a!) input, " FCE_PROBLEM ", ScalarType loss_dtype) -> Tensor");
  m.def("backward(Tensor input, " FCE_PROBLEM ", Tensor stats, Tensor grad_output) -> Tensor");
  m.def("backward_(Tensor(a!) input, " FCE_PROBLEM ", Tensor stats, Tensor grad_output) -> ()");
  m.def("backward_target(Tensor input, " FCE_PROBLEM
        ", Tensor stats, Tensor grad_output) -> Tensor");
  // The same for the graphs of torch.compile, with derivatives registered for them; eager calls do
  // without, since a registered derivative costs several times what a small call does.
  m.def("graph_forward(Tensor input, " FCE_PROBLEM
        ", ScalarType loss_dtype) -> (Tensor loss, Tensor stats)");
  m.def("graph_backward(Tensor input, " FCE_PROBLEM
        ", Tensor stats, Tensor grad_output) -> Tensor");
  m.def("graph_backward_target(Tensor input, " FCE_PROBLEM
        ", Tensor stats, Tensor grad_output) -> Tensor");
  // `grad` is what forward_grad returned. Nothing is done when grad_output is 1.
  m.def("rescale_(Tensor(a!) grad, Tensor input, " FCE_PROBLEM
        ", Tensor stats, Tensor grad_output) -> ()");
  // grad *= grad_output. Nothing is done when grad_output is 1.
  m.def("scale_(Tensor(a!) grad, Tensor grad_output) -> ()");
  // Raises unless the logits may be overwritten.
  m.def("check_overwritable(Tensor input, Tensor target, Tensor? weight) -> ()");
  m.def("instruction_set() -> str");
}
