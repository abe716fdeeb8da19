// Rows of float16 on chip, a file of their own so that the types compile side by side.
#include "../regimes.h"
#include "on_chip.cuh"

namespace fused_ce::cuda {

void on_chip_float16(const Problem& p, const Result& result, Stream stream) {
  launch_row_on_chip<Float16>(p, result, stream);
}

}  // namespace fused_ce::cuda
