// Error checks, the device guard, and the launch geometry that all stages share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rapfast {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here; the next launch is not to blame
  if (error == cudaErrorInsufficientDriver) {
    throw std::runtime_error("rapfast was built with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                             std::to_string(CUDART_VERSION % 1000 / 10) +
                             ", for which this NVIDIA driver is too old: update the driver, or reinstall "
                             "rapfast with an older nvcc");
  }
  throw std::runtime_error(std::string("rapfast: CUDA error in ") + what + ": " +
                           cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// After every launch, in release builds too: a bad launch is named where it happens.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Makes `device` current and puts the caller's device back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

constexpr int kThreads = 256;     // of a block, where nothing speaks for another number
constexpr int kMaxBlocks = 8192;  // of a grid-stride loop: enough to fill any GPU several times

// Blocks for a grid-stride loop over n items.
inline unsigned grid_for(int64_t n, int threads = kThreads) {
  const int64_t blocks = (n + threads - 1) / threads;
  return unsigned(blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

#if defined(__CUDACC__)

constexpr unsigned kFullWarp = 0xffffffffu;

// for (item of [0, n)), spread over the whole grid.
#define RAPFAST_GRID_STRIDE(i, n)                                                       \
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < (n);             \
       i += int64_t(gridDim.x) * blockDim.x)

__device__ __forceinline__ void add_to(int64_t* address, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

#endif

}  // namespace rapfast
