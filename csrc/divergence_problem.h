// One call for a divergence as plain data, beside the Problem that has its two rows of logits.
//
// The Problem's input and target are the student's and the teacher's logits; its loss, gradients
// and options are what they are for any loss. checks.cpp has proved the operands, and merged their
// row dimensions with those of the Problem.
#pragma once

#include "problem.h"

namespace fused_ce {

struct Divergence {
  double temperature = 1.0;
  bool reverse = false;    // KL(student || teacher) instead of KL(teacher || student)
  bool in_double = false;  // what is computed, and what the statistics are in

  // [rows]; no data where the statistics are not kept. The first distribution is the one that the
  // mean is taken over: the teacher's, or in reverse the student's.
  Operand first_max, first_rest, second_max, second_rest;
  Operand mean_gap;  // in reverse alone
};

}  // namespace fused_ce
