// One cross entropy call as plain data: where the tensors lie, how they are laid out, what was
// asked.
//
// checks.cpp fills it from tensors and has proved by then that every address in it may be touched;
// the kernels of every backend read it.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "options.h"

namespace fused_ce {

// What all rows share.
struct Totals {
  double weight_sum = 0.0;     // of all class weights, or the number of classes
  double denominator = 1.0;    // what the sum of the losses is divided by
  double z_denominator = 1.0;  // what that of the z-losses is divided by
};

struct Problem {
  int64_t classes = 0;
  // Where these are a shard of a vocabulary, which shard.h is about: its size, and which of it the
  // first of them is. A target that belongs to another shard counts, but has no logit here.
  int64_t vocabulary = 0, first_class = 0;
  int64_t rows = 0;
  int row_dims = 0;
  int64_t row_sizes[kMaxRowDims] = {};

  Operand input;        // [rows, classes]
  Operand target;       // [rows] class indices, or [rows, classes] probabilities
  Operand grad;         // like the input; no data when no gradient is asked for
  Operand target_grad;  // like the input; only for probability targets
  Operand scale_grad;   // one value in float64: the gradient of logit_scale
  Operand loss;         // [rows] for Reduction::kNone, else a scalar
  Operand grad_output;  // like the loss, strides 0 for a scalar; no data means 1
  Operand row_max;      // [rows] the maximum logit of the row, in the accumulation type
  Operand row_rest;     // [rows] sum of exp(x - row_max) over all classes but one of the largest
  // [rows] sum of the coefficients, for probability targets: as it is in the accumulation type, and
  // what that leaves out. It goes into every element of the gradient.
  Operand row_mass, row_mass_low;
  Operand row_gaps;  // [rows] of a shard alone: the sum of a_c (row_max - x_c)
  // In memory of the input's device: written by forward where there is any, read by backward.
  Totals* totals = nullptr;

  bool probabilities = false;
  Options options;
  Totals known;  // what the host knows of the totals, where a kernel is not to read them

  FCE_HOST_DEVICE bool is_shard() const { return vocabulary > 0; }
  // Those that label smoothing spreads over.
  FCE_HOST_DEVICE int64_t all_classes() const { return is_shard() ? vocabulary : classes; }

  FCE_HOST_DEVICE bool accumulates_in_double() const { return input.dtype == DType::kFloat64; }
  FCE_HOST_DEVICE bool is_smoothed() const { return options.label_smoothing > 0.0; }
  FCE_HOST_DEVICE bool reduces() const { return options.reduction != Reduction::kNone; }
  FCE_HOST_DEVICE bool divides() const { return options.reduction == Reduction::kMean; }
  FCE_HOST_DEVICE bool weighs_samples() const { return options.sample_weight.data != nullptr; }
  FCE_HOST_DEVICE bool is_focal() const { return options.focal_gamma > 0.0; }
  FCE_HOST_DEVICE bool allows_bad_targets() const {
    return options.on_out_of_range == OnOutOfRange::kNan;
  }
  // Whether a row has none of the options that its kernels are rarely asked for.
  FCE_HOST_DEVICE bool has_plain_rows() const {
    return options.z_loss == 0.0 && !is_focal() && !weighs_samples() && !allows_bad_targets();
  }
  FCE_HOST_DEVICE bool maps_logits() const {
    return options.logit_scale.data || options.softcap > 0.0;
  }
};

// All elements of one tensor, no matter which dimension they belong to.
struct Elements {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int dims = 0;
  int64_t sizes[kMaxRowDims + 1] = {};
  int64_t strides[kMaxRowDims + 1] = {};  // descending
};

}  // namespace fused_ce
