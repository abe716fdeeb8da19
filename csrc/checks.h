// From tensors to a Problem: every address that a kernel will touch is proved here.
//
// The Python layer has asked stock PyTorch to complain about what a user can get wrong; these
// checks are the ones that a caller of the raw operators cannot get around.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

// The message is put together only when it is needed: checks are most of a small call.
#define FCE_CHECK(holds, message) \
  do {                            \
    if (!(holds)) fail(message);  \
  } while (false)

namespace fused_ce {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define FCE_OPTIONAL_TENSOR(name) std::optional<Tensor> name;
#define FCE_OPTIONAL_TYPE(name) std::optional<ScalarType> name;

// The options, as the dispatcher hands them over.
struct OptionArguments {
  FCE_FOR_OPTIONS(FCE_OPTIONAL_TENSOR, FCE_OPTIONAL_TENSOR, FCE_NUMBER_MEMBER, FCE_OPTIONAL_TYPE)
};

struct Facts;

// Collects the operands of one call, checks each against the input, and lays them out as a Problem.
class ProblemBuilder {
 public:
  ProblemBuilder(const Tensor& input,   // [N, C, ...]
                 const Tensor& target,  // [N, ...] or [N, C, ...]
                 const OptionArguments& options);
  // Without targets. Where elements have nothing to do with one another, each is a row of one
  // class, and the shape of the rows is the input's.
  // A shard of the classes may be empty.
  enum class Rows { kOfClasses, kOfElements, kOfShard };
  ProblemBuilder(const Tensor& input, const OptionArguments& options, Rows rows = Rows::kOfClasses);

  void set_target(const Tensor& target);            // as above
  void set_element_target(const Tensor& target);    // the input's shape
  void set_grad(const Tensor& grad);                // [N, C, ...]
  void set_target_grad(const Tensor& target_grad);  // [N, C, ...]
  void set_scale_grad(const Tensor& scale_grad);    // []
  void set_loss(const Tensor& loss);                // [N, ...] or []
  void set_stats(const Tensor& stats);              // stats_sizes()
  // The same where the caller says which numbers a row comes down to: [operands, rows], of a type.
  void add_stats(std::initializer_list<Operand*> operands, const Tensor& stats, ScalarType dtype);
  void set_totals(const Tensor& totals);  // [3]
  // Of `vocabulary` classes the first `classes` of the input are those from `first_class` on, and
  // the others none.
  void set_shard(int64_t first_class, int64_t classes, int64_t vocabulary);
  void set_shard_sums(const Tensor& packets, int64_t shards);  // shard_problem.h
  void set_shard_stats(const Tensor& stats);                   // [3, rows] in float64
  void set_grad_output(const Tensor& grad_output);             // [N, ...] or []

  // Of a floating type unless it is to be written as another. The operand, which belongs to the
  // caller, is laid out by build() along with the others.
  void add_rows(Operand& operand, const Tensor& tensor, const char* name);  // [N, ...]
  // The same of a floating type, in any shape that expands to that of the rows.
  void add_expanded(Operand& operand, const Tensor& tensor, const char* name);

  // Sizes of the row dimensions, in the input's order.
  Sizes row_sizes() const { return {row_sizes_.data(), static_cast<size_t>(row_dims_)}; }
  int64_t rows() const { return problem_.rows; }
  int64_t classes() const { return problem_.classes; }
  bool has_probabilities() const { return problem_.probabilities; }
  ScalarType stats_dtype() const { return stats_dtype_; }
  std::array<int64_t, 2> stats_sizes() const {
    return {problem_.probabilities ? 4 : 2, problem_.rows};
  }

  // Merges and orders the row dimensions. The builder must outlive the problem.
  Problem& build();

 private:
  void set_weight(const Tensor& weight);
  void set_sample_weight(const Tensor& weight);
  void check_numbers() const;
  void check_focal() const;
  void set_stats(std::initializer_list<Operand*> operands, const Tensor& stats, ScalarType dtype);
  Values values_of(std::optional<Tensor>& tensor, int64_t most, const char* name) const;
  Values values_of(std::optional<Tensor>& tensor, const Facts& facts, ScalarType dtype,
                   const char* name) const;
  void set_class_operand(Operand& operand, const Facts& tensor, const char* name);
  void set_row_operand(Operand& operand, const Facts& tensor, const char* name);
  void set_numbers(std::initializer_list<Operand*> operands, const Facts& tensor, int64_t distance);
  void set_logical(Operand& operand, void* data, ScalarType dtype);
  void check_device(const Facts& tensor, const char* name) const;

  Problem problem_;
  std::vector<Operand*> added_;         // with a number for each row, beside those of the problem
  int32_t device_type_, device_index_;  // of the input
  int64_t class_dim_ = 0;               // -1 where rows are elements
  Sizes sizes_;                         // of the input
  std::array<int64_t, kMaxRowDims> row_sizes_;  // without the class dimension
  int row_dims_ = 0;
  std::optional<Tensor> weight_, denominator_, logit_scale_;  // keep what was converted alive
  ScalarType stats_dtype_;
};

// No two elements share memory, and the elements leave no holes.
bool is_dense(const Tensor& tensor);

// Throws unless `input` may be overwritten: no two of its elements share memory, and neither does
// it with the target or a tensor among the options.
void check_overwritable(const Tensor& input, const Tensor& target, const OptionArguments& options);

// Throws if the two tensors share memory.
void check_apart(const Tensor& written, const Tensor& read);
void check_apart(const Tensor& written, const Tensor& read, const char* name);

// The elements of a tensor of a floating type, with its dimensions merged as far as they go.
Elements elements_of(const Tensor& tensor);

// The one value of `grad_output`, which must be on the device of `grad`.
Operand scalar_of(const Tensor& grad_output, const Tensor& grad);

[[noreturn]] inline void fail(const std::string& message) {
  throw std::runtime_error("fused_ce: " + message);
}

}  // namespace fused_ce
