// Stage 2 by a colour network on the GPU, fp16: a warp takes 16 or 32 records through all layers on the
// tensor cores (mma.m16n8k16, fp32 sums), their activations in shared memory of its own. Four lanes share
// a row of a tile, and of each block of 16 columns lane t of them holds columns 4t .. 4t + 3, which the
// instruction counts as 2t, 2t + 1, 2t + 8 and 2t + 9. Weights come in that order from
// rapfast/appearance/fused.py; rows of maps and of the base are then read 8 bytes a lane, 32 bytes a row
// and block.
#include "color_net.cuh"

namespace rapfast {
namespace {

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

}  // namespace

void color_net_half_cuda(const ColorNetParams<float>& net, const DeviceView* views, const int32_t* image_ids,
                         cudaStream_t stream) {
  const int64_t n_images = net.color.n_scenes * net.color.n_cameras;
  if (fits_twice(lay_out_activations(net, 32))) {
    launch_half<2>(net, n_images, views, image_ids, stream);
  } else {
    launch_half<1>(net, n_images, views, image_ids, stream);
  }
}

}  // namespace rapfast
