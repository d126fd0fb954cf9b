// What the kernels of stage 1 share: how the work is divided, and launches that come before the kernel in front has
// ended.
#pragma once

#include <atomic>

#include "../project.h"
#include "check.cuh"
#include "scratch.h"

namespace rapfast {
namespace {

constexpr int kGroup = 32;        // most cameras that a Gaussian meets per load, one per lane
constexpr int kWarpWords = 2;     // words of 32 Gaussians that a warp of the cull kernel tests
static_assert(kChunkWords == kWarpWords * kThreads / 32, "a block tests one chunk");

constexpr int kRows = 32;          // Gaussians that a warp of the record kernel stages at a time
constexpr int kRowBits = 5;
constexpr int kRowQuads = 3;       // mean, opacity and covariance, in pieces of 16 bytes
constexpr int kRecordThreads = 128, kRecordWarps = kRecordThreads / 32;
constexpr int kRecordBlocks = 6;   // on a processor at once
constexpr int kViewQuads = sizeof(DeviceView) / 16 - sizeof(FrustumTest<float>) / 16;
constexpr int kTestQuads = sizeof(FrustumTest<float>) / 16;
static_assert(sizeof(FrustumTest<float>) % 16 == 0, "tests are copied in pieces of 16 bytes");

// ------------------------------------------------------------------------------------------- launch

// Where the GPU has it, cull and record are launched before the kernel in front has ended (programmatic dependent
// launch); until they have waited for it they touch nothing that it writes.
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

DeviceFacts device_facts() {
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

}  // namespace
}  // namespace rapfast
