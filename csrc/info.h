// The part of rapfast._C that describes the build and the machine.
#pragma once

#include <pybind11/pybind11.h>

namespace rapfast {

// Adds to the module, all without arguments:
//   build_info() -> dict      what CMake built: version, compiler, flags, CPU and CUDA
//   architectures cpu_missing() -> list     instruction sets that the build needs and this CPU
//   lacks; cpu_supported() -> bool: none cuda_devices() -> dict    devices (list of dicts), reason
//   (str, or None when there is a device), driver, runtime
void bind_info(pybind11::module_& module);

}  // namespace rapfast
