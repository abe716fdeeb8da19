// See kernels.h.
#include "element_kernel.h"

namespace fused_ce::cpu {

template void pointwise_tiles<float>(const Problem&, const Pointwise&, const Tiling&, int64_t,
                                     int64_t, double*);

}  // namespace fused_ce::cpu
