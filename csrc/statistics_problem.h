// One call for row statistics as plain data, beside the Problem that has its logits and targets.
//
// checks.cpp has proved the operands, and merged their row dimensions with those of the Problem.
#pragma once

#include "problem.h"

namespace fused_ce {

// Each operand is [rows], and has no data where nothing is asked for or arrives. All but argmax are
// in the accumulation type, the incoming gradients in any floating type.
struct Statistics {
  double temperature = 1.0;

  Operand log_prob, logsumexp;
  Operand entropy;  // read by the backward if its gradient arrives
  Operand argmax;   // int64: the first of the largest logits, or of the nans
  Operand grad_log_prob, grad_entropy, grad_logsumexp;
};

}  // namespace fused_ce
