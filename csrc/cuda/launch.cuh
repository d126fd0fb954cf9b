// Kernels that follow each other closely: where the GPU has programmatic dependent launches, one is there before the
// kernel in front has ended.
#pragma once

#include <atomic>

#include "check.cuh"

namespace rapfast {

// A kernel that was launched behind another touches nothing that it writes before it has waited.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel be launched once every block has come here.
__device__ __forceinline__ void let_next_kernel_come() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct DeviceFacts {
  int processors;
  bool programmatic;  // has dependent launches
};

inline DeviceFacts device_facts() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // processors, negative without dependent launches
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int value = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    int major = 0;
    check(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    if (major < 9) value = -value;
    if (device < kMaxDevices) known[device].store(value, std::memory_order_relaxed);
  }
  return {value < 0 ? -value : value, value > 0};
}

// Launches a kernel that begins with wait_for_kernel_before().
template <typename... Parameters, typename... Arguments>
void launch_behind(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device_facts().programmatic ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace rapfast
