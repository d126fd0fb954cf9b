#include "module_bwd.h"

#include "backward_arguments.h"
#include "module_cpu.h"

namespace rapfast {

void bind_backward(pybind11::module_& m) {
  RAPFAST_CPU_STAGE(project_bwd, ProjectBwdParams);
  RAPFAST_CPU_STAGE(color_bwd, ColorBwdParams);
  RAPFAST_CPU_STAGE(blend_bwd, BlendBwdParams);
  RAPFAST_CPU_STAGE(composite_bwd, CompositeBwdParams);
}

}  // namespace rapfast
