// What the fp16 and the fp32 kernel of the colour network share: what a record is fed, and its colour.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "../color_net.h"
#include "../math/sh.h"
#include "check.cuh"
#include "records.cuh"
#include "scratch.h"

namespace rapfast {

// The fp16 kernel's launcher, csrc/cuda/color_net_half.cu; color_net_cuda calls it.
void color_net_half_cuda(const ColorNetParams<float>& net, const DeviceView* views, const int32_t* image_ids,
                         cudaStream_t stream);

constexpr int kNetThreads = 128;  // of a block, both kernels

// Where a record reads the three maps: offset of the first pixel in numbers, -1 for a map not read.
struct Taps {
  int32_t at[kMaps];
  float fx[kMaps], fy[kMaps];
};

// In fp32 places are computed in double, in fp16 in float: what is fed loses more there anyway.
template <typename Number>
__device__ Taps find_taps(const ColorNetParams<float>& net, int32_t image, int32_t gaussian) {
  using Place = std::conditional_t<sizeof(Number) == 2, float, double>;
  const NetView& view = net.views[image];
  const float* box = net.box_coord + 6 * int64_t(gaussian);
  Taps taps;
#pragma unroll
  for (int i = 0; i < kMaps; ++i) {
    Place x, y;
    bool seen = true;
    if (i == kMaps - 1) {
      seen = projected_place(net.color.viewmats + 16 * image, net.color.Ks + 9 * image,
                             net.color.means + 3 * int64_t(gaussian), box + 2 * i, &x, &y);
    } else {
      x = Place(box[2 * i]) / Place(net.coord_scale);
      y = Place(box[2 * i + 1]) / Place(net.coord_scale);
    }
    const MapTap<float> tap = map_tap<float>(x, y, view.width, view.height);
    taps.at[i] = seen ? (tap.y * view.width + tap.x) * kMapChannels + i * kMapFeatures : -1;
    taps.fx[i] = tap.fx;
    taps.fy[i] = tap.fy;
  }
  return taps;
}

// Four halves.
__device__ __forceinline__ void widen(const uint2& bits, float* out) {
  const float2 lo = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
  const float2 hi = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
  out[0] = lo.x, out[1] = lo.y, out[2] = hi.x, out[3] = hi.y;
}

__device__ __forceinline__ void load_four(const float* from, float* out) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(from));
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

// What is read once passes the L1 cache by: the weights are to stay there.
__device__ __forceinline__ uint2 load_once(const __half* from) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

__device__ __forceinline__ void load_four_once(const __half* from, float* out) { widen(load_once(from), out); }

__device__ __forceinline__ void load_four_once(const float* from, float* out) {
  asm("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
      : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
      : "l"(from));
}

// Four neighbouring features of one map, `part` of 4, times the view's weight. Nothing branches, so that
// the loads of all maps are under way at once.
template <typename Number>
__device__ __forceinline__ void sample_four(const NetView& view, int32_t at, float fx, float fy, int part,
                                            float* out) {
  const Number* corner = static_cast<const Number*>(view.map) + max(at, 0) + 4 * part;
  const int32_t right = view.width > 1 ? kMapChannels : 0;
  const int32_t down = view.height > 1 ? view.width * kMapChannels : 0;
  const float weight = float(view.weight);
  float v[4][4];
  load_four_once(corner, v[0]);
  load_four_once(corner + right, v[1]);
  load_four_once(corner + down, v[2]);
  load_four_once(corner + down + right, v[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sum = v[0][i] * ((1.f - fx) * (1.f - fy)) + v[1][i] * (fx * (1.f - fy)) +
                      v[2][i] * ((1.f - fx) * fy) + v[3][i] * (fx * fy);
    out[i] = at < 0 ? 0.f : weight * sum;
  }
}

// Four neighbouring numbers from column `column` on of an embedding or of a Gaussian's features, times
// the view's weight; 0 behind the last.
__device__ __forceinline__ void feature_four(const ColorNetParams<float>& net, int32_t image,
                                             int32_t gaussian, int column, float* out) {
  int64_t row = image;
  if (net.input == NetInput::kFeatures) {
    row = gaussian + (net.per_camera_features ? image * net.color.n_gaussians : 0);
  }
  const float* from = net.features + row * net.n_inputs + column;
  const float weight = float(net.views[image].weight);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = column + i < net.n_inputs ? weight * __ldg(from + i) : 0.f;
}

// Colour m from SH coefficients [K, 3].
__device__ __forceinline__ void write_sh(const ColorNetParams<float>& net, int64_t m, int32_t image,
                                         const Vec3<float>& toward, const float* coeffs, int stride) {
  float basis[sh_bases(4)];
  sh_basis(net.sh_degree, toward, basis);
  float rgb[3] = {0.f, 0.f, 0.f};
  const int n_bases = sh_bases(net.sh_degree);
#pragma unroll
  for (int k = 0; k < sh_bases(4); ++k) {
    if (k < n_bases) {
      for (int c = 0; c < 3; ++c) rgb[c] += basis[k] * coeffs[(3 * k + c) * stride];
    }
  }
  for (int c = 0; c < 3; ++c) rgb[c] = sh_to_color(rgb[c]);
  write_rgb(net.color, m, image, rgb);
}

__device__ __forceinline__ Vec3<float> from_center(const ColorNetParams<float>& net,
                                                   const Vec3<float>& center, int32_t gaussian) {
  const float* mean = net.color.means + 3 * int64_t(gaussian);
  return {mean[0] - center.x, mean[1] - center.y, mean[2] - center.z};
}

__device__ __forceinline__ bool is_drawn(const ColorParams<float>& p, int64_t m) {
  return p.records == nullptr || !is_dead(p.records[m]);
}

// Lets a kernel have as much shared memory as a block may on the current device. Always as much, since the
// setting is the kernel's and not a launch's: calls on other threads may be between this and their launch.
template <typename Kernel>
void allow_shared_memory(Kernel kernel) {
  int device = 0, room = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  cudaFuncAttributes own;
  check(cudaFuncGetAttributes(&own, kernel), "cudaFuncGetAttributes");
  const int dynamic = room - int(own.sharedSizeBytes);
  if (own.maxDynamicSharedSizeBytes != dynamic) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic), "cudaFuncSetAttribute");
  }
}

// As many blocks as fit the device at once, or fewer where there is less to do.
template <typename Kernel>
unsigned resident_blocks(Kernel kernel, size_t shared, int64_t capacity, int records_per_block) {
  int device = 0, processors = 0, blocks = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kNetThreads, shared),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int64_t wanted = (capacity + records_per_block - 1) / records_per_block;
  return unsigned(std::max<int64_t>(1, std::min<int64_t>(wanted, int64_t(processors) * std::max(blocks, 1))));
}

}  // namespace rapfast
