// Stage 2 by a colour network on the GPU.
//
// fp16: a warp takes 16 or 32 records through all layers on the tensor cores (mma.m16n8k16, fp32 sums),
// their activations in shared memory of its own. Four lanes share a row of a tile, and of each block of
// 16 columns lane t of them holds columns 4t .. 4t + 3, which the instruction counts as 2t, 2t + 1, 2t + 8
// and 2t + 9. Weights come in that order from rapfast/appearance/fused.py; rows of maps and of the base
// are then read 8 bytes a lane, 32 bytes a row and block.
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

// An operand of 16 rows and 16 columns in shared memory. `from` is row lane % 16, column 8 (lane / 16).
__device__ __forceinline__ void load_operand(const __half* from, uint32_t (&a)[4]) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

// A lane's four columns of one block and row.
__device__ __forceinline__ void put_four(__half* row, int t, uint32_t lo, uint32_t hi) {
  *reinterpret_cast<uint32_t*>(row + 2 * t) = lo;
  *reinterpret_cast<uint32_t*>(row + 2 * t + 8) = hi;
}

__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Activations of a warp: two buffers, the inputs of even layers and those of odd ones. Rows begin 16
// bytes further on than a multiple of 32 bytes, which spreads 8 rows over all banks.
struct Activations {
  int32_t strides[2];  // of a row, halves
  int32_t size;        // of a warp, halves

  size_t block_bytes() const { return sizeof(__half) * size_t(size) * (kNetThreads / 32); }
};

Activations lay_out_activations(const ColorNetParams<float>& net, int rows) {
  int widths[2] = {0, 0};
  for (int l = 0; l < net.n_layers; ++l) {
    const NetLayer& layer = net.layers[l];
    widths[l % 2] = std::max(widths[l % 2], layer.n_in + (layer.takes_direction ? kNetBlock : 0));
  }
  // Spherical harmonics leave the last layer in fp32, in the buffer that its inputs are not in.
  int& last = widths[net.n_layers % 2];
  if (net.output == NetOutput::kSh) last = std::max(last, 2 * net.layers[net.n_layers - 1].n_out);
  Activations a;
  for (int i = 0; i < 2; ++i) a.strides[i] = widths[i] + 8;
  a.size = rows * (a.strides[0] + a.strides[1]);
  return a;
}

// Sums of kPair neighbouring blocks of 16 outputs, for the lane's rows.
template <int kTiles, int kPair>
__device__ __forceinline__ void layer_sums(const ColorNetParams<float>& net, const NetLayer& layer, int block,
                                           const __half* x, int stride, int lane,
                                           const __half* const (&row_base)[2 * kTiles],
                                           float (&sums)[kTiles][2][2][4]) {
  const int n_blocks_in = layer.n_in / kNetBlock + (layer.takes_direction ? 1 : 0);
  // Base and biases are added last: until then they are on their way.
  const bool with_base = layer.base >= 0;
  uint2 base[kPair][2 * kTiles];
  float4 biases[kPair];
#pragma unroll
  for (int i = 0; i < kPair; ++i) {
    const int column = (block + i) * kNetBlock;
    if (with_base) {
#pragma unroll
      for (int row = 0; row < 2 * kTiles; ++row) base[i][row] = load_once(row_base[row] + layer.base + column);
    } else {
      biases[i] = __ldg(reinterpret_cast<const float4*>(net.biases + layer.biases + column) + lane % 4);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int j = 0; j < 4; ++j) sums[tile][i][0][j] = sums[tile][i][1][j] = 0.f;
    }
  }

  // Loaded kAhead products early; behind the last one, it comes again and is not used.
  constexpr int kAhead = 2;
  const uint4* operands[kPair];
  uint4 w[kPair][kAhead];
#pragma unroll
  for (int i = 0; i < kPair; ++i) {
    operands[i] = static_cast<const uint4*>(net.weights) + layer.weights / 8 + (block + i) * n_blocks_in * 32 + lane;
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (ahead > 0 && ahead < n_blocks_in) operands[i] += 32;
      w[i][ahead] = __ldg(operands[i]);
    }
  }
  const __half* columns = x + lane % 16 * stride + 8 * (lane / 16);
#pragma unroll 2
  for (int k = 0; k < n_blocks_in; ++k) {
    uint4 next[kPair];
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      operands[i] += k + kAhead < n_blocks_in ? 32 : 0;
      next[i] = __ldg(operands[i]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t a[4];
      load_operand(columns + tile * 16 * stride, a);
#pragma unroll
      for (int i = 0; i < kPair; ++i) {
        multiply_add(sums[tile][i][0], a, w[i][0].x, w[i][0].y);
        multiply_add(sums[tile][i][1], a, w[i][0].z, w[i][0].w);
      }
    }
    columns += kNetBlock;
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
#pragma unroll
      for (int ahead = 1; ahead < kAhead; ++ahead) w[i][ahead - 1] = w[i][ahead];
      w[i][kAhead - 1] = next[i];
    }
  }

#pragma unroll
  for (int i = 0; i < kPair; ++i) {
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
      float v[4];
      if (with_base) {
        widen(base[i][row], v);
      } else {
        v[0] = biases[i].x, v[1] = biases[i].y, v[2] = biases[i].z, v[3] = biases[i].w;
      }
      float(&s)[2][4] = sums[row / 2][i];
      s[0][2 * (row % 2)] += v[0], s[0][2 * (row % 2) + 1] += v[1];
      s[1][2 * (row % 2)] += v[2], s[1][2 * (row % 2) + 1] += v[3];
    }
  }
}

// kTiles: tiles of 16 records that a warp takes at a time.
template <int kTiles>
__global__ void __launch_bounds__(kNetThreads, kTiles == 2 ? 2 : 4)
    half_kernel(const __grid_constant__ ColorNetParams<float> net, Activations activations, int64_t n_images,
                const DeviceView* __restrict__ device_views, const int32_t* __restrict__ image_ids) {
  constexpr int kRecords = 16 * kTiles;
  constexpr int kLaneRows = 2 * kTiles;  // a lane's: lane / 4 and 8 further on, of each tile
  extern __shared__ __align__(16) unsigned char shared[];

  const ColorParams<float>& p = net.color;
  const __half* base = static_cast<const __half*>(net.base);
  const int lane = threadIdx.x % 32;
  const int t = lane % 4;
  const int64_t n = min(p.image_offsets[n_images], p.capacity);
  const int64_t n_warps = int64_t(gridDim.x) * (kNetThreads / 32);
  const int64_t warp = int64_t(blockIdx.x) * (kNetThreads / 32) + threadIdx.x / 32;
  __half* const buffers = reinterpret_cast<__half*>(shared) + threadIdx.x / 32 * activations.size;

  // What the next tile reads is asked for while this one is worked on.
  const auto id_of = [&](int64_t first) { return p.gaussian_ids[min(first + lane % kRecords, n - 1)]; };
  int32_t next_gaussian = warp * kRecords < n ? id_of(warp * kRecords) : 0;
  for (int64_t first = warp * kRecords; first < n; first += n_warps * kRecords) {
    // One record a lane. Behind the end the last one again, whose results are not kept.
    const int64_t own = min(first + lane % kRecords, n - 1);
    const int32_t gaussian = next_gaussian;
    const int32_t image = image_ids[own];
    const uint32_t drawn = __ballot_sync(kFullWarp, first + lane % kRecords < n && is_drawn(p, own));
    const bool is_followed = first + n_warps * kRecords < n;
    if (is_followed) next_gaussian = id_of(first + n_warps * kRecords);
    const Vec3<float> center = device_views[image].center;
    const Vec3<float> direction = view_direction(p.means + 3 * int64_t(gaussian), center);
    Taps taps = {};
    if (net.input == NetInput::kMaps) taps = find_taps<__half>(net, image, gaussian);

    __half* x = buffers;
    int stride = activations.strides[0];
    const __half* row_base[kLaneRows];
#pragma unroll
    for (int row = 0; row < kLaneRows; ++row) {
      row_base[row] = base + __shfl_sync(kFullWarp, gaussian, 8 * row + lane / 4) * net.base_stride + 4 * t;
    }
#pragma unroll 1
    for (int row = 0; row < kLaneRows; ++row) {
      const int record = 8 * row + lane / 4;
      const int32_t g = __shfl_sync(kFullWarp, gaussian, record);
      const int32_t i = __shfl_sync(kFullWarp, image, record);
      float v[4];
      if (net.input == NetInput::kMaps) {
        const NetView view = net.views[i];
#pragma unroll
        for (int map = 0; map < kMaps; ++map) {
          const int32_t at = __shfl_sync(kFullWarp, taps.at[map], record);
          const float fx = __shfl_sync(kFullWarp, taps.fx[map], record);
          const float fy = __shfl_sync(kFullWarp, taps.fy[map], record);
          sample_four<__half>(view, at, fx, fy, t, v);
          put_four(x + record * stride + map * kNetBlock, t, pack(v[0], v[1]), pack(v[2], v[3]));
        }
      } else {
        for (int column = 0; column < net.layers[0].n_in; column += kNetBlock) {
          feature_four(net, i, g, column + 4 * t, v);
          put_four(x + record * stride + column, t, pack(v[0], v[1]), pack(v[2], v[3]));
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

    for (int l = 0; l < net.n_layers; ++l) {
      const NetLayer layer = net.layers[l];
      const bool is_last = l + 1 == net.n_layers;
      __half* const y = buffers + (l % 2 == 0 ? kRecords * activations.strides[0] : 0);
      const int stride_out = activations.strides[(l + 1) % 2];
      if (layer.takes_direction && lane < kRecords) {
        uint4* const columns = reinterpret_cast<uint4*>(x + lane * stride + layer.n_in);
        columns[0] = make_uint4(pack(direction.x, direction.y), 0, 0, 0);
        columns[1] = make_uint4(pack(direction.z, 0.f), 0, 0, 0);
      }
      __syncwarp();
      const int n_blocks = layer.n_out / kNetBlock;
      for (int block = 0; block < n_blocks; block += 2) {
        float sums[kTiles][2][2][4];
        const bool is_pair = block + 1 < n_blocks;
        if (is_pair) {
          layer_sums<kTiles, 2>(net, layer, block, x, stride, lane, row_base, sums);
        } else {
          layer_sums<kTiles, 1>(net, layer, block, x, stride, lane, row_base, sums);
        }
        if (!is_last) {
          __half* const out = y + lane / 4 * stride_out + block * kNetBlock;
#pragma unroll
          for (int row = 0; row < kLaneRows; ++row) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float(&s)[2][4] = sums[row / 2][i];
              const int r = 2 * (row % 2);
              if (i == 0 || is_pair) {
                put_four(out + 8 * row * stride_out + i * kNetBlock, t, pack_relu(s[0][r], s[0][r + 1]),
                         pack_relu(s[1][r], s[1][r + 1]));
              }
            }
          }
          continue;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (i == 1 && !is_pair) break;
          const int column = (block + i) * kNetBlock + 4 * t;
#pragma unroll
          for (int row = 0; row < kLaneRows; ++row) {
            const float(&s)[2][4] = sums[row / 2][i];
            const float v[4] = {s[0][2 * (row % 2)], s[0][2 * (row % 2) + 1], s[1][2 * (row % 2)],
                                s[1][2 * (row % 2) + 1]};
            const int record = 8 * row + lane / 4;
            const int64_t m = first + record;
            if (net.output == NetOutput::kSh) {
              float* const out = reinterpret_cast<float*>(y + record * stride_out) + column;
              for (int j = 0; j < 4; ++j) out[j] = v[j];
            } else if (net.output == NetOutput::kRaw) {
              for (int j = 0; j < 4; ++j) {
                if (m < n && column + j < net.n_outputs) p.record_colors[m * p.color_stride + column + j] = v[j];
              }
            } else {
              const int32_t of_image = __shfl_sync(kFullWarp, image, record);
              if (column == 0 && (drawn >> record & 1)) write_rgb(p, m, of_image, v);
            }
          }
        }
      }
      x = y;
      stride = stride_out;
    }

    __syncwarp();
    if (net.output == NetOutput::kSh && lane < kRecords && (drawn >> lane & 1)) {
      write_sh(net, own, image, from_center(net, center, gaussian),
               reinterpret_cast<const float*>(x + lane * stride), 1);
    }
    __syncwarp();
  }
}

// ------------------------------------------------------------------------------------------- fp32

// Columns of activations are [width, kRecords]. A thread takes kRecords / 32 neighbouring records and 16
// outputs at a time, so that a weight serves a whole warp and is read as a broadcast.
template <int kRecords>
__global__ void __launch_bounds__(kNetThreads, 3)
    full_kernel(const __grid_constant__ ColorNetParams<float> net, int width, int64_t n_images,
                const DeviceView* __restrict__ device_views, const int32_t* __restrict__ image_ids) {
  constexpr int kLaneRecords = kRecords / 32;
  constexpr int kOutputs = kNetBlock;
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
#pragma unroll
          for (int i = 0; i < kOutputs; i += 4) load_four_once(b + out + i, sums[r] + i);
        }
        const float* row = weights + layer.weights + out;
        const auto add = [&](const float* column) {
          float w[kOutputs];
#pragma unroll
          for (int i = 0; i < kOutputs; i += 4) load_four(row + i, w + i);
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

template <int kTiles>
void launch_half(const ColorNetParams<float>& net, int64_t n_images, const DeviceView* views,
                 const int32_t* image_ids, cudaStream_t stream) {
  const auto kernel = half_kernel<kTiles>;
  const Activations activations = lay_out_activations(net, 16 * kTiles);
  const size_t shared = activations.block_bytes();
  allow_shared_memory(kernel);
  const unsigned grid = resident_blocks(kernel, shared, net.color.capacity, 16 * kTiles * kNetThreads / 32);
  kernel<<<grid, kNetThreads, shared, stream>>>(net, activations, n_images, views, image_ids);
}

// Whether two blocks' activations fit a multiprocessor at a time.
bool fits_twice(const Activations& activations) {
  int device = 0, room = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "cudaDeviceGetAttribute");
  return 2 * (activations.block_bytes() + 1024) <= size_t(room);
}

template <int kRecords>
void launch_full(const ColorNetParams<float>& net, int width, int64_t n_images, const DeviceView* views,
                 const int32_t* image_ids, cudaStream_t stream) {
  const auto kernel = full_kernel<kRecords>;
  const size_t shared = sizeof(float) * kRecords * (2 * size_t(width) + 3);
  allow_shared_memory(kernel);
  const unsigned grid = resident_blocks(kernel, shared, net.color.capacity, kRecords);
  kernel<<<grid, kNetThreads, shared, stream>>>(net, width, n_images, views, image_ids);
}

}  // namespace

void color_net_cuda(const ColorNetParams<float>& net, const DeviceView* views, const int32_t* image_ids,
                    cudaStream_t stream) {
  const int64_t n_images = net.color.n_scenes * net.color.n_cameras;
  if (net.color.capacity == 0 || n_images == 0) return;
  if (net.half) {
    if (fits_twice(lay_out_activations(net, 32))) {
      launch_half<2>(net, n_images, views, image_ids, stream);
    } else {
      launch_half<1>(net, n_images, views, image_ids, stream);
    }
  } else {
    int width = 0;
    for (int l = 0; l < net.n_layers; ++l) {
      width = std::max({width, net.layers[l].n_in, net.layers[l].n_out});
    }
    if (width <= kMaxNetWidth / 2) {
      launch_full<64>(net, width, n_images, views, image_ids, stream);
    } else {
      launch_full<32>(net, width, n_images, views, image_ids, stream);
    }
  }
  check_launch("color net kernel");
}

}  // namespace rapfast
