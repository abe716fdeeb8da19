// One call of a pointwise loss as plain data, beside the Problem that has its input, its target of
// the same shape, its gradients and its loss.
//
// Elements have nothing to do with one another: each is a row of one class. checks.cpp has proved
// the operands, and merged their dimensions with those of the Problem.
#pragma once

#include "problem.h"

namespace fused_ce {

// As fused_ce/pointwise/reference.py numbers them.
enum class PointwiseLoss : int64_t {
  kBinaryCrossEntropy = 0,
  kSigmoidFocal = 1,
  kKlDivergence = 2,
  kKlDivergenceOfLogs = 3,  // whose target is log-probabilities
};

struct Pointwise {
  PointwiseLoss loss = PointwiseLoss::kBinaryCrossEntropy;
  double alpha = -1.0;       // of a focal loss: the factor of class 1; none where it is negative
  double gamma = 0.0;        // of a focal loss: the power
  double denominator = 1.0;  // what the sum of the losses is divided by

  // Each is [elements], with strides of 0 where it was expanded, of any floating type; no data
  // means 1.
  Operand weight;      // a factor of the element's loss
  Operand pos_weight;  // of a binary cross entropy: a factor of the target's part in it
};

}  // namespace fused_ce
