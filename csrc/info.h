// The part of rapfast._C that describes the build and the machine.
#pragma once

#include <pybind11/pybind11.h>

namespace rapfast {

// Adds to the module, all without arguments:
//   build_info() -> dict: version, compiler, flags, CPU and CUDA architectures
//   cpu_missing() -> list: instruction sets that the build needs and this CPU lacks
//   cpu_supported() -> bool: there are none
//   cuda_devices() -> dict: devices (a list of dicts), reason (why there are none), driver, runtime
void bind_info(pybind11::module_& module);

}  // namespace rapfast
