// See row_kernels.h.
#include "row_kernels_impl.h"

namespace fused_ce::cpu {

template void forward_tiles<double>(const Problem&, const Tiling&, const Threads&, double*,
                                    TargetScan*);
template void forward_shared<double>(const Problem&, const Tiling&, const Threads&, double*);

}  // namespace fused_ce::cpu
