// The backward half of rapfast._C.
#pragma once

#include <pybind11/pybind11.h>

namespace rapfast {

void bind_backward(pybind11::module_& m);

}  // namespace rapfast
