// What a kernel has to know of one row besides its logits, read once per row.
#pragma once

#include <cstdint>

#include "../formula.h"
#include "span.h"
#include "targets.h"
#include "tiles.h"

namespace fused_ce {

struct RowTask {
  bool counted;   // nothing of an ignored row is used: its loss and gradient are zero
  int64_t index;  // the target class, or -1 where the target is probabilities
  double weight;  // of the target class
  double scale;   // what the row's gradient is multiplied with: grad_output / denominator
};

template <class A>
class TaskReader {
 public:
  TaskReader(const Problem& p, const Tile& tile)
      : p_(p), target_(tile.run(p.target)), grad_output_(tile.run(p.grad_output)) {}

  RowTask read(int64_t row) const {
    RowTask task{true, -1, 1.0, 1.0};
    if (!p_.probabilities) {
      task.index = load_index(p_.target, target_.at(row));
      task.counted = is_counted(p_, task.index);
      if (!task.counted) return task;
      if (p_.weight) task.weight = static_cast<const A*>(p_.weight)[task.index];
    }
    const bool scaled = p_.grad_output.data;
    task.scale = scaled ? load_value<double>(p_.grad_output, grad_output_.at(row)) : 1.0;
    task.scale /= p_.denominator;
    return task;
  }

 private:
  const Problem& p_;
  const Run target_, grad_output_;
};

// The row's sum of exp(x - M) is kept in two parts: a row that is nearly certain of a wrong class
// has a sum just above 1, and what it has above 1 must survive until the backward.
template <class A>
inline double load_row_sum(const Problem& p, int64_t offset) {
  double sum = static_cast<const A*>(p.row_sum.data)[offset];
  if (p.row_tail.data) sum += static_cast<const A*>(p.row_tail.data)[offset];
  return sum;
}

template <class A>
inline void store_row_sum(double sum, const Problem& p, int64_t offset) {
  const A rounded = static_cast<A>(sum);
  static_cast<A*>(p.row_sum.data)[offset] = rounded;
  if (p.row_tail.data) static_cast<A*>(p.row_tail.data)[offset] = static_cast<A>(sum - rounded);
}

// Calls use(c) with a function c(i) for the classes first + i: the coefficient a_c of the row's
// probabilities, or the class weight, which smoothing shares out, where the target is an index.
template <class A, class Use>
inline void with_coefficients(const Problem& p, int64_t first, const A* probabilities,
                              Smoothing<A> smoothing, const Use& use) {
  const A* weight = static_cast<const A*>(p.weight);
  if (weight) weight += first;
  if (probabilities && weight) {
    use([=](int64_t i) { return probability_coefficient(probabilities[i], weight[i], smoothing); });
  } else if (probabilities) {
    use([=](int64_t i) { return probability_coefficient(probabilities[i], A(1), smoothing); });
  } else if (weight) {
    use([=](int64_t i) { return weight[i]; });
  } else {
    use([](int64_t) { return A(1); });
  }
}

}  // namespace fused_ce
