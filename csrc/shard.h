// The mathematics of a vocabulary whose classes are sharded; see also formula.h.
//
// A shard's sums of a row, with R_g without the 1 of its largest logit, are those of a part of the
// row, and merged as such: with M = max M_g and d_g = M - M_g
//     1 + R = sum_g (1 + R_g) exp(-d_g),      G = sum_g (G_g + A_g d_g),      A = sum_g A_g,
//     loss = G + A log1p(R),      d loss / d x_c = A / (1 + R) exp(x_c - M) - a_c.
// In double and in the order of the shards, so that whoever merges them gets the same bits.
#pragma once

#include "formula.h"
#include "host_device.h"

namespace fused_ce {

template <class Exp>
FCE_HOST_DEVICE void merge_shard(RowSums<double>& row, double max, double rest, double gaps,
                                 double mass, const Exp& exp) {
  RowSums<double> part;
  part.max = max;
  part.rest = rest;
  part.ones = part.is_masked() ? 0.0 : 1.0;
  part.gaps = gaps;
  part.mass = mass;
  row.merge(part, exp);
}

}  // namespace fused_ce
