// What the stage headers need to declare their CUDA launchers, with and without a CUDA toolkit.
#pragma once

#if RAPFAST_WITH_CUDA
#include <cuda_runtime_api.h>

namespace rapfast {
struct BinScratch;
struct Counts;
struct DeviceView;
struct ProjectScratch;
struct TileCounting;
}  // namespace rapfast
#endif
