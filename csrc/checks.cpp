// Shapes, types, devices and memory of the operators' arguments; see checks.h.
#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include "shard_problem.h"

namespace fused_ce {

// What there is to know of a tensor, asked once: every question is a call across the stable ABI.
struct Facts {
  explicit Facts(const Tensor& tensor) : data(tensor.data_ptr()) {
    int64_t dim = 0, *size_list = nullptr, *stride_list = nullptr;
    int32_t dtype_code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &size_list));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &stride_list));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype_code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage_bytes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &storage_offset));
    sizes = Sizes(size_list, dim);
    strides = Sizes(stride_list, dim);
    type = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype_code));
    item_bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_code));
    for (size_t d = sizes.size(); d-- > 0;) {
      contiguous &= sizes[d] == 1 || strides[d] == numel;
      numel *= sizes[d];
    }
  }

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }

  void* data;
  int32_t device_type = 0, device_index = 0;
  ScalarType type;
  int64_t item_bytes, storage_bytes, storage_offset;
  Sizes sizes, strides;
  int64_t numel = 1;
  bool contiguous = true;  // no two elements share memory, and they leave no holes
};

namespace {

bool equal(Sizes a, Sizes b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

std::string to_string(Sizes sizes) {
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

DType checked_dtype(const Facts& tensor, bool floating, const char* name) {
  const std::optional<DType> dtype = dtype_of(tensor.type);
  FCE_CHECK(dtype && is_floating(*dtype) == floating,
            std::string(name) + " must be of a " + (floating ? "floating" : "whole-number") +
                " type that the kernels know, got scalar type " +
                std::to_string(static_cast<int>(tensor.type)));
  return *dtype;
}

// The dimensions with more than one element, those of the smallest strides first.
std::vector<std::pair<int64_t, int64_t>> by_stride(const Facts& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < tensor.dim(); d++)
    if (tensor.sizes[d] != 1) dims.emplace_back(tensor.strides[d], tensor.sizes[d]);
  std::sort(dims.begin(), dims.end());
  return dims;
}

bool overlaps_itself(const Facts& tensor) {
  if (tensor.contiguous || tensor.numel == 0) return false;
  int64_t reach = 0;  // the largest offset of the dimensions so far
  for (auto [stride, size] : by_stride(tensor)) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

std::pair<const std::byte*, const std::byte*> memory_range(const Facts& tensor) {
  const auto* first = static_cast<const std::byte*>(tensor.data);
  if (tensor.numel == 0) return {first, first};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); d++) last += tensor.strides[d] * (tensor.sizes[d] - 1);
  return {first, first + (last + 1) * tensor.item_bytes};
}

bool share_memory(const Facts& a, const Facts& b) {
  const auto [a_begin, a_end] = memory_range(a);
  const auto [b_begin, b_end] = memory_range(b);
  return a_begin < b_end && b_begin < a_end;
}

// The tensor's memory, all of which the kernels may touch. A storage can be smaller than its
// tensors say (FSDP frees and restores storages under them), and then the pointer must not be
// followed.
void* checked_data(const Facts& tensor, const char* name) {
  const auto [begin, end] = memory_range(tensor);
  if (begin != end &&
      (end - begin) + tensor.storage_offset * tensor.item_bytes > tensor.storage_bytes)
    throw std::runtime_error("The " + std::string(name) +
                             " tensor has a non-zero number of elements, but its data is not "
                             "allocated yet; give it its storage back first.");
  return tensor.data;
}

// For a tensor of one element, of a type that the kernels know.
Operand single_operand(const Facts& tensor, const char* name) {
  return {checked_data(tensor, name), *dtype_of(tensor.type)};
}

// Every operand with rows, whether in use or not.
template <class P>
auto operands(P& p) {
  return std::array{&p.input,    &p.target,       &p.grad,     &p.target_grad,
                    &p.loss,     &p.grad_output,  &p.row_max,  &p.row_rest,
                    &p.row_mass, &p.row_mass_low, &p.row_gaps, &p.options.sample_weight};
}

}  // namespace

bool is_dense(const Tensor& tensor) {
  const Facts facts(tensor);
  if (facts.contiguous) return true;
  int64_t expected = 1;
  for (auto [stride, size] : by_stride(facts)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

void check_apart(const Tensor& written, const Tensor& read) {
  FCE_CHECK(!share_memory(Facts(written), Facts(read)),
            "inplace=True needs logits that share no memory with the incoming gradient or the "
            "statistics, which would be overwritten too; clone() one of them");
}

void check_apart(const Tensor& written, const Tensor& read, const char* name) {
  FCE_CHECK(!share_memory(Facts(written), Facts(read)),
            "inplace=True needs logits that share no memory with the " + std::string(name) +
                ", which would be overwritten too; clone() one of them");
}

void check_overwritable(const Tensor& input, const Tensor& target, const OptionArguments& options) {
  const Facts logits(input);
  if (overlaps_itself(logits))
    throw std::runtime_error(
        "unsupported operation: more than one element of the written-to tensor refers to a single "
        "memory location. Please clone() the tensor before performing the operation.");
  check_apart(input, target, "target");
#define FCE_CHECK_APART(name) \
  if (options.name) check_apart(input, *options.name, #name);
  FCE_FOR_OPTIONS(FCE_CHECK_APART, FCE_CHECK_APART, FCE_NOTHING, FCE_NOTHING)
}

Elements elements_of(const Tensor& tensor) {
  const Facts facts(tensor);
  FCE_CHECK(!overlaps_itself(facts), "the tensor must not have elements that share memory");
  Elements e;
  e.data = checked_data(facts, "gradient");
  e.dtype = checked_dtype(facts, true, "tensor");
  auto dims = by_stride(facts);
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

Operand scalar_of(const Tensor& grad_output, const Tensor& grad) {
  const Facts value(grad_output), elements(grad);
  checked_dtype(value, true, "grad_output");
  FCE_CHECK(value.numel == 1, "grad_output must hold one value");
  FCE_CHECK(
      value.device_type == elements.device_type && value.device_index == elements.device_index,
      "grad_output must be on the gradient's device");
  return single_operand(value, "grad_output");
}

ProblemBuilder::ProblemBuilder(const Tensor& input, const Tensor& target,
                               const OptionArguments& given)
    : ProblemBuilder(input, given) {
  set_target(target);
}

ProblemBuilder::ProblemBuilder(const Tensor& input_tensor, const OptionArguments& given,
                               Rows rows) {
  Problem& p = problem_;
  const Facts input(input_tensor);
  device_type_ = input.device_type;
  device_index_ = input.device_index;
  const bool has_classes = rows != Rows::kOfElements;
  FCE_CHECK(input.dim() >= has_classes && input.dim() <= kMaxRowDims + has_classes,
            "input must have " + std::to_string(has_classes) + " to " +
                std::to_string(kMaxRowDims + has_classes) + " dimensions, got " +
                std::to_string(input.dim()));
  class_dim_ = !has_classes ? -1 : input.dim() == 1 ? 0 : 1;
  sizes_ = input.sizes;
  p.classes = has_classes ? sizes_[class_dim_] : 1;
  FCE_CHECK(p.classes > 0 || rows == Rows::kOfShard, "input must have at least one class");
  p.rows = 1;
  for (int64_t d = 0; d < input.dim(); d++) {
    if (d == class_dim_) continue;
    row_sizes_[row_dims_++] = sizes_[d];
    p.rows *= sizes_[d];
  }
  set_class_operand(p.input, input, "input");
  stats_dtype_ = p.accumulates_in_double() ? ScalarType::Double : ScalarType::Float;

#define FCE_COPY_NUMBER(type, schema_type, name, value) p.options.name = given.name;
  FCE_FOR_OPTIONS(FCE_NOTHING, FCE_NOTHING, FCE_COPY_NUMBER, FCE_NOTHING)
  if (!p.is_smoothed()) p.options.label_smoothing = 0.0;  // what is negative or nan, too
  check_numbers();
  if (given.weight) set_weight(*given.weight);
  if (given.sample_weight) set_sample_weight(*given.sample_weight);
  if (given.denominator) {
    FCE_CHECK(p.divides(), "a denominator goes with the reduction 1 (mean) alone");
    p.options.denominator = values_of(denominator_ = given.denominator, 2, "denominator");
  }
  if (given.logit_scale)
    p.options.logit_scale = values_of(logit_scale_ = given.logit_scale, 1, "logit_scale");
}

void ProblemBuilder::check_numbers() const {
  const Options& o = problem_.options;
  const auto check_choice = [](auto option, int64_t most, const char* what) {
    const auto value = static_cast<int64_t>(option);
    FCE_CHECK(value >= 0 && value <= most, std::string(what) + ", got " + std::to_string(value));
  };
  check_choice(o.reduction, 2, "reduction must be 0 (none), 1 (mean) or 2 (sum)");
  check_choice(o.on_all_ignored, 1, "on_all_ignored must be 0 (nan) or 1 (zero)");
  check_choice(o.on_out_of_range, 1, "on_out_of_range must be 0 (an error) or 1 (nan)");
  FCE_CHECK(!(o.label_smoothing > 1.0), "label_smoothing must be at most 1");
  constexpr double kMinCap = 1e-30, kMaxCap = 1e30;  // a normal float
  FCE_CHECK(o.softcap == 0.0 || (o.softcap >= kMinCap && o.softcap <= kMaxCap),
            "softcap must be from 1e-30 to 1e30, or 0 for none, got " + std::to_string(o.softcap));
  const auto check_factor = [](double value, const char* name) {
    FCE_CHECK(value >= 0.0 && std::isfinite(value),
              std::string(name) + " must be finite and not negative, got " + std::to_string(value));
  };
  check_factor(o.z_loss, "z_loss");
  check_factor(o.focal_gamma, "focal_gamma");
  check_focal();
}

void ProblemBuilder::check_focal() const {
  FCE_CHECK(!problem_.is_focal() || !(problem_.probabilities || problem_.is_smoothed()),
            "focal_gamma goes with class indices and no label_smoothing");
}

void ProblemBuilder::set_target(const Tensor& tensor) {
  Problem& p = problem_;
  const Facts target(tensor);
  check_device(target, "target");
  p.probabilities = is_floating(dtype_of(target.type).value_or(DType::kInt64));
  if (p.probabilities) {
    check_focal();
    set_class_operand(p.target, target, "target");
  } else {
    checked_dtype(target, false, "target");
    // An unbatched input also takes a target of shape [1].
    if (class_dim_ == 0 && target.dim() == 1 && target.numel == 1)
      p.target = single_operand(target, "target");
    else
      set_row_operand(p.target, target, "target");
  }
}

void ProblemBuilder::set_element_target(const Tensor& tensor) {
  const Facts target(tensor);
  check_device(target, "target");
  checked_dtype(target, true, "target");
  set_row_operand(problem_.target, target, "target");
}

void ProblemBuilder::set_weight(const Tensor& tensor) {
  const Facts weight(tensor);
  FCE_CHECK(weight.dim() == 1 && weight.numel == problem_.classes,
            "weight must be 1-D with one value for each of the " +
                std::to_string(problem_.classes) + " classes, got shape " +
                to_string(weight.sizes));
  problem_.options.weight = values_of(weight_ = tensor, weight, stats_dtype_, "weight");
}

void ProblemBuilder::set_sample_weight(const Tensor& tensor) {
  const Facts weight(tensor);
  check_device(weight, "sample_weight");
  checked_dtype(weight, true, "sample_weight");
  set_row_operand(problem_.options.sample_weight, weight, "sample_weight");
}

// At least one value, in double.
Values ProblemBuilder::values_of(std::optional<Tensor>& tensor, int64_t most,
                                 const char* name) const {
  const Facts facts(*tensor);
  FCE_CHECK(facts.numel >= 1 && facts.numel <= most,
            std::string(name) + " must hold one value" + (most > 1 ? " or two" : ""));
  return values_of(tensor, facts, ScalarType::Double, name);
}

// The tensor's elements, one after another in the type; `tensor` becomes what holds them.
Values ProblemBuilder::values_of(std::optional<Tensor>& tensor, const Facts& facts,
                                 ScalarType dtype, const char* name) const {
  check_device(facts, name);
  checked_dtype(facts, true, name);
  checked_data(facts, name);
  if (facts.type != dtype) tensor = torch::stable::to(*tensor, dtype);
  if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
  return {checked_data(Facts(*tensor), name), *dtype_of(dtype), facts.numel};
}

void ProblemBuilder::check_device(const Facts& tensor, const char* name) const {
  FCE_CHECK(tensor.device_type == device_type_ && tensor.device_index == device_index_,
            std::string(name) + " must be on the input's device");
}

void ProblemBuilder::set_class_operand(Operand& operand, const Facts& tensor, const char* name) {
  operand.dtype = checked_dtype(tensor, true, name);
  FCE_CHECK(equal(tensor.sizes, sizes_), std::string(name) + " must have the input's shape " +
                                             to_string(sizes_) + ", got " +
                                             to_string(tensor.sizes));
  operand.data = checked_data(tensor, name);
  if (class_dim_ >= 0) operand.class_stride = tensor.strides[class_dim_];
  int d = 0;
  for (int64_t i = 0; i < tensor.dim(); i++)
    if (i != class_dim_) operand.row_strides[d++] = tensor.strides[i];
}

void ProblemBuilder::set_row_operand(Operand& operand, const Facts& tensor, const char* name) {
  FCE_CHECK(equal(tensor.sizes, row_sizes()), std::string(name) + " must have the shape " +
                                                  to_string(row_sizes()) + ", got " +
                                                  to_string(tensor.sizes));
  operand.dtype = *dtype_of(tensor.type);
  operand.data = checked_data(tensor, name);
  for (int64_t d = 0; d < tensor.dim(); d++) operand.row_strides[d] = tensor.strides[d];
}

void ProblemBuilder::set_logical(Operand& operand, void* data, ScalarType dtype) {
  operand.data = data;
  operand.dtype = *dtype_of(dtype);
  int64_t stride = 1;
  for (int d = row_dims_; d-- > 0;) {
    operand.row_strides[d] = stride;
    stride *= row_sizes_[d];
  }
}

void ProblemBuilder::set_grad(const Tensor& tensor) {
  const Facts grad(tensor);
  check_device(grad, "grad");
  set_class_operand(problem_.grad, grad, "grad");
  FCE_CHECK(!overlaps_itself(grad), "grad must not have elements that share memory");
  FCE_CHECK(problem_.grad.dtype == problem_.input.dtype, "grad must have the input's type");
}

void ProblemBuilder::set_target_grad(const Tensor& target_grad) {
  set_class_operand(problem_.target_grad, Facts(target_grad), "target_grad");
}

void ProblemBuilder::set_scale_grad(const Tensor& tensor) {
  const Facts scale_grad(tensor);
  check_device(scale_grad, "scale_grad");
  FCE_CHECK(scale_grad.type == ScalarType::Double && scale_grad.numel == 1,
            "scale_grad must hold one value in float64");
  problem_.scale_grad = single_operand(scale_grad, "scale_grad");
}

void ProblemBuilder::set_loss(const Tensor& tensor) {
  const Facts loss(tensor);
  checked_dtype(loss, true, "loss");
  if (!problem_.reduces())
    set_row_operand(problem_.loss, loss, "loss");
  else
    problem_.loss = single_operand(loss, "loss");
}

void ProblemBuilder::set_stats(const Tensor& tensor) {
  Problem& p = problem_;
  if (p.probabilities)
    set_stats({&p.row_max, &p.row_rest, &p.row_mass, &p.row_mass_low}, tensor, stats_dtype_);
  else
    set_stats({&p.row_max, &p.row_rest}, tensor, stats_dtype_);
}

void ProblemBuilder::add_stats(std::initializer_list<Operand*> operands, const Tensor& tensor,
                               ScalarType dtype) {
  set_stats(operands, tensor, dtype);
  added_.insert(added_.end(), operands);
}

void ProblemBuilder::set_stats(std::initializer_list<Operand*> operands, const Tensor& tensor,
                               ScalarType dtype) {
  const Facts stats(tensor);
  check_device(stats, "stats");
  const auto numbers = static_cast<int64_t>(operands.size());
  const std::array<int64_t, 2> sizes{numbers, problem_.rows};
  const bool is_dense = stats.contiguous || stats.numel == 0;
  FCE_CHECK(stats.type == dtype && is_dense && equal(stats.sizes, sizes),
            "stats must be what the forward operator returned for the same arguments");
  set_numbers(operands, stats, problem_.rows);
}

// Each of them `distance` elements after the last.
void ProblemBuilder::set_numbers(std::initializer_list<Operand*> operands, const Facts& tensor,
                                 int64_t distance) {
  auto* data = static_cast<std::byte*>(checked_data(tensor, "stats"));
  for (Operand* operand : operands) {
    set_logical(*operand, data, tensor.type);
    data += distance * tensor.item_bytes;
  }
}

void ProblemBuilder::set_shard(int64_t first_class, int64_t classes, int64_t vocabulary) {
  Problem& p = problem_;
  FCE_CHECK(vocabulary > 0, "num_classes must be positive, got " + std::to_string(vocabulary));
  FCE_CHECK(classes >= 0 && classes <= p.classes, "shard_classes must be from 0 to the input's " +
                                                      std::to_string(p.classes) + " columns, got " +
                                                      std::to_string(classes));
  const bool is_refused = first_class == kRefused && classes == 0;
  FCE_CHECK(is_refused || (first_class >= 0 && first_class <= vocabulary - classes),
            "class_offset must leave the shard's classes within the " + std::to_string(vocabulary) +
                ", got " + std::to_string(first_class));
  FCE_CHECK(!p.is_focal(), "a shard of the classes takes no focal_gamma");
  p.classes = classes;
  p.first_class = first_class;
  p.vocabulary = vocabulary;
}

void ProblemBuilder::set_shard_sums(const Tensor& tensor, int64_t shards) {
  Problem& p = problem_;
  const Facts packets(tensor);
  check_device(packets, "packets");
  const std::array<int64_t, 3> sizes{shards, kShardNumbers, p.rows + kShardColumns};
  FCE_CHECK(packets.type == stats_dtype_ && packets.contiguous && shards > 0 &&
                equal(packets.sizes, sizes),
            "packets must be those of shard_forward for the same rows, stacked");
  set_numbers({&p.row_max, &p.row_rest, &p.row_gaps, &p.row_mass}, packets, p.rows + kShardColumns);
}

void ProblemBuilder::set_shard_stats(const Tensor& stats) {
  Problem& p = problem_;
  set_stats({&p.row_max, &p.row_rest, &p.row_mass}, stats, ScalarType::Double);
}

void ProblemBuilder::set_totals(const Tensor& tensor) {
  const Facts totals(tensor);
  check_device(totals, "totals");
  FCE_CHECK(totals.type == ScalarType::Double && totals.contiguous && totals.dim() == 1 &&
                totals.numel * totals.item_bytes == sizeof(Totals),
            "totals must be what the forward operator returned for the same arguments");
  problem_.totals = static_cast<Totals*>(checked_data(totals, "totals"));
}

void ProblemBuilder::set_grad_output(const Tensor& tensor) {
  const Facts grad_output(tensor);
  checked_dtype(grad_output, true, "grad_output");
  check_device(grad_output, "grad_output");
  if (!problem_.reduces()) {
    set_row_operand(problem_.grad_output, grad_output, "grad_output");
  } else {
    FCE_CHECK(grad_output.numel == 1, "grad_output must hold one value");
    problem_.grad_output = single_operand(grad_output, "grad_output");
  }
}

void ProblemBuilder::add_rows(Operand& operand, const Tensor& tensor, const char* name) {
  const Facts rows(tensor);
  check_device(rows, name);
  FCE_CHECK(dtype_of(rows.type), std::string(name) + " must be of a type that the kernels know");
  set_row_operand(operand, rows, name);
  added_.push_back(&operand);
}

void ProblemBuilder::add_expanded(Operand& operand, const Tensor& tensor, const char* name) {
  const Facts values(tensor);
  check_device(values, name);
  operand.dtype = checked_dtype(values, true, name);
  operand.data = checked_data(values, name);
  const int64_t missing = row_dims_ - values.dim();
  bool expands = missing >= 0;
  for (int64_t d = 0; expands && d < values.dim(); d++) {
    const int64_t size = row_sizes_[missing + d];
    expands = values.sizes[d] == size || values.sizes[d] == 1;
    operand.row_strides[missing + d] = values.sizes[d] == 1 ? 0 : values.strides[d];
  }
  FCE_CHECK(expands, std::string(name) + " must expand to the shape " + to_string(row_sizes()) +
                         ", got " + to_string(values.sizes));
  added_.push_back(&operand);
}

Problem& ProblemBuilder::build() {
  Problem& p = problem_;
  const Problem logical = p;  // row dimensions still in the input's order
  const auto from = operands(logical);
  const auto to = operands(p);
  std::vector<Operand> added;
  for (const Operand* operand : added_) added.push_back(*operand);

  std::array<int, kMaxRowDims> order;
  int* end = order.data();
  for (int d = 0; d < row_dims_; d++)
    if (row_sizes_[d] != 1) *end++ = d;
  std::sort(order.data(), end, [&](int a, int b) {
    const int64_t* strides = logical.input.row_strides;
    return strides[a] != strides[b] ? strides[a] > strides[b] : a < b;
  });

  int dims = 0;
  for (const int* next = order.data(); next != end; next++) {
    const int d = *next;
    const int64_t size = row_sizes_[d];
    bool merges = dims > 0;
    for (size_t i = 0; i < to.size(); i++)
      merges &= dims > 0 && to[i]->row_strides[dims - 1] == from[i]->row_strides[d] * size;
    for (size_t i = 0; i < added.size(); i++)
      merges &= dims > 0 && added_[i]->row_strides[dims - 1] == added[i].row_strides[d] * size;
    if (!merges) dims++;
    p.row_sizes[dims - 1] = merges ? p.row_sizes[dims - 1] * size : size;
    for (size_t i = 0; i < to.size(); i++) to[i]->row_strides[dims - 1] = from[i]->row_strides[d];
    for (size_t i = 0; i < added.size(); i++)
      added_[i]->row_strides[dims - 1] = added[i].row_strides[d];
  }
  if (dims == 0) {  // one row: any stride is right, and 1 lets the kernels use it directly
    p.row_sizes[0] = 1;
    for (Operand* operand : to) operand->row_strides[0] = 1;
    for (Operand* operand : added_) operand->row_strides[0] = 1;
    dims = 1;
  }
  p.row_dims = dims;

  // Tiles run along the last dimension, whose rows are nearest to one another; where there are too
  // few, along the next that has more, or else the longest. What was last is next to it then.
  constexpr int64_t kLongRun = 8;
  int along = dims - 1;
  while (along >= 0 && p.row_sizes[along] < kLongRun) along--;
  if (along < 0)
    along = static_cast<int>(std::max_element(p.row_sizes, p.row_sizes + dims) - p.row_sizes);
  if (along != dims - 1) {
    const auto put_last = [&](int64_t* each) {
      std::rotate(each + along, each + along + 1, each + dims);
    };
    put_last(p.row_sizes);
    for (Operand* operand : to) put_last(operand->row_strides);
    for (Operand* operand : added_) put_last(operand->row_strides);
  }
  return p;
}

}  // namespace fused_ce
