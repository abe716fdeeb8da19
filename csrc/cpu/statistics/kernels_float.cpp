// See kernels.h.
#include "kernels_impl.h"

namespace fused_ce::cpu {

template void statistics_tiles<float>(const Problem&, const Statistics&, const Tiling&, int64_t,
                                      int64_t);
template void statistics_backward_tiles<float>(const Problem&, const Statistics&, const Tiling&,
                                               int64_t, int64_t);

}  // namespace fused_ce::cpu
