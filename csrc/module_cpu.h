// Binds CPU stages: each is a function of keyword arguments, `bits` (32 or 64, the floating type of all
// parameters), `threads`, and what its read_ function takes. The GIL is released while it runs.
#pragma once

#include <pybind11/pybind11.h>

#include "arguments.h"

namespace rapfast {

template <typename Params>
void run_cpu(Arguments& a, Params (*read)(Arguments&), void (*stage)(const Params&, int)) {
  const Params params = read(a);
  const int threads = a.get<int>("threads");
  a.finish();
  pybind11::gil_scoped_release release;
  stage(params, threads);
}

#define RAPFAST_CPU_STAGE(name, Params)                                                  \
  m.def(#name, [](const pybind11::kwargs& kwargs) {                                      \
    Arguments a(kwargs);                                                                 \
    if (a.get<int>("bits") == 64) {                                                      \
      run_cpu<Params<double>>(a, &read_##name<double>, &name##_cpu<double>);             \
    } else {                                                                             \
      run_cpu<Params<float>>(a, &read_##name<float>, &name##_cpu<float>);                \
    }                                                                                    \
  })

}  // namespace rapfast
