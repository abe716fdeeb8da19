// The options of a loss, in the one list that everything else is made from.
//
// Every operator takes all of them after its tensors, in this order: the schema's text (ops.cpp),
// what the dispatcher hands over (OptionArguments in checks.h), its reading from the stack
// (boxing.h) and what the kernels see (Options, in every Problem) are the list, expanded. A new
// option is a line here and one in fused_ce/options.py.
#pragma once

#include <cstdint>

#include "operand.h"

namespace fused_ce {

// The values are those of torch.nn._reduction.
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// What a mean is where no row counts.
enum class OnAllIgnored : int64_t { kNan = 0, kZero = 1 };

// What is done about a target that is no class: an error (on CUDA an assertion of the device), or a
// row whose loss and gradient are nan.
enum class OnOutOfRange : int64_t { kError = 0, kNan = 1 };

// TENSOR(name), ROWS(name) for a value of each row, NUMBER(C++ type, schema type, name, default)
// and TYPE(name). The defaults are those of most calls, which then leave the options out:
// converting one takes as long as computing a row.
#define FCE_FOR_OPTIONS(TENSOR, ROWS, NUMBER, TYPE)                                       \
  TENSOR(weight)      /* [C], in the accumulation type once checked */                    \
  TENSOR(denominator) /* float64 once checked: one value for a mean to divide by, or two, \
                         the second for the z-losses */                                   \
  TENSOR(logit_scale) /* one value in float64 once checked, a factor of all logits */     \
  ROWS(sample_weight) /* a factor of the row's loss; a row of 0 is ignored */             \
  NUMBER(Reduction, int, reduction, 1)                                                    \
  NUMBER(int64_t, int, ignore_index, -100)                                                \
  NUMBER(double, float, label_smoothing, 0.0) /* within [0, 1] */                         \
  NUMBER(double, float, softcap, 0.0)         /* of scaled logits, where positive */      \
  NUMBER(double, float, z_loss, 0.0)          /* a factor of the square of each lse */    \
  NUMBER(double, float, focal_gamma, 0.0)     /* the power of 1 - p_t, where positive */  \
  NUMBER(OnAllIgnored, int, on_all_ignored, 0)                                            \
  NUMBER(OnOutOfRange, int, on_out_of_range, 0)                                           \
  TYPE(loss_dtype) /* that of the input where none is given */

// The end of an operator's schema.
#define FCE_TENSOR_SCHEMA(name) ", Tensor? " #name "=None"
#define FCE_NUMBER_SCHEMA(type, schema_type, name, value) ", " #schema_type " " #name "=" #value
#define FCE_TYPE_SCHEMA(name) ", ScalarType? " #name "=None"
#define FCE_OPTIONS_SCHEMA \
  FCE_FOR_OPTIONS(FCE_TENSOR_SCHEMA, FCE_TENSOR_SCHEMA, FCE_NUMBER_SCHEMA, FCE_TYPE_SCHEMA)

#define FCE_NOTHING(...)
#define FCE_VALUES_MEMBER(name) Values name;
#define FCE_OPERAND_MEMBER(name) Operand name;
#define FCE_NUMBER_MEMBER(type, schema_type, name, value) type name = static_cast<type>(value);

// As the kernels see them: plain data, whose memory has been proved.
struct Options {
  FCE_FOR_OPTIONS(FCE_VALUES_MEMBER, FCE_OPERAND_MEMBER, FCE_NUMBER_MEMBER, FCE_NOTHING)
};

}  // namespace fused_ce
