// What `rapfast info` shows about CUDA: the devices, or why there are none.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rapfast {

struct CudaDevice {
  int ordinal;  // as CUDA numbers it, after CUDA_VISIBLE_DEVICES
  std::string name;
  int major, minor;      // compute capability
  int64_t total_memory;  // bytes
  int multiprocessors;
};

struct CudaQuery {
  std::vector<CudaDevice> devices;
  std::string reason;   // one sentence; set when devices is empty
  int driver_version;   // 1000 * major + 10 * minor, the newest CUDA the driver runs; 0 without a
                        // driver
  int runtime_version;  // same encoding, the CUDA this build was compiled with
};

// Asks the driver. It creates no context and never throws for a missing driver or device, but it
// does initialise the driver, after which a fork()ed child can't use CUDA: call it on request,
// never at import.
CudaQuery query_cuda_devices();

}  // namespace rapfast
