// See kernels.h.
#include "kernels_impl.h"

namespace fused_ce::cpu {

template void divergence_tiles<double>(const Problem&, const Divergence&, const Tiling&,
                                       const Threads&, double*);
template void divergence_backward_tiles<double>(const Problem&, const Divergence&, const Tiling&,
                                                const Threads&);

}  // namespace fused_ce::cpu
