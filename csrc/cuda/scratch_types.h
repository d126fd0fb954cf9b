// What the stage headers need to declare their CUDA launchers, with and without a CUDA toolkit.
#pragma once

#if RAPFAST_WITH_CUDA
#include <cuda_runtime_api.h>

#include <cstdint>

namespace rapfast {
struct BinScratch;
struct Counts;
struct DeviceView;
struct HostMail;
struct ProjectScratch;
struct TileBoxes;

// Memory that a call finds undefined and wants to be 0, aligned as the arena aligns it.
struct ClearedMemory {
  void* begin;
  int64_t bytes;
};
}  // namespace rapfast
#endif
