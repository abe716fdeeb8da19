// The CPU kernels as their callers see them: plain data in, the work shared out to threads.
//
// A call raises std::out_of_range for a target that is no class, before it writes anything but a
// loss. Its result has the same bits for any number of threads.
#pragma once

#include <vector>

#include "../problem.h"
#include "rows/targets.h"
#include "rows/tiles.h"

namespace fused_ce::cpu {

// The loss, and where the problem has memory for them the statistics, the totals and the gradient.
void forward(Problem& p, const Threads& threads);

// The gradient with respect to the logits, from the logits, the statistics and the totals.
void backward(Problem& p, const Threads& threads);

// The gradient with respect to probability targets.
void backward_target(Problem& p, const Threads& threads);

// The gradient with respect to the factor of all logits.
void backward_logit_scale(Problem& p, const Threads& threads);

// Raises std::out_of_range for a target that is no class; they must be indices.
void check_targets(const Problem& p, const Threads& threads);

// What the losses of rows are divided by, into p.known; of rows that have no class indices.
void find_denominators(Problem& p, const Threads& threads);

// The same from what is known of the rows.
void find_denominators(Problem& p, const TargetScan& all);

// What the rows that count add up to. Raises std::out_of_range for a target that is no class, of a
// shard none of the whole vocabulary; a shard's rows have no class weights here.
TargetScan scan_rows(const Problem& p, const Threads& threads);

// Of all class weights, or the number of classes.
double sum_class_weights(const Problem& p);

// What the classes of a shard come down to, row by row; targets out of range count as ignored.
void find_shard_sums(const Problem& p, const Threads& threads);

// The loss, from the sums of the tiles' losses.
void store_loss(const Problem& p, const std::vector<double>& tile_losses);

// Multiplies elements by a factor. A zero stays one, even times nan: it may be the gradient of an
// ignored row.
void scale(const Elements& elements, double factor, const Threads& threads);

const char* instruction_set();

}  // namespace fused_ce::cpu
