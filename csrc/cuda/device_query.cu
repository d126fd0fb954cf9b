// Lists the CUDA devices for `rapfast info`, in sentences where there are none.
#include <cuda_runtime.h>

#include <string>

#include "cuda/device_query.h"

namespace rapfast {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string why_no_device(cudaError_t error, int driver_version) {
  if (driver_version == 0) {
    return "No NVIDIA driver was found: install one for CUDA " + version_text(CUDART_VERSION) +
           " or newer to use a GPU.";
  }
  // Within one major version an older driver runs a newer runtime (CUDA's minor version
  // compatibility).
  if (error == cudaErrorInsufficientDriver || driver_version / 1000 < CUDART_VERSION / 1000) {
    return "The NVIDIA driver runs CUDA " + version_text(driver_version) +
           " at most and rapfast was built with CUDA " + version_text(CUDART_VERSION) +
           ": update the driver, or reinstall rapfast with an nvcc of CUDA " +
           version_text(driver_version) + " or older.";
  }
  if (error == cudaErrorNoDevice || error == cudaSuccess) {
    return "The NVIDIA driver shows no device: check CUDA_VISIBLE_DEVICES, and nvidia-smi for the "
           "machine's GPUs.";
  }
  return std::string("The CUDA driver answered ") + cudaGetErrorName(error) + ": " +
         cudaGetErrorString(error) + ".";
}

}  // namespace

CudaQuery query_cuda_devices() {
  CudaQuery query{};
  query.runtime_version = CUDART_VERSION;
  if (cudaDriverGetVersion(&query.driver_version) != cudaSuccess) query.driver_version = 0;

  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  for (int ordinal = 0; error == cudaSuccess && ordinal < count; ++ordinal) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, ordinal);
    if (error != cudaSuccess) break;
    query.devices.push_back({ordinal, properties.name, properties.major, properties.minor,
                             static_cast<int64_t>(properties.totalGlobalMem),
                             properties.multiProcessorCount});
  }
  if (query.devices.empty()) query.reason = why_no_device(error, query.driver_version);
  // The failed query must not surface as the error of the next launch in this process.
  cudaGetLastError();
  return query;
}

}  // namespace rapfast
