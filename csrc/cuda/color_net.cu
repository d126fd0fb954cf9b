// Stage 2 by a colour network on the GPU.
//
// fp16: a warp takes 16 or 32 records through all layers on the tensor cores (mma.m16n8k16, fp32 sums).
// Their activations stay in registers. The sums of one layer lie in a warp's lanes just as the operands
// of the next layer want them, once the columns of each block of 16 are counted in this order: lane t of
// the four that share a row holds columns 4t .. 4t + 3. Weights come in that order from rapfast/ops;
// rows of maps and of the base are then read 8 bytes a lane, 32 bytes a row and block.
//
// fp32: a block of threads takes 32 or 64 records through all layers, activations in shared memory.
#include "../color_net.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "../math/sh.h"
#include "check.cuh"
#include "records.cuh"
#include "scratch.h"

namespace rapfast {
namespace {

constexpr int kNetThreads = 128;

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

// ------------------------------------------------------------------------------------------- fp16

__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// Of max(x, 0). NaN stays.
__device__ __forceinline__ uint32_t pack_relu(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four columns of row `row % 2` (of rows g and g + 8) into an operand.
__device__ __forceinline__ void put_four(uint32_t (&operand)[4], int row, uint32_t lo, uint32_t hi) {
  operand[row % 2] = lo;
  operand[2 + row % 2] = hi;
}

__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// sums += x times the next kUsed blocks of operands, all of which can be under way at once.
template <int kTiles, int kBlocks, int kUsed>
__device__ __forceinline__ void multiply_used(const uint4* operands, const uint32_t (&x)[kTiles][kBlocks][4],
                                              float (&sums)[kTiles][2][4]) {
#pragma unroll
  for (int k = 0; k < kUsed; ++k) {
    const uint4 w = __ldg(operands + 32 * k);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add(sums[tile][0], x[tile][k], w.x, w.y);
      multiply_add(sums[tile][1], x[tile][k], w.z, w.w);
    }
  }
}

// The same for a number of blocks known when it runs. A condition on each block would cost more moves
// between registers than there are multiplications.
template <int kTiles, int kBlocks>
__device__ __forceinline__ void multiply_blocks(int used, const uint4*& operands,
                                                const uint32_t (&x)[kTiles][kBlocks][4],
                                                float (&sums)[kTiles][2][4]) {
  const auto run = [&](auto count) {
    constexpr int kUsed = decltype(count)::value < kBlocks ? decltype(count)::value : kBlocks;
    multiply_used<kTiles, kBlocks, kUsed>(operands, x, sums);
  };
  switch (used) {
    case 1: run(std::integral_constant<int, 1>()); break;
    case 2: run(std::integral_constant<int, 2>()); break;
    case 3: run(std::integral_constant<int, 3>()); break;
    case 4: run(std::integral_constant<int, 4>()); break;
    case 5: run(std::integral_constant<int, 5>()); break;
    case 6: run(std::integral_constant<int, 6>()); break;
    case 7: run(std::integral_constant<int, 7>()); break;
    case 8: run(std::integral_constant<int, 8>()); break;
    default:
      if constexpr (kBlocks > 8) {
        multiply_used<kTiles, kBlocks, 8>(operands, x, sums);
#pragma unroll
        for (int k = 8; k < kBlocks; ++k) {
          if (k >= used) break;
          const uint4 w = __ldg(operands + 32 * k);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply_add(sums[tile][0], x[tile][k], w.x, w.y);
            multiply_add(sums[tile][1], x[tile][k], w.z, w.w);
          }
        }
      }
  }
  operands += 32 * used;
}

// kTiles: tiles of 16 records a warp. kBlocks: the widest layer, in blocks of 16. Loops over blocks are
// unrolled to kBlocks with a condition, since registers have no index.
template <int kTiles, int kBlocks, bool kWithSh>
__global__ void __launch_bounds__(kNetThreads)
    half_kernel(const __grid_constant__ ColorNetParams<float> net, int64_t n_images,
                const DeviceView* __restrict__ device_views, const int32_t* __restrict__ image_ids) {
  constexpr int kRecords = 16 * kTiles;  // of a warp
  constexpr int kLaneRows = 2 * kTiles;  // rows that a lane holds columns of
  constexpr int kShStride = 3 * sh_bases(4) + 2;
  __shared__ float coeffs[kWithSh ? kNetThreads / 32 * kRecords * kShStride : 1];

  const ColorParams<float>& p = net.color;
  const __half* base = static_cast<const __half*>(net.base);
  const uint4* weights = static_cast<const uint4*>(net.weights);
  const int lane = threadIdx.x % 32;
  const int t = lane % 4;
  const int64_t n = min(p.image_offsets[n_images], p.capacity);
  const int64_t n_warps = int64_t(gridDim.x) * (kNetThreads / 32);
  const int64_t warp = int64_t(blockIdx.x) * (kNetThreads / 32) + threadIdx.x / 32;

  // What the next tile reads is asked for while this one is worked on.
  const auto id_of = [&](int64_t first) { return p.gaussian_ids[min(first + lane % kRecords, n - 1)]; };
  int32_t next_gaussian = warp * kRecords < n ? id_of(warp * kRecords) : 0;
  for (int64_t first = warp * kRecords; first < n; first += n_warps * kRecords) {
    // One record a lane. Behind the end the last one again, whose results are not kept.
    const int64_t own = min(first + lane % kRecords, n - 1);
    const int32_t gaussian = next_gaussian;
    const int32_t image = image_ids[own];
    const bool is_followed = first + n_warps * kRecords < n;
    if (is_followed) next_gaussian = id_of(first + n_warps * kRecords);
    const Vec3<float> center = device_views[image].center;
    const Vec3<float> direction = view_direction(p.means + 3 * int64_t(gaussian), center);
    Taps taps = {};
    if (net.input == NetInput::kMaps) taps = find_taps<__half>(net, image, gaussian);

    // The lane's rows, g and g + 8 of each tile.
    uint32_t x[kTiles][kBlocks][4];
    uint32_t toward[kTiles][4];
    int32_t row_gaussian[kLaneRows];
#pragma unroll
    for (int row = 0; row < kLaneRows; ++row) {
      const int source = 8 * row + lane / 4;
      const int32_t g = __shfl_sync(kFullWarp, gaussian, source);
      const int32_t i = __shfl_sync(kFullWarp, image, source);
      row_gaussian[row] = g;
      const float dx = __shfl_sync(kFullWarp, direction.x, source);
      const float dy = __shfl_sync(kFullWarp, direction.y, source);
      const float dz = __shfl_sync(kFullWarp, direction.z, source);
      put_four(toward[row / 2], row, t == 0 ? pack(dx, dy) : 0, t == 0 ? pack(dz, 0.f) : 0);

      float v[4];
      if (net.input == NetInput::kMaps) {
        const NetView view = net.views[i];
#pragma unroll
        for (int map = 0; map < kMaps; ++map) {
          const int32_t at = __shfl_sync(kFullWarp, taps.at[map], source);
          const float fx = __shfl_sync(kFullWarp, taps.fx[map], source);
          const float fy = __shfl_sync(kFullWarp, taps.fy[map], source);
          sample_four<__half>(view, at, fx, fy, t, v);
          put_four(x[row / 2][map], row, pack(v[0], v[1]), pack(v[2], v[3]));
        }
      } else {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (b * kNetBlock < net.layers[0].n_in) {
            feature_four(net, i, g, b * kNetBlock + 4 * t, v);
            put_four(x[row / 2][b], row, pack(v[0], v[1]), pack(v[2], v[3]));
          }
        }
      }
    }

    if (is_followed) {
      prefetch(p.means + 3 * int64_t(next_gaussian));
      if (net.input == NetInput::kMaps) prefetch(net.box_coord + 6 * int64_t(next_gaussian));
      for (int64_t column = 0; column < net.base_stride; column += 64) {
        prefetch(base + next_gaussian * net.base_stride + column);
      }
    }

    // Operands come in the order in which they are used, through all layers.
    const uint4* operands = weights + lane;
    for (int l = 0; l < net.n_layers; ++l) {
      const NetLayer layer = net.layers[l];
      const bool is_last = l + 1 == net.n_layers;
      uint2 base_ahead[kLaneRows];
      const auto load_base = [&](int b) {
#pragma unroll
        for (int row = 0; row < kLaneRows; ++row) {
          base_ahead[row] =
              load_once(base + row_gaussian[row] * net.base_stride + layer.base + b * kNetBlock + 4 * t);
        }
      };
      if (layer.base >= 0) load_base(0);
      uint32_t y[kTiles][kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (b * kNetBlock >= layer.n_out) continue;
        float sums[kTiles][2][4];
        if (layer.base >= 0) {
#pragma unroll
          for (int row = 0; row < kLaneRows; ++row) {
            float v[4];
            widen(base_ahead[row], v);
            float(&s)[2][4] = sums[row / 2];
            s[0][2 * (row % 2)] = v[0], s[0][2 * (row % 2) + 1] = v[1];
            s[1][2 * (row % 2)] = v[2], s[1][2 * (row % 2) + 1] = v[3];
          }
          if ((b + 1) * kNetBlock < layer.n_out) load_base(b + 1);
        } else {
          float v[4];
          load_four(net.biases + layer.biases + b * kNetBlock + 4 * t, v);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            sums[tile][0][0] = sums[tile][0][2] = v[0], sums[tile][0][1] = sums[tile][0][3] = v[1];
            sums[tile][1][0] = sums[tile][1][2] = v[2], sums[tile][1][1] = sums[tile][1][3] = v[3];
          }
        }
        multiply_blocks<kTiles, kBlocks>(layer.n_in / kNetBlock, operands, x, sums);
        if (layer.takes_direction) {
          const uint4 w = __ldg(operands);
          operands += 32;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply_add(sums[tile][0], toward[tile], w.x, w.y);
            multiply_add(sums[tile][1], toward[tile], w.z, w.w);
          }
        }

        if (!is_last) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const float(&s)[2][4] = sums[tile];
            y[tile][b][0] = pack_relu(s[0][0], s[0][1]);
            y[tile][b][1] = pack_relu(s[0][2], s[0][3]);
            y[tile][b][2] = pack_relu(s[1][0], s[1][1]);
            y[tile][b][3] = pack_relu(s[1][2], s[1][3]);
          }
          continue;
        }
#pragma unroll
        for (int row = 0; row < kLaneRows; ++row) {
          const float(&s)[2][4] = sums[row / 2];
          const float v[4] = {s[0][2 * (row % 2)], s[0][2 * (row % 2) + 1], s[1][2 * (row % 2)],
                              s[1][2 * (row % 2) + 1]};
          const int record = 8 * row + lane / 4;
          const int64_t m = first + record;
          const int column = b * kNetBlock + 4 * t;
          if constexpr (kWithSh) {
            float* out = coeffs + (threadIdx.x / 32 * kRecords + record) * kShStride;
            for (int i = 0; i < 4; ++i) {
              if (column + i < net.n_outputs) out[column + i] = v[i];
            }
          } else if (net.output == NetOutput::kRaw) {
            for (int i = 0; i < 4; ++i) {
              if (m < n && column + i < net.n_outputs) p.record_colors[m * p.color_stride + column + i] = v[i];
            }
          } else if (column == 0 && m < n && is_drawn(p, m)) {
            write_rgb(p, m, image_ids[m], v);
          }
        }
      }
      if (is_last) break;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
          for (int r = 0; r < 4; ++r) x[tile][b][r] = y[tile][b][r];
        }
      }
    }

    if constexpr (kWithSh) {
      __syncwarp();
      if (lane < kRecords && first + lane < n && is_drawn(p, own)) {
        write_sh(net, own, image, from_center(net, center, gaussian),
                 coeffs + (threadIdx.x / 32 * kRecords + lane) * kShStride, 1);
      }
      __syncwarp();
    }
  }
}

// ------------------------------------------------------------------------------------------- fp32

// Columns of activations are [width, kRecords]. A thread takes kRecords / 32 neighbouring records and 8
// outputs at a time, so that a weight serves a whole warp and is read as a broadcast.
template <int kRecords>
__global__ void __launch_bounds__(kNetThreads)
    full_kernel(const __grid_constant__ ColorNetParams<float> net, int width, int64_t n_images,
                const DeviceView* __restrict__ device_views, const int32_t* __restrict__ image_ids) {
  constexpr int kLaneRecords = kRecords / 32;
  constexpr int kOutputs = 8;
  constexpr int kSharing = kNetThreads / kRecords;  // threads that fetch one record's inputs
  extern __shared__ float columns[];
  float* x = columns;
  float* y = x + width * kRecords;
  float* toward = y + width * kRecords;
  __shared__ int32_t gaussians[kRecords];

  const ColorParams<float>& p = net.color;
  const float* base = static_cast<const float*>(net.base);
  const float* weights = static_cast<const float*>(net.weights);
  const int record = threadIdx.x % kRecords, share = threadIdx.x / kRecords;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = min(p.image_offsets[n_images], p.capacity);

  for (int64_t first = int64_t(blockIdx.x) * kRecords; first < n; first += int64_t(gridDim.x) * kRecords) {
    // Behind the end the last record again, whose results are not kept.
    const int64_t own = min(first + record, n - 1);
    const int32_t gaussian = p.gaussian_ids[own];
    const int32_t image = image_ids[own];
    const Vec3<float> center = device_views[image].center;
    if (share == 0) {
      const Vec3<float> d = view_direction(p.means + 3 * int64_t(gaussian), center);
      toward[record] = d.x, toward[kRecords + record] = d.y, toward[2 * kRecords + record] = d.z;
      gaussians[record] = gaussian;
    }
    float v[4];
    if (net.input == NetInput::kMaps) {
      const Taps taps = find_taps<float>(net, image, gaussian);
      const NetView view = net.views[image];
#pragma unroll
      for (int map = 0; map < kMaps; ++map) {
        for (int part = share; part < 4; part += kSharing) {
          sample_four<float>(view, taps.at[map], taps.fx[map], taps.fy[map], part, v);
          for (int i = 0; i < 4; ++i) x[(map * kMapFeatures + 4 * part + i) * kRecords + record] = v[i];
        }
      }
    } else {
      for (int column = 4 * share; column < net.layers[0].n_in; column += 4 * kSharing) {
        feature_four(net, image, gaussian, column, v);
        for (int i = 0; i < 4; ++i) x[(column + i) * kRecords + record] = v[i];
      }
    }
    __syncthreads();

    for (int l = 0; l < net.n_layers; ++l) {
      const NetLayer layer = net.layers[l];
      for (int out = kOutputs * warp; out < layer.n_out; out += kOutputs * kNetThreads / 32) {
        float sums[kLaneRecords][kOutputs];
#pragma unroll
        for (int r = 0; r < kLaneRecords; ++r) {
          const float* b = layer.base >= 0
                               ? base + gaussians[kLaneRecords * lane + r] * net.base_stride + layer.base
                               : net.biases + layer.biases;
          load_four_once(b + out, sums[r]);
          load_four_once(b + out + 4, sums[r] + 4);
        }
        const float* row = weights + layer.weights + out;
        const auto add = [&](const float* column) {
          float w[kOutputs];
          load_four(row, w);
          load_four(row + 4, w + 4);
          row += layer.n_out;
#pragma unroll
          for (int r = 0; r < kLaneRecords; ++r) {
            const float value = column[kLaneRecords * lane + r];
#pragma unroll
            for (int i = 0; i < kOutputs; ++i) sums[r][i] = fmaf(value, w[i], sums[r][i]);
          }
        };
#pragma unroll 4
        for (int k = 0; k < layer.n_in; ++k) add(x + k * kRecords);
        if (layer.takes_direction) {
          for (int k = 0; k < 3; ++k) add(toward + k * kRecords);
        }
        const bool with_relu = l + 1 < net.n_layers;
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
          for (int r = 0; r < kLaneRecords; ++r) {
            const float sum = sums[r][i];
            y[(out + i) * kRecords + kLaneRecords * lane + r] = with_relu && sum < 0.f ? 0.f : sum;
          }
        }
      }
      __syncthreads();
      float* const done = y;
      y = x;
      x = done;
    }

    if (net.output == NetOutput::kRaw) {
      for (int column = share; column < net.n_outputs; column += kSharing) {
        if (first + record < n) p.record_colors[own * p.color_stride + column] = x[column * kRecords + record];
      }
    } else if (share == 0 && first + record < n && is_drawn(p, own)) {
      if (net.output == NetOutput::kSh) {
        write_sh(net, own, image, from_center(net, center, gaussian), x + record, kRecords);
      } else {
        const float rgb[3] = {x[record], x[kRecords + record], x[2 * kRecords + record]};
        write_rgb(p, own, image, rgb);
      }
    }
    __syncthreads();
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

template <int kTiles, int kBlocks, bool kWithSh>
void launch_half(const ColorNetParams<float>& net, int64_t n_images, const DeviceView* views,
                 const int32_t* image_ids, cudaStream_t stream) {
  const auto kernel = half_kernel<kTiles, kBlocks, kWithSh>;
  const unsigned grid = resident_blocks(kernel, 0, net.color.capacity, 16 * kTiles * kNetThreads / 32);
  kernel<<<grid, kNetThreads, 0, stream>>>(net, n_images, views, image_ids);
}

template <int kRecords>
void launch_full(const ColorNetParams<float>& net, int width, int64_t n_images, const DeviceView* views,
                 const int32_t* image_ids, cudaStream_t stream) {
  const auto kernel = full_kernel<kRecords>;
  const size_t shared = sizeof(float) * kRecords * (2 * size_t(width) + 3);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
        "cudaFuncSetAttribute");
  const unsigned grid = resident_blocks(kernel, shared, net.color.capacity, kRecords);
  kernel<<<grid, kNetThreads, shared, stream>>>(net, width, n_images, views, image_ids);
}

}  // namespace

void color_net_cuda(const ColorNetParams<float>& net, const DeviceView* views, const int32_t* image_ids,
                    cudaStream_t stream) {
  const int64_t n_images = net.color.n_scenes * net.color.n_cameras;
  if (net.color.capacity == 0 || n_images == 0) return;
  int width = 0;
  for (int l = 0; l < net.n_layers; ++l) {
    width = std::max({width, net.layers[l].n_in, net.layers[l].n_out});
  }
  const bool narrow = width <= kMaxNetWidth / 2;
  const bool with_sh = net.output == NetOutput::kSh;
  if (net.half && narrow && with_sh) {
    launch_half<2, 8, true>(net, n_images, views, image_ids, stream);
  } else if (net.half && narrow) {
    launch_half<2, 8, false>(net, n_images, views, image_ids, stream);
  } else if (net.half && with_sh) {
    launch_half<1, 16, true>(net, n_images, views, image_ids, stream);
  } else if (net.half) {
    launch_half<1, 16, false>(net, n_images, views, image_ids, stream);
  } else if (narrow) {
    launch_full<64>(net, width, n_images, views, image_ids, stream);
  } else {
    launch_full<32>(net, width, n_images, views, image_ids, stream);
  }
  check_launch("color net kernel");
}

}  // namespace rapfast
