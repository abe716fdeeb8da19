// What of this build a device can run.
#pragma once

namespace fused_ce::cuda {

// The compute capability, times ten, that the kernels were compiled for which run on the current
// device; 0 for a device of an architecture that the build has neither code nor PTX for.
int code_for_current_device();

}  // namespace fused_ce::cuda
