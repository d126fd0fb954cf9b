// rapfast._C: the stages for Python. It checks nothing and allocates nothing: rapfast/ops does both.
// Every argument is given by name, tensors by their address (0: absent). The GIL is released while a
// stage runs.
#include <pybind11/pybind11.h>

#include "info.h"
#include "module_cuda.h"
#include "stage_arguments.h"

namespace py = pybind11;
using namespace rapfast;

namespace {

// A CPU stage as a function of keyword arguments: `bits` (32 or 64, the floating type of all
// parameters), `threads`, and what Read takes.
template <typename T, typename Params>
void run(Arguments& a, Params (*read)(Arguments&), void (*stage)(const Params&, int)) {
  const Params params = read(a);
  const int threads = a.get<int>("threads");
  a.finish();
  py::gil_scoped_release release;
  stage(params, threads);
}

#define RAPFAST_CPU_STAGE(name, Params)                                   \
  m.def(#name, [](const py::kwargs& kwargs) {                             \
    Arguments a(kwargs);                                                  \
    if (a.get<int>("bits") == 64) {                                       \
      run<double, Params<double>>(a, &read_##name<double>, &name##_cpu<double>); \
    } else {                                                              \
      run<float, Params<float>>(a, &read_##name<float>, &name##_cpu<float>);     \
    }                                                                     \
  })

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "rapfast's stages on raw memory. Call them through rapfast.ops.";
  bind_info(m);
  RAPFAST_CPU_STAGE(project, ProjectParams);
  RAPFAST_CPU_STAGE(color, ColorParams);
  RAPFAST_CPU_STAGE(color_net, ColorNetParams);
  RAPFAST_CPU_STAGE(bin, BinParams);
  RAPFAST_CPU_STAGE(blend, BlendParams);
  RAPFAST_CPU_STAGE(composite, CompositeParams);
  bind_cuda(m);
}
