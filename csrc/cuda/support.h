// Whether a device can run the kernels of this build.
#pragma once

namespace fused_ce::cuda {

// False for a device of an architecture that the build has neither code nor PTX for.
bool has_code_for_current_device();

}  // namespace fused_ce::cuda
