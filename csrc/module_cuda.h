// The CUDA half of rapfast._C; in a build without CUDA it adds nothing.
#pragma once

#include <pybind11/pybind11.h>

namespace rapfast {

void bind_cuda(pybind11::module_& m);

}  // namespace rapfast
