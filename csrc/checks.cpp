// Shapes, types, devices and memory of the operators' arguments; see checks.h.
#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <numeric>

namespace fused_ce {

namespace {

std::vector<int64_t> to_vector(torch::headeronly::IntHeaderOnlyArrayRef values) {
  return {values.begin(), values.end()};
}

bool has_sizes(const Tensor& tensor, const std::vector<int64_t>& expected) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
}

std::string to_string(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::optional<DType> dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Short:
      return DType::kInt16;
    case ScalarType::Byte:
      return DType::kUInt8;
    default:
      return std::nullopt;
  }
}

bool is_floating(DType dtype) { return dtype <= DType::kFloat16; }

DType checked_dtype(const Tensor& tensor, bool floating, const char* name) {
  const std::optional<DType> dtype = dtype_of(tensor.scalar_type());
  FCE_CHECK(dtype && is_floating(*dtype) == floating,
            std::string(name) + " must be of a " + (floating ? "floating" : "whole-number") +
                " type that the kernels know, got scalar type " +
                std::to_string(static_cast<int>(tensor.scalar_type())));
  return *dtype;
}

void check_device(const Tensor& tensor, const Tensor& input, const char* name) {
  FCE_CHECK(tensor.is_cpu() == input.is_cpu() && tensor.is_cuda() == input.is_cuda() &&
                tensor.get_device_index() == input.get_device_index(),
            std::string(name) + " must be on the input's device");
}

// The dimensions with more than one element, those of the smallest strides first.
std::vector<std::pair<int64_t, int64_t>> by_stride(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < tensor.dim(); d++)
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dims.begin(), dims.end());
  return dims;
}

bool overlaps_itself(const Tensor& tensor) {
  if (tensor.numel() == 0) return false;
  int64_t reach = 0;  // the largest offset of the dimensions so far
  for (auto [stride, size] : by_stride(tensor)) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

std::pair<const std::byte*, const std::byte*> memory_range(const Tensor& tensor) {
  const auto* first = static_cast<const std::byte*>(tensor.data_ptr());
  if (tensor.numel() == 0) return {first, first};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); d++) last += tensor.stride(d) * (tensor.size(d) - 1);
  return {first, first + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

bool share_memory(const Tensor& a, const Tensor& b) {
  const auto [a_begin, a_end] = memory_range(a);
  const auto [b_begin, b_end] = memory_range(b);
  return a_begin < b_end && b_begin < a_end;
}

// The tensor's memory, all of which the kernels may touch. A storage can be smaller than its
// tensors say (FSDP frees and restores storages under them), and then the pointer must not be
// followed.
void* checked_data(const Tensor& tensor, const char* name) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const auto [begin, end] = memory_range(tensor);
  const int64_t item = static_cast<int64_t>(tensor.element_size());
  if (begin != end && (end - begin) + tensor.storage_offset() * item > bytes)
    throw std::runtime_error("The " + std::string(name) +
                             " tensor has a non-zero number of elements, but its data is not "
                             "allocated yet; give it its storage back first.");
  return tensor.data_ptr();
}

// Every operand with rows, whether in use or not.
template <class P>
auto operands(P& p) {
  return std::array{&p.input,       &p.target,  &p.grad,    &p.target_grad, &p.loss,
                    &p.grad_output, &p.row_max, &p.row_rest};
}

}  // namespace

bool is_dense(const Tensor& tensor) {
  int64_t expected = 1;
  for (auto [stride, size] : by_stride(tensor)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

void check_apart(const Tensor& written, const Tensor& read) {
  FCE_CHECK(!share_memory(written, read),
            "inplace=True needs logits that share no memory with the target, the weight or the "
            "incoming gradient, which would be overwritten too; clone() one of them");
}

void check_overwritable(const Tensor& input, const Tensor& target,
                        const std::optional<Tensor>& weight) {
  if (overlaps_itself(input))
    throw std::runtime_error(
        "unsupported operation: more than one element of the written-to tensor refers to a single "
        "memory location. Please clone() the tensor before performing the operation.");
  FCE_CHECK(
      !share_memory(input, target) && !(weight && share_memory(input, *weight)),
      "inplace=True needs logits that share no memory with the target or the weight, which would "
      "be overwritten too; clone() one of them");
}

Elements elements_of(const Tensor& tensor) {
  FCE_CHECK(!overlaps_itself(tensor), "the tensor must not have elements that share memory");
  Elements e;
  e.data = checked_data(tensor, "gradient");
  e.dtype = checked_dtype(tensor, true, "tensor");
  auto dims = by_stride(tensor);
  FCE_CHECK(dims.size() <= kMaxRowDims + 1, "the tensor has too many dimensions");
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    const auto [stride, size] = *dim;
    if (e.dims > 0 && e.strides[e.dims - 1] == stride * size)
      e.sizes[e.dims - 1] *= size;
    else
      e.sizes[e.dims++] = size;
    e.strides[e.dims - 1] = stride;
  }
  if (e.dims == 0) {
    e.dims = e.sizes[0] = 1;
    e.strides[0] = 1;
  }
  return e;
}

ProblemBuilder::ProblemBuilder(const Arguments& a)
    : class_dim_(a.input.dim() == 1 ? 0 : 1), sizes_(to_vector(a.input.sizes())) {
  Problem& p = problem_;
  FCE_CHECK(!sizes_.empty() && sizes_.size() <= kMaxRowDims + 1,
            "input must have 1 to " + std::to_string(kMaxRowDims + 1) + " dimensions, got " +
                std::to_string(sizes_.size()));
  p.classes = sizes_[class_dim_];
  FCE_CHECK(p.classes > 0, "input must have at least one class");
  row_sizes_ = sizes_;
  row_sizes_.erase(row_sizes_.begin() + class_dim_);
  p.rows = std::accumulate(row_sizes_.begin(), row_sizes_.end(), int64_t{1}, std::multiplies<>());
  set_class_operand(p.input, a.input, "input");
  const bool wide = p.accumulates_in_double();
  stats_dtype_ = wide ? ScalarType::Double : ScalarType::Float;

  check_device(a.target, a.input, "target");
  p.probabilities = is_floating(dtype_of(a.target.scalar_type()).value_or(DType::kInt64));
  if (p.probabilities) {
    set_class_operand(p.target, a.target, "target");
  } else {
    checked_dtype(a.target, false, "target");
    // An unbatched input also takes a target of shape [1].
    const bool one = class_dim_ == 0 && a.target.dim() == 1 && a.target.numel() == 1;
    if (one)
      p.target = {checked_data(a.target, "target"), *dtype_of(a.target.scalar_type())};
    else
      set_row_operand(p.target, a.target, "target");
  }

  if (a.weight) {
    check_device(*a.weight, a.input, "weight");
    FCE_CHECK(a.weight->dim() == 1 && a.weight->numel() == p.classes,
              "weight must be 1-D with one value for each of the " + std::to_string(p.classes) +
                  " classes, got shape " + to_string(to_vector(a.weight->sizes())));
    checked_dtype(*a.weight, true, "weight");
    checked_data(*a.weight, "weight");
    weight_ = *a.weight;
    if (weight_->scalar_type() != stats_dtype_) weight_ = torch::stable::to(*weight_, stats_dtype_);
    if (!weight_->is_contiguous()) weight_ = torch::stable::contiguous(*weight_);
    p.weight = checked_data(*weight_, "weight");
  }

  FCE_CHECK(a.reduction >= 0 && a.reduction <= 2,
            "reduction must be 0 (none), 1 (mean) or 2 (sum), got " + std::to_string(a.reduction));
  p.reduction = static_cast<Reduction>(a.reduction);
  p.ignore_index = a.ignore_index;
  FCE_CHECK(!(a.label_smoothing > 1.0), "label_smoothing must be at most 1");
  p.label_smoothing = a.label_smoothing > 0.0 ? a.label_smoothing : 0.0;
}

void ProblemBuilder::set_class_operand(Operand& operand, const Tensor& tensor, const char* name) {
  operand.dtype = checked_dtype(tensor, true, name);
  FCE_CHECK(has_sizes(tensor, sizes_), std::string(name) + " must have the input's shape " +
                                           to_string(sizes_) + ", got " +
                                           to_string(to_vector(tensor.sizes())));
  operand.data = checked_data(tensor, name);
  operand.class_stride = tensor.stride(class_dim_);
  int d = 0;
  for (int64_t i = 0; i < tensor.dim(); i++)
    if (i != class_dim_) operand.row_strides[d++] = tensor.stride(i);
}

void ProblemBuilder::set_row_operand(Operand& operand, const Tensor& tensor, const char* name) {
  FCE_CHECK(has_sizes(tensor, row_sizes_), std::string(name) + " must have the shape " +
                                               to_string(row_sizes_) + ", got " +
                                               to_string(to_vector(tensor.sizes())));
  operand.dtype = *dtype_of(tensor.scalar_type());
  operand.data = checked_data(tensor, name);
  for (int64_t d = 0; d < tensor.dim(); d++) operand.row_strides[d] = tensor.stride(d);
}

void ProblemBuilder::set_logical(Operand& operand, void* data, ScalarType dtype) {
  operand.data = data;
  operand.dtype = *dtype_of(dtype);
  int64_t stride = 1;
  for (size_t d = row_sizes_.size(); d-- > 0;) {
    operand.row_strides[d] = stride;
    stride *= row_sizes_[d];
  }
}

void ProblemBuilder::set_grad(const Tensor& grad) {
  set_class_operand(problem_.grad, grad, "grad");
  FCE_CHECK(!overlaps_itself(grad), "grad must not have elements that share memory");
  FCE_CHECK(problem_.grad.dtype == problem_.input.dtype, "grad must have the input's type");
}

void ProblemBuilder::set_target_grad(const Tensor& target_grad) {
  set_class_operand(problem_.target_grad, target_grad, "target_grad");
}

void ProblemBuilder::set_loss(const Tensor& loss) {
  checked_dtype(loss, true, "loss");
  if (problem_.reduction == Reduction::kNone)
    set_row_operand(problem_.loss, loss, "loss");
  else
    problem_.loss = {checked_data(loss, "loss"), *dtype_of(loss.scalar_type())};
}

void ProblemBuilder::set_stats(const Tensor& stats) {
  FCE_CHECK(stats.scalar_type() == stats_dtype_ && stats.is_contiguous() && stats.is_cpu() &&
                has_sizes(stats, stats_sizes()),
            "stats must be what the forward operator returned for the same arguments");
  auto* data = static_cast<std::byte*>(checked_data(stats, "stats"));
  set_logical(problem_.row_max, data, stats_dtype_);
  const int64_t plane = problem_.rows * static_cast<int64_t>(stats.element_size());
  set_logical(problem_.row_rest, data + plane, stats_dtype_);
}

void ProblemBuilder::set_grad_output(const Tensor& grad_output) {
  checked_dtype(grad_output, true, "grad_output");
  FCE_CHECK(grad_output.is_cpu(), "grad_output must be on the input's device");
  if (problem_.reduction == Reduction::kNone) {
    set_row_operand(problem_.grad_output, grad_output, "grad_output");
  } else {
    FCE_CHECK(grad_output.numel() == 1, "grad_output must hold one value");
    problem_.grad_output = {checked_data(grad_output, "grad_output"),
                            *dtype_of(grad_output.scalar_type())};
  }
}

Problem& ProblemBuilder::build() {
  Problem& p = problem_;
  const Problem logical = p;  // row dimensions still in the input's order
  const auto from = operands(logical);
  const auto to = operands(p);

  std::vector<int> order;
  for (size_t d = 0; d < row_sizes_.size(); d++)
    if (row_sizes_[d] != 1) order.push_back(static_cast<int>(d));
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return logical.input.row_strides[a] > logical.input.row_strides[b];
  });

  int dims = 0;
  for (int d : order) {
    const int64_t size = row_sizes_[d];
    bool merges = dims > 0;
    for (size_t i = 0; i < to.size(); i++)
      merges &= dims > 0 && to[i]->row_strides[dims - 1] == from[i]->row_strides[d] * size;
    if (!merges) dims++;
    p.row_sizes[dims - 1] = merges ? p.row_sizes[dims - 1] * size : size;
    for (size_t i = 0; i < to.size(); i++) to[i]->row_strides[dims - 1] = from[i]->row_strides[d];
  }
  if (dims == 0) {  // one row: any stride is right, and 1 lets the kernels use it directly
    p.row_sizes[0] = 1;
    for (Operand* operand : to) operand->row_strides[0] = 1;
    dims = 1;
  }
  p.row_dims = dims;

  // Tiles run along the last dimension: better a long one, unless the rows there are adjacent.
  constexpr int64_t kLongRun = 16;
  const int inner = dims - 1;
  if (p.input.row_strides[inner] != 1 || p.row_sizes[inner] < kLongRun) {
    const int longest =
        static_cast<int>(std::max_element(p.row_sizes, p.row_sizes + dims) - p.row_sizes);
    std::swap(p.row_sizes[inner], p.row_sizes[longest]);
    for (Operand* operand : to)
      std::swap(operand->row_strides[inner], operand->row_strides[longest]);
  }
  return p;
}

}  // namespace fused_ce
