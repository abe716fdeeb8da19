// From the dispatcher's stack to a function's arguments, and from its result back to the stack.
//
// As torch's TORCH_BOX does, and for functions that take the options as one struct: it is read from
// as many places of the stack as the list in options.h has lines.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>
#include <type_traits>

#include "checks.h"

namespace fused_ce {

template <class T>
struct Unboxed {
  static T take(StableIValue*& next) { return torch::stable::detail::to<T>(*next++); }
};

#define FCE_TAKE_TENSOR(name) .name = Unboxed<std::optional<Tensor>>::take(next),
#define FCE_TAKE_NUMBER(type, schema_type, name, value) \
  .name = static_cast<type>(Unboxed<Schema_##schema_type>::take(next)),
#define FCE_TAKE_TYPE(name) .name = Unboxed<std::optional<ScalarType>>::take(next),

template <>
struct Unboxed<OptionArguments> {
  using Schema_int = int64_t;
  using Schema_float = double;

  static OptionArguments take(StableIValue*& next) {
    return {FCE_FOR_OPTIONS(FCE_TAKE_TENSOR, FCE_TAKE_TENSOR, FCE_TAKE_NUMBER, FCE_TAKE_TYPE)};
  }
};

struct DeleteHandle {
  void operator()(AtenTensorOpaque* handle) const { aoti_torch_delete_tensor_object(handle); }
};

// A tensor as the dispatcher takes it. What overwrites an argument makes that of its result first:
// no lack of memory may come between a gradient that is written and the caller.
using Handle = std::unique_ptr<AtenTensorOpaque, DeleteHandle>;

inline Handle handle_of(const Tensor& tensor) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  return Handle(handle);
}

inline void put_results(StableIValue* stack, Handle result) {
  *stack = torch::stable::detail::from(result.release());
}

template <class... Results>
void put_results(StableIValue* stack, const std::tuple<Results...>& results) {
  std::apply(
      [&](const Results&... result) {
        ((*stack++ = torch::stable::detail::from<Results>(result)), ...);
      },
      results);
}

template <class Result>
void put_results(StableIValue* stack, const Result& result) {
  *stack = torch::stable::detail::from<Result>(result);
}

template <class Result, class... Parameters>
void call_boxed(Result (*function)(Parameters...), StableIValue* stack) {
  [[maybe_unused]] StableIValue* next = stack;
  // Braces, so that the arguments are taken from left to right.
  std::tuple<std::decay_t<Parameters>...> arguments{
      Unboxed<std::decay_t<Parameters>>::take(next)...};
  if constexpr (std::is_void_v<Result>)
    std::apply(function, arguments);
  else
    put_results(stack, std::apply(function, arguments));
}

// For Library::impl(): `function` as the dispatcher calls it.
template <auto function>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  call_boxed(function, stack);
}

}  // namespace fused_ce
