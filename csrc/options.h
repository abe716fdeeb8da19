// The options of a loss, in the one list that everything else is made from.
//
// Every operator takes all of them after its tensors, in this order: the schema's text (ops.cpp),
// what the dispatcher hands over (OptionArguments in checks.h), its reading from the stack
// (boxing.h) and what the kernels see (Options, in every Problem) are the list, expanded. A new
// option is a line here and one in fused_ce/options.py.
#pragma once

#include <cstdint>

namespace fused_ce {

enum class DType : uint8_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt64,
  kInt32,
  kInt16,
  kUInt8
};

// The values are those of torch.nn._reduction.
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Values that lie next to each other; no data where there are none.
struct Values {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// TENSOR(name), NUMBER(C++ type, schema type, name, default) and TYPE(name). The defaults are those
// of most calls, which then leave the options out: converting one takes as long as computing a row.
#define FCE_FOR_OPTIONS(TENSOR, NUMBER, TYPE)                                           \
  TENSOR(weight)      /* [C], in the accumulation type once checked */                  \
  TENSOR(denominator) /* one value, in float64 once checked, for a mean to divide by */ \
  TENSOR(logit_scale) /* the same, a factor of all logits */                            \
  NUMBER(Reduction, int, reduction, 1)                                                  \
  NUMBER(int64_t, int, ignore_index, -100)                                              \
  NUMBER(double, float, label_smoothing, 0.0) /* within [0, 1] */                       \
  NUMBER(double, float, softcap, 0.0)         /* of scaled logits, where positive */    \
  TYPE(loss_dtype)                            /* that of the input where none is given */

// The end of an operator's schema.
#define FCE_TENSOR_SCHEMA(name) ", Tensor? " #name "=None"
#define FCE_NUMBER_SCHEMA(type, schema_type, name, value) ", " #schema_type " " #name "=" #value
#define FCE_TYPE_SCHEMA(name) ", ScalarType? " #name "=None"
#define FCE_OPTIONS_SCHEMA FCE_FOR_OPTIONS(FCE_TENSOR_SCHEMA, FCE_NUMBER_SCHEMA, FCE_TYPE_SCHEMA)

#define FCE_NOTHING(...)
#define FCE_VALUES_MEMBER(name) Values name;
#define FCE_NUMBER_MEMBER(type, schema_type, name, value) type name = static_cast<type>(value);

// As the kernels see them: plain data, whose memory has been proved.
struct Options {
  FCE_FOR_OPTIONS(FCE_VALUES_MEMBER, FCE_NUMBER_MEMBER, FCE_NOTHING)
};

}  // namespace fused_ce
