// Whether a device can run the kernels of this build.
#pragma once

#include <cstdint>

namespace fused_ce::cuda {

// False for a device of an architecture that the build has neither code nor PTX for, and where
// there is no such device.
bool has_code_for(int64_t device_index);

}  // namespace fused_ce::cuda
