// Multiplies every element of a tensor by a number, for a gradient that is already in place.
//
// The elements are taken in runs along the innermost dimension, each run in blocks, so that memory
// between the rows of a slice is left alone.
#include <algorithm>

#include "kernels.h"
#include "rows/parts.h"
#include "vector/simd.h"
#include "vector/span.h"

namespace fused_ce::cpu {

namespace {

constexpr int64_t kBlock = 2048;

int64_t blocks_per_run(const Elements& e) { return (e.sizes[e.dims - 1] + kBlock - 1) / kBlock; }

template <class A>
void scale_as(const Elements& e, A factor, int64_t begin, int64_t end) {
  const int inner = e.dims - 1;
  Operand operand;
  operand.data = e.data;
  operand.dtype = e.dtype;
  A buffer[kBlock];
  for (int64_t block = begin; block < end; block++) {
    const int64_t first = block % blocks_per_run(e) * kBlock;
    const int64_t n = std::min(kBlock, e.sizes[inner] - first);
    int64_t run = block / blocks_per_run(e);
    int64_t offset = first * e.strides[inner];
    for (int d = inner - 1; d >= 0; d--) {
      offset += run % e.sizes[d] * e.strides[d];
      run /= e.sizes[d];
    }
    const bool direct = is_direct<A>(operand, e.strides[inner]);
    A* x = direct ? static_cast<A*>(e.data) + offset : buffer;
    if (!direct) load_span(operand, offset, e.strides[inner], n, buffer);
    simd::run([&] {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) x[i] = x[i] == A(0) ? A(0) : x[i] * factor;
    });
    if (!direct) store_span(buffer, n, operand, offset, e.strides[inner]);
  }
}

}  // namespace

void scale(const Elements& e, double factor, const Threads& threads) {
  constexpr int64_t kGrainBlocks = 16;
  int64_t blocks = blocks_per_run(e);
  for (int d = 0; d < e.dims - 1; d++) blocks *= e.sizes[d];
  run_parts(threads, blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    if (e.dtype == DType::kFloat64)
      scale_as<double>(e, factor, begin, end);
    else
      scale_as<float>(e, static_cast<float>(factor), begin, end);
  });
}

}  // namespace fused_ce::cpu
