// rapfast._C: the stages for Python. It checks nothing and allocates nothing: rapfast/ops does both.
// Every argument is given by name, tensors by their address (0: absent). The GIL is released while a
// stage runs.
#include <pybind11/pybind11.h>

#include "info.h"
#include "module_bwd.h"
#include "module_cpu.h"
#include "module_cuda.h"
#include "stage_arguments.h"

using namespace rapfast;

PYBIND11_MODULE(_C, m) {
  m.doc() = "rapfast's stages on raw memory. Call them through rapfast.ops.";
  bind_info(m);
  RAPFAST_CPU_STAGE(project, ProjectParams);
  RAPFAST_CPU_STAGE(color, ColorParams);
  RAPFAST_CPU_STAGE(color_net, ColorNetParams);
  RAPFAST_CPU_STAGE(bin, BinParams);
  RAPFAST_CPU_STAGE(blend, BlendParams);
  RAPFAST_CPU_STAGE(composite, CompositeParams);
  bind_backward(m);
  bind_cuda(m);
  bind_backward_cuda(m);
}
