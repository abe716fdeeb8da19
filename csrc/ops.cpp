// The operators of fused_ce. Each backend registers its implementations in its own folder.
//
// `input` is (C), (N, C) or (N, C, d1, ..., dK); `target` holds class indices over the row
// dimensions, or probabilities of the input's shape; `reduction` counts as in torch.nn._reduction.
// `stats` is each row's maximum and its sum of exp(x - maximum) over all classes but one of the
// largest: [2, rows] in float32, or in float64 for float64 logits. On CUDA one more column holds
// what the host must not wait for: the sum of the class weights and what the losses are divided by.
// A name that ends in an underscore writes the gradient over its (a!) argument. The loss is of the
// input's dtype where none is given.
#include <torch/csrc/stable/library.h>

// The defaults are those of most calls, which then leave the arguments out: converting one takes as
// long as computing a row.
#define FCE_OPTIONS                        \
  "Tensor? weight=None, int reduction=1, " \
  "int ignore_index=-100, float label_smoothing=0.0"
#define FCE_FORWARD "Tensor target, " FCE_OPTIONS ", ScalarType? loss_dtype=None"
#define FCE_BACKWARD "Tensor target, Tensor stats, Tensor grad_output, " FCE_OPTIONS

STABLE_TORCH_LIBRARY(fused_ce, m) {
  m.def("forward(Tensor input, " FCE_FORWARD ") -> Tensor");
  m.def("forward_stats(Tensor input, " FCE_FORWARD ") -> (Tensor loss, Tensor stats)");
  m.def("forward_grad(Tensor input, " FCE_FORWARD ") -> (Tensor loss, Tensor stats, Tensor grad)");
  m.def("forward_grad_(Tensor(a!) input, " FCE_FORWARD ") -> Tensor");
  m.def("backward(Tensor input, " FCE_BACKWARD ") -> Tensor");
  m.def("backward_(Tensor(a!) input, " FCE_BACKWARD ") -> Tensor(a!)");
  m.def("backward_target(Tensor input, " FCE_BACKWARD ") -> Tensor");
  // The same for the graphs of torch.compile, with derivatives registered for them; eager calls do
  // without, since a registered derivative costs several times what a small call does.
  m.def("graph_forward(Tensor input, " FCE_FORWARD ") -> (Tensor loss, Tensor stats)");
  m.def("graph_backward(Tensor input, " FCE_BACKWARD ") -> Tensor");
  m.def("graph_backward_target(Tensor input, " FCE_BACKWARD ") -> Tensor");
  // `grad` is what forward_grad returned. Nothing is done when grad_output is 1.
  m.def(
      "rescale_(Tensor(a!) grad, Tensor grad_output, Tensor input, Tensor target, Tensor "
      "stats, " FCE_OPTIONS ") -> Tensor(a!)");
  // grad *= grad_output. Nothing is done when grad_output is 1.
  m.def("scale_(Tensor(a!) grad, Tensor grad_output) -> Tensor(a!)");
  // Raises unless the logits may be overwritten.
  m.def("check_overwritable(Tensor input, Tensor target, Tensor? weight=None) -> ()");
  // For memory that nobody has touched yet; of no effect where it is not the CPU's, or small.
  m.def("advise_huge_pages(Tensor memory) -> ()");
  m.def("instruction_set() -> str");
  // Only in a build with CUDA kernels.
  m.def("has_cuda_code(int device_index) -> bool");
}
