// The operators of fused_ce. Each backend registers its implementations in its own folder.
//
// `input` is (C), (N, C) or (N, C, d1, ..., dK); `target` holds class indices over the row
// dimensions, or probabilities of the input's shape. `stats` is what a row comes down to
// (formula.h): its maximum, its sum of exp(x - maximum) over all classes but one of the largest,
// and for probabilities the sum of its coefficients in two parts: [2 or 4, rows] in float32, or in
// float64 for float64 logits. `totals` is what all rows share, [3] in float64: the sum of the class
// weights, and what the losses and the z-losses are divided by. The options that end every list are
// those of options.h. A name that ends in an underscore writes the gradient over its (a!) argument.
#include <torch/csrc/stable/library.h>

#include "options.h"

#define FCE_FORWARD "Tensor target" FCE_OPTIONS_SCHEMA
#define FCE_BACKWARD \
  "Tensor target, Tensor stats, Tensor totals, Tensor grad_output" FCE_OPTIONS_SCHEMA
#define FCE_STATS "Tensor loss, Tensor stats, Tensor totals"

#define FCE_ROW_STATISTICS                                                             \
  "Tensor input, Tensor? target, float temperature, float softcap, int ignore_index, " \
  "bool entropy, bool argmax, bool keep_stats) -> (Tensor log_prob, Tensor entropy, "  \
  "Tensor logsumexp, Tensor argmax, Tensor stats)"
#define FCE_ROW_STATISTICS_BACKWARD                                                             \
  "Tensor? target, Tensor entropy, Tensor stats, Tensor? grad_log_prob, Tensor? grad_entropy, " \
  "Tensor? grad_logsumexp, float temperature, float softcap, int ignore_index"

#define FCE_POINTWISE_TENSORS "Tensor target, Tensor? weight, Tensor? pos_weight"
#define FCE_POINTWISE_NUMBERS "int loss, int reduction, float alpha, float gamma"
#define FCE_POINTWISE \
  FCE_POINTWISE_TENSORS ", " FCE_POINTWISE_NUMBERS ", ScalarType? loss_dtype=None"
#define FCE_POINTWISE_BACKWARD FCE_POINTWISE_TENSORS ", Tensor grad_output, " FCE_POINTWISE_NUMBERS
#define FCE_DIVERGENCE \
  "Tensor target_logits, Tensor? sample_weight, Tensor? denominator, " FCE_DIVERGENCE_NUMBERS
#define FCE_DIVERGENCE_BACKWARD                                             \
  "Tensor target_logits, Tensor stats, Tensor totals, Tensor grad_output, " \
  "Tensor? sample_weight, " FCE_DIVERGENCE_NUMBERS
#define FCE_SHARD "int class_offset, int shard_classes, int num_classes" FCE_OPTIONS_SCHEMA
#define FCE_SHARD_BACKWARD \
  "Tensor target, Tensor stats, Tensor totals, Tensor grad_output, " FCE_SHARD
#define FCE_DIVERGENCE_NUMBERS "float temperature, bool reverse, int reduction"

STABLE_TORCH_LIBRARY(fused_ce, m) {
  m.def("forward(Tensor input, " FCE_FORWARD ") -> Tensor");
  m.def("forward_stats(Tensor input, " FCE_FORWARD ") -> (" FCE_STATS ")");
  // The gradient is that for a grad_output of 1.
  m.def("forward_grad(Tensor input, " FCE_FORWARD ") -> (" FCE_STATS ", Tensor grad)");
  m.def("forward_grad_(Tensor(a!) input, Tensor target, Tensor? grad_output=None" FCE_OPTIONS_SCHEMA
        ") -> Tensor");
  m.def("backward(Tensor input, " FCE_BACKWARD ") -> Tensor");
  m.def("backward_(Tensor(a!) input, " FCE_BACKWARD ") -> Tensor(a!)");
  m.def("backward_target(Tensor input, " FCE_BACKWARD ") -> Tensor");
  // The gradient of the option logit_scale: one value, in float64.
  m.def("backward_logit_scale(Tensor input, " FCE_BACKWARD ") -> Tensor");
  // The same for the graphs of torch.compile, with derivatives registered for them; eager calls do
  // without, since a registered derivative costs several times what a small call does.
  m.def("graph_forward(Tensor input, " FCE_FORWARD ") -> (" FCE_STATS ")");
  m.def("graph_backward(Tensor input, " FCE_BACKWARD ") -> Tensor");
  m.def("graph_backward_target(Tensor input, " FCE_BACKWARD ") -> Tensor");
  // `grad` is what forward_grad returned. Nothing is done when grad_output is 1.
  m.def(
      "rescale_(Tensor(a!) grad, Tensor grad_output, Tensor input, Tensor target, Tensor stats, "
      "Tensor totals" FCE_OPTIONS_SCHEMA ") -> Tensor(a!)");
  // grad *= grad_output. Nothing is done when grad_output is 1.
  m.def("scale_(Tensor(a!) grad, Tensor grad_output) -> Tensor(a!)");
  // Of every row the log-probability of its target, the entropy, the logsumexp and the index of the
  // largest logit, in float32 or for float64 logits in float64, and `stats` for the backward:
  // [2, rows], as above. What is not asked for has no elements. Logits are divided by the
  // temperature, then capped.
  m.def("softmax_stats(" FCE_ROW_STATISTICS);
  m.def("softmax_stats_backward(Tensor input, " FCE_ROW_STATISTICS_BACKWARD ") -> Tensor");
  m.def("softmax_stats_backward_(Tensor(a!) input, " FCE_ROW_STATISTICS_BACKWARD ") -> Tensor(a!)");
  m.def("graph_softmax_stats(" FCE_ROW_STATISTICS);
  m.def("graph_softmax_stats_backward(Tensor input, " FCE_ROW_STATISTICS_BACKWARD ") -> Tensor");
  // A loss of every element, which `loss` says (pointwise_problem.h), and its gradient. `target`
  // has the input's shape; the weights expand to it. The reductions are torch's, and 3 for a sum
  // divided by the size of the first dimension.
  m.def("pointwise(Tensor input, " FCE_POINTWISE ") -> Tensor");
  m.def("pointwise_grad(Tensor input, " FCE_POINTWISE ") -> (Tensor loss, Tensor grad)");
  m.def("pointwise_grad_(Tensor(a!) input, " FCE_POINTWISE ") -> Tensor");
  m.def("pointwise_backward(Tensor input, " FCE_POINTWISE_BACKWARD ") -> Tensor");
  m.def("pointwise_backward_(Tensor(a!) input, " FCE_POINTWISE_BACKWARD ") -> Tensor(a!)");
  m.def("graph_pointwise(Tensor input, " FCE_POINTWISE ") -> Tensor");
  m.def("graph_pointwise_backward(Tensor input, " FCE_POINTWISE_BACKWARD ") -> Tensor");
  // `grad` is what pointwise_grad returned. Nothing is done when grad_output is 1.
  m.def(
      "pointwise_rescale_(Tensor(a!) grad, Tensor grad_output, Tensor input, " FCE_POINTWISE_TENSORS
      ", " FCE_POINTWISE_NUMBERS ") -> Tensor(a!)");
  m.def("check_pointwise_overwritable(Tensor input, " FCE_POINTWISE_TENSORS ") -> ()");
  // The divergence of two rows of logits, in float32 or with any in float64 in that, and what the
  // backward needs: `stats`, [4 or in reverse 5, rows], of each distribution its maximum and its
  // sum, and the mean of their logarithms' differences; and `totals`, as above.
  m.def("kl_div_with_logits(Tensor input, " FCE_DIVERGENCE ") -> Tensor");
  m.def("kl_div_with_logits_stats(Tensor input, " FCE_DIVERGENCE ") -> (" FCE_STATS ")");
  m.def("kl_div_with_logits_grad(Tensor input, " FCE_DIVERGENCE ") -> (" FCE_STATS
        ", Tensor grad)");
  m.def("kl_div_with_logits_grad_(Tensor(a!) input, " FCE_DIVERGENCE ") -> Tensor");
  m.def("kl_div_with_logits_backward(Tensor input, " FCE_DIVERGENCE_BACKWARD ") -> Tensor");
  m.def("kl_div_with_logits_backward_(Tensor(a!) input, " FCE_DIVERGENCE_BACKWARD
        ") -> Tensor(a!)");
  m.def("graph_kl_div_with_logits(Tensor input, " FCE_DIVERGENCE ") -> (" FCE_STATS ")");
  m.def("graph_kl_div_with_logits_backward(Tensor input, " FCE_DIVERGENCE_BACKWARD ") -> Tensor");
  // As rescale_, for what kl_div_with_logits_grad returned.
  m.def("kl_div_with_logits_rescale_(Tensor(a!) grad, Tensor input, " FCE_DIVERGENCE_BACKWARD
        ") -> Tensor(a!)");
  // The loss where the vocabulary of num_classes is sharded: the input's first shard_classes
  // columns are its classes from class_offset on, and the others none. Targets of probabilities and
  // class weights have the input's columns, class indices are of the whole vocabulary. `packets`
  // are those of all shards in their order, one after another; nothing here exchanges them. `stats`
  // is of the whole vocabulary, [3, rows] in float64. (shard_problem.h)
  m.def("shard_forward(Tensor input, Tensor target, " FCE_SHARD ") -> Tensor");
  m.def(
      "shard_merge(Tensor packets, Tensor input, Tensor target, int num_classes" FCE_OPTIONS_SCHEMA
      ") -> (" FCE_STATS ")");
  m.def("shard_backward(Tensor input, " FCE_SHARD_BACKWARD ") -> Tensor");
  m.def("shard_backward_(Tensor(a!) input, " FCE_SHARD_BACKWARD ") -> Tensor(a!)");
  m.def("shard_backward_target(Tensor input, " FCE_SHARD_BACKWARD ") -> Tensor");
  // Raises unless the logits may be overwritten.
  m.def("check_overwritable(Tensor input, " FCE_FORWARD ") -> ()");
  // For memory that nobody has touched yet; of no effect where it is not the CPU's, or small.
  m.def("advise_huge_pages(Tensor memory) -> ()");
  m.def("instruction_set() -> str");
  // Only in a build with CUDA kernels.
  m.def("has_cuda_code(int device_index) -> bool");
}
