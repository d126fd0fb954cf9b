// The CUDA half of rapfast._C; in a build without CUDA it adds nothing.
#pragma once

#include <pybind11/pybind11.h>

#include "build_config.h"

#if RAPFAST_WITH_CUDA
#include "arguments.h"
#include "render.h"
#endif

namespace rapfast {

void bind_cuda(pybind11::module_& m);
void bind_backward_cuda(pybind11::module_& m);

#if RAPFAST_WITH_CUDA

// Where a call runs: read last, then everything else is known and the GIL can go.
struct Place {
  int device;
  cudaStream_t stream;
};

inline Place read_place(Arguments& a) {
  return {a.get<int>("device"), reinterpret_cast<cudaStream_t>(a.get<uintptr_t>("stream"))};
}

inline RenderSizes read_sizes(Arguments& a) {
  RenderSizes s;
  s.n_scenes = a.get<int64_t>("n_scenes");
  s.n_cameras = a.get<int64_t>("n_cameras");
  s.n_gaussians = a.get<int64_t>("n_gaussians");
  s.width = a.get<int32_t>("width");
  s.height = a.get<int32_t>("height");
  s.n_channels = a.get<int64_t>("n_channels");
  s.record_capacity = a.get<int64_t>("record_capacity");
  s.capacity = a.get<int64_t>("capacity");
  s.keep_state = a.get<bool>("keep_state");
  s.first_tile_row = a.get<int32_t>("first_tile_row");
  s.n_tile_rows = a.get<int32_t>("n_tile_rows");
  return s;
}

#endif

}  // namespace rapfast
