// See row_kernels.h.
#include "row_kernels_impl.h"

namespace fused_ce::cpu {

template void backward_tiles<float>(const Problem&, const Tiling&, const Threads&);
template void backward_target_tiles<float>(const Problem&, const Tiling&, const Threads&);
template void backward_scale_tiles<float>(const Problem&, const Tiling&, const Threads&, double*);
template void backward_shared<float>(const Problem&, const Tiling&, const Threads&);

}  // namespace fused_ce::cpu
