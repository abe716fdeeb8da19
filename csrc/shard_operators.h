// The operators for sharded classes in front of a backend; see operators.h.
//
// Besides what is said there, a backend's class has
//   void pack_shard(Problem&, const Shards&);
//   void merge_shards(Problem&, const Shards&);                targets out of range included
//   void find_shard_gradient(Problem&, const Shards&);         of the logits
//   void find_shard_target_gradient(Problem&, const Shards&);  of probabilities
// None of them moves data from one process to another: between the first two, the caller does.
#pragma once

#include "operators.h"
#include "shard_problem.h"

namespace fused_ce {

template <class Backend>
class ShardOperators {
  // What all operators begin with. The target's shape is the input's, or that of its rows.
  struct Call {
    Call(const Tensor& input, const Tensor& target, const OptionArguments& options)
        : builder(input, options, ProblemBuilder::Rows::kOfShard), backend(input) {
      builder.set_target(target);
      shards.has_weights = options.weight.has_value();
    }

    Call(const Tensor& input, const Tensor& target, int64_t class_offset, int64_t shard_classes,
         int64_t num_classes, const OptionArguments& options)
        : Call(input, target, options) {
      shards.padding = builder.classes() - shard_classes;
      builder.set_shard(class_offset, shard_classes, num_classes);
    }

    void set_packets(const Tensor& packets, int64_t count) {
      builder.set_shard_sums(packets, count);
      shards.packets = packets.data_ptr();
      shards.count = count;
    }

    void set_merged(const Tensor& stats, const Tensor& totals, const Tensor& grad_output) {
      builder.set_shard_stats(stats);
      builder.set_totals(totals);
      builder.set_grad_output(grad_output);
    }

    ProblemBuilder builder;
    Backend backend;
    Shards shards;
  };

  static void run_backward(const Tensor& input, const Tensor& grad, const Tensor& target,
                           const Tensor& stats, const Tensor& totals, const Tensor& grad_output,
                           int64_t class_offset, int64_t shard_classes, int64_t num_classes,
                           const OptionArguments& options) {
    Call call(input, target, class_offset, shard_classes, num_classes, options);
    call.set_merged(stats, totals, grad_output);
    call.builder.set_grad(grad);
    call.backend.find_shard_gradient(call.builder.build(), call.shards);
  }

 public:
  static Tensor forward(const Tensor& input, const Tensor& target, int64_t class_offset,
                        int64_t shard_classes, int64_t num_classes,
                        const OptionArguments& options) {
    Call call(input, target, class_offset, shard_classes, num_classes, options);
    const std::array<int64_t, 3> sizes{1, kShardNumbers, call.builder.rows() + kShardColumns};
    Tensor packet = empty(sizes, call.builder.stats_dtype(), input);
    call.set_packets(packet, 1);
    call.backend.pack_shard(call.builder.build(), call.shards);
    return packet;
  }

  // The loss; [3, rows] in float64, what each row comes down to; and the totals.
  static std::tuple<Tensor, Tensor, Tensor> merge(const Tensor& packets, const Tensor& input,
                                                  const Tensor& target, int64_t num_classes,
                                                  const OptionArguments& options) {
    FCE_CHECK(packets.dim() == 3, "packets must be those of shard_forward, in a row");
    constexpr int64_t kTotals[] = {sizeof(Totals) / sizeof(double)};
    Call call(input, target, 0, 0, num_classes, options);
    call.set_packets(packets, packets.size(0));
    const std::array<int64_t, 2> sizes{3, call.builder.rows()};
    Tensor stats = empty(sizes, ScalarType::Double, input);
    Tensor totals = empty(kTotals, ScalarType::Double, input);
    Shards& s = call.shards;
    call.builder.add_stats({&s.max, &s.rest, &s.mass}, stats, ScalarType::Double);
    call.builder.set_totals(totals);
    const bool reduces = options.reduction != Reduction::kNone;
    Tensor loss = empty(reduces ? Sizes() : call.builder.row_sizes(),
                        options.loss_dtype ? *options.loss_dtype : input.scalar_type(), input);
    call.builder.set_loss(loss);
    call.backend.merge_shards(call.builder.build(), s);
    return {loss, stats, totals};
  }

  static Tensor backward(const Tensor& input, const Tensor& target, const Tensor& stats,
                         const Tensor& totals, const Tensor& grad_output, int64_t class_offset,
                         int64_t shard_classes, int64_t num_classes,
                         const OptionArguments& options) {
    Tensor grad = Operators<Backend>::empty_gradient(input);
    run_backward(input, grad, target, stats, totals, grad_output, class_offset, shard_classes,
                 num_classes, options);
    return grad;
  }

  static Handle backward_(const Tensor& input, const Tensor& target, const Tensor& stats,
                          const Tensor& totals, const Tensor& grad_output, int64_t class_offset,
                          int64_t shard_classes, int64_t num_classes,
                          const OptionArguments& options) {
    check_overwritable(input, target, options);
    for (const Tensor* read : {&grad_output, &stats, &totals}) check_apart(input, *read);
    Handle result = handle_of(input);
    run_backward(input, input, target, stats, totals, grad_output, class_offset, shard_classes,
                 num_classes, options);
    return result;
  }

  static Tensor backward_target(const Tensor& input, const Tensor& target, const Tensor& stats,
                                const Tensor& totals, const Tensor& grad_output,
                                int64_t class_offset, int64_t shard_classes, int64_t num_classes,
                                const OptionArguments& options) {
    Call call(input, target, class_offset, shard_classes, num_classes, options);
    call.set_merged(stats, totals, grad_output);
    FCE_CHECK(call.builder.has_probabilities(), "only a target of probabilities has a gradient");
    Tensor target_grad = Operators<Backend>::empty_gradient(target);
    call.builder.set_target_grad(target_grad);
    call.backend.find_shard_target_gradient(call.builder.build(), call.shards);
    return target_grad;
  }
};

// As register_operators().
template <class Backend, class Library>
void register_shards(Library& m) {
  using All = ShardOperators<Backend>;
  m.impl("shard_forward", &boxed<&All::forward>);
  m.impl("shard_merge", &boxed<&All::merge>);
  m.impl("shard_backward", &boxed<&All::backward>);
  m.impl("shard_backward_", &boxed<&All::backward_>);
  m.impl("shard_backward_target", &boxed<&All::backward_target>);
}

}  // namespace fused_ce
