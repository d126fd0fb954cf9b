// Norms, ReLUs, shortcuts, the pool and the rearrangement after transposed convolutions of RAP's
// feature-map network. Every kernel is a pass over memory: a thread moves 8 channels (16
// bytes) of a pixel at a time and does as much with them as can be done before they leave registers.
//
// An image's bits depend on its size alone: images are one dimension of the grid. No block waits for
// another, so several of these kernels may share the GPU.
#include "../feature_norm.h"

#include <cuda_fp16.h>

#include "check.cuh"

namespace rapfast {
namespace {

constexpr int kWidth = 8;           // channels of a thread
constexpr int kStatsThreads = 512;
constexpr int kMergeDepth = 8;      // partial results that a thread of the merging block takes

struct Values {
  float v[kWidth];
};

// Of what no kernel here writes: such loads may be issued ahead of stores.
__device__ __forceinline__ Values load(const __half* address) {
  const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(address));
  const __half2* pairs = reinterpret_cast<const __half2*>(&bytes);
  Values out;
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    const float2 f = __half22float2(pairs[i]);
    out.v[2 * i] = f.x;
    out.v[2 * i + 1] = f.y;
  }
  return out;
}

__device__ __forceinline__ void store(__half* address, const Values& values) {
  uint4 bytes;
  __half2* pairs = reinterpret_cast<__half2*>(&bytes);
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    pairs[i] = __floats2half2_rn(values.v[2 * i], values.v[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(address) = bytes;
}

// max(v, 0) that lets NaN through, as torch's ReLU does
__device__ __forceinline__ float relu(float v) { return v < 0.f ? 0.f : v; }

// The norm of a thread's channels. Not v * scale + (bias - mean * scale), which cancels where the
// mean is large beside the deviation.
struct Norm {
  Values mean, scale, bias;

  __device__ Norm(const float* norm, int channels, int c) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      mean.v[i] = norm[c + i];
      scale.v[i] = norm[channels + c + i];
      bias.v[i] = norm[2 * channels + c + i];
    }
  }
  __device__ __forceinline__ float operator()(float v, int i) const {
    return (v - mean.v[i]) * scale.v[i] + bias.v[i];
  }
};

// ------------------------------------------------------------------------------------------- stats

// Pixels of each block but the last, whose share is what is left: never nothing.
struct Chunks {
  int64_t pixels;
  unsigned count;
};

template <int C>
Chunks chunks_of(int64_t n_pixels) {
  constexpr int rows = kStatsThreads * kWidth / C;
  constexpr int most = kStatsThreads / (C / 2) * kMergeDepth;
  const int64_t wanted = (n_pixels + 3 * rows - 1) / (3 * rows);
  const int64_t blocks = wanted < most ? wanted : most;
  const int64_t pixels = (n_pixels + blocks - 1) / blocks;
  return {pixels, unsigned((n_pixels + pixels - 1) / pixels)};
}

// A thread sums x - k and (x - k)^2 over its pixels, k being its first pixel. Since that pixel is one of
// those summed, what cancels in the thread's variance is at most its number of pixels times the rounding
// of a float. From there on means are merged first, and squares are about the merged mean. The block that
// finishes last merges all blocks, in an order that does not depend on which one it is.
template <int C, bool kCopies>
__global__ void __launch_bounds__(kStatsThreads) map_stats_kernel(MapStatsParams p, int64_t chunk) {
  constexpr int lanes = C / kWidth, rows = kStatsThreads / lanes;
  constexpr int groups = lanes < 32 ? kStatsThreads / 32 : rows;
  __shared__ float sums[groups][C], totals[C];
  const int c = threadIdx.x % lanes * kWidth, row = threadIdx.x / lanes;
  const int64_t begin = blockIdx.x * chunk;
  const int64_t end = p.n_pixels < begin + chunk ? p.n_pixels : begin + chunk;
  const int64_t first_pixel = blockIdx.y * p.n_pixels;
  const __half* x = static_cast<const __half*>(p.x) + first_pixel * C;
  __half* copy = kCopies ? static_cast<__half*>(p.copy) + first_pixel * p.copy_pitch : nullptr;
  char* scratch = static_cast<char*>(p.scratch) + blockIdx.y * kMapStatsScratch;
  float* norm = p.norm + int64_t(blockIdx.y) * 3 * C;

  // The block's sum of a value of each thread, channel by channel; the threads of a channel are `rows`.
  auto over_rows = [&](Values v) {
#pragma unroll
    for (int offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v.v[j] += __shfl_xor_sync(kFullWarp, v.v[j], offset);
    }
    __syncthreads();
    if (lanes >= 32 || threadIdx.x % 32 < lanes) {
      const int group = lanes < 32 ? threadIdx.x / 32 : row;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[group][c + j] = v.v[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < C; i += kStatsThreads) {
      float total = 0.f;
#pragma unroll
      for (int g = 0; g < groups; ++g) total += sums[g][i];
      totals[i] = total;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v.v[j] = totals[c + j];
    return v;
  };

  const Values k = load(x + (begin + row < end ? begin + row : begin) * C + c);
  Values s = {}, q = {};
#pragma unroll 4
  for (int64_t i = begin + row; i < end; i += rows) {
    const Values v = load(x + i * C + c);
    if (kCopies) store(copy + i * p.copy_pitch + c, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float d = v.v[j] - k.v[j];
      s.v[j] += d;
      q.v[j] += d * d;
    }
  }
  // From here on s is the thread's mean, less the block's first pixel, and q the squares about it.
  const float n = float(end - begin);
  const float own_n = begin + row < end ? float((end - begin - row + rows - 1) / rows) : 0.f;
  const Values first = load(x + begin * C + c);
  Values weighted = {};
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float offset = own_n > 0.f ? s.v[j] / own_n : 0.f;
    q.v[j] -= s.v[j] * offset;
    s.v[j] = k.v[j] - first.v[j] + offset;
    weighted.v[j] = own_n * s.v[j];
  }
  Values block_mean = over_rows(weighted);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    block_mean.v[j] /= n;
    const float d = s.v[j] - block_mean.v[j];
    q.v[j] += own_n * d * d;
  }
  const Values squares = over_rows(q);

  unsigned* ticket = reinterpret_cast<unsigned*>(scratch);
  float2* partials = reinterpret_cast<float2*>(scratch + 16);  // mean, squares about it
  if (row == 0) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      partials[int64_t(blockIdx.x) * C + c + j] = make_float2(first.v[j] + block_mean.v[j], squares.v[j]);
    }
  }
  __threadfence();
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();

  constexpr int pairs = C / 2, parts = kStatsThreads / pairs;
  const int pair = threadIdx.x % pairs, part = threadIdx.x / pairs;
  float4 own[kMergeDepth];
  float weights[kMergeDepth];
  float2 mean = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < kMergeDepth; ++i) {
    const unsigned b = part + i * parts;
    own[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    weights[i] = 0.f;
    if (b < gridDim.x) {
      own[i] = __ldcg(reinterpret_cast<const float4*>(partials + int64_t(b) * C) + pair);
      weights[i] = float(b + 1 < gridDim.x ? chunk : p.n_pixels - b * chunk);
    }
  }
#pragma unroll
  for (int i = 0; i < kMergeDepth; ++i) {
    mean.x += weights[i] * own[i].x;
    mean.y += weights[i] * own[i].z;
  }
  // parts * C numbers, in the memory of the sums, which nobody reads any more
  static_assert(parts <= groups, "the sums' memory holds them");
  float(*merged)[C] = sums;
  auto over_parts = [&](float2 v) {
    __syncthreads();
    merged[part][2 * pair] = v.x;
    merged[part][2 * pair + 1] = v.y;
    __syncthreads();
    float2 total = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < parts; ++i) {
      total.x += merged[i][2 * pair];
      total.y += merged[i][2 * pair + 1];
    }
    return total;
  };
  const float all = float(p.n_pixels);
  mean = over_parts(mean);
  mean = {mean.x / all, mean.y / all};
  float2 var = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < kMergeDepth; ++i) {
    const float dx = own[i].x - mean.x, dy = own[i].z - mean.y;
    if (weights[i] > 0.f) {
      var.x += own[i].y + weights[i] * dx * dx;
      var.y += own[i].w + weights[i] * dy * dy;
    }
  }
  var = over_parts(var);
  if (part == 0) {
    const int i = 2 * pair;
    norm[i] = mean.x;
    norm[i + 1] = mean.y;
    norm[C + i] = p.weight[i] / sqrtf(var.x / all + p.eps);
    norm[C + i + 1] = p.weight[i + 1] / sqrtf(var.y / all + p.eps);
    norm[2 * C + i] = p.bias[i];
    norm[2 * C + i + 1] = p.bias[i + 1];
  }
}

// -------------------------------------------------------------------------------------------- norm

enum class Residual { kNone, kPlain, kNormed };

template <int C, Residual kind>
__global__ void __launch_bounds__(kThreads) map_norm_kernel(MapNormParams p) {
  constexpr int lanes = C / kWidth, rows = kThreads / lanes;
  const int c = threadIdx.x % lanes * kWidth;
  const int64_t first_pixel = blockIdx.y * p.n_pixels;
  const __half* x = static_cast<const __half*>(p.x) + first_pixel * C;
  const __half* residual =
      kind == Residual::kNone ? nullptr : static_cast<const __half*>(p.residual) + first_pixel * C;
  __half* y = static_cast<__half*>(p.y) + first_pixel * C;
  __half* copy = p.copy == nullptr ? nullptr : static_cast<__half*>(p.copy) + first_pixel * p.copy_pitch;
  const int64_t first_norm = int64_t(blockIdx.y) * 3 * C;
  const Norm norm(p.norm + first_norm, C, c);
  const Norm residual_norm((kind == Residual::kNormed ? p.residual_norm : p.norm) + first_norm, C, c);
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.x) * rows + threadIdx.x / lanes; i < p.n_pixels;
       i += int64_t(gridDim.x) * rows) {
    Values v = load(x + i * C + c);
    Values r = {};
    if (kind != Residual::kNone) r = load(residual + i * C + c);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      v.v[j] = norm(v.v[j], j);
      if (kind == Residual::kPlain) v.v[j] += r.v[j];
      if (kind == Residual::kNormed) v.v[j] += residual_norm(r.v[j], j);
      v.v[j] = relu(v.v[j]);
    }
    store(y + i * C + c, v);
    if (copy != nullptr) store(copy + i * p.copy_pitch + c, v);
  }
}

// -------------------------------------------------------------------------------- pool and unfold

// A block row of the grid is a row of the output, a layer an image.
template <int C>
__global__ void __launch_bounds__(kThreads) map_pool_kernel(MapPoolParams p) {
  constexpr int lanes = C / kWidth, columns = kThreads / lanes;
  const int out_width = (p.width + 1) / 2, out_height = (p.height + 1) / 2;
  const int64_t image = blockIdx.z;
  const int row = blockIdx.y, column = blockIdx.x * columns + threadIdx.x / lanes;
  if (column >= out_width) return;
  const int c = threadIdx.x % lanes * kWidth;
  const __half* x = static_cast<const __half*>(p.x) + image * p.height * p.width * C;
  const Norm norm(p.norm + image * 3 * C, C, c);
  Values best = {};  // what ReLU leaves is at least 0
#pragma unroll
  for (int dy = -1; dy <= 1; ++dy) {
#pragma unroll
    for (int dx = -1; dx <= 1; ++dx) {
      const int yy = 2 * row + dy, xx = 2 * column + dx;
      if (yy < 0 || yy >= p.height || xx < 0 || xx >= p.width) continue;
      const Values v = load(x + (int64_t(yy) * p.width + xx) * C + c);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float normed = norm(v.v[j], j);
        if (normed > best.v[j] || isnan(normed)) best.v[j] = normed;
      }
    }
  }
  store(static_cast<__half*>(p.y) + ((image * out_height + row) * out_width + column) * C + c, best);
}

__global__ void __launch_bounds__(kThreads) map_unfold_kernel(MapUnfoldParams p) {
  const int lanes = p.channels / kWidth;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const int row = blockIdx.y, column = i / lanes;
  if (column >= p.width) return;
  const int c = (i - column * lanes) * kWidth;
  const int part = row % p.factor * p.factor + column % p.factor;
  const int64_t image = blockIdx.z;
  const int64_t pixel = (image * p.in_height + row / p.factor) * p.in_width + column / p.factor;
  const __half* x = static_cast<const __half*>(p.x);
  Values v = load(x + (pixel * p.factor * p.factor + part) * p.channels + c);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) v.v[j] += p.bias[c + j];
  store(static_cast<__half*>(p.y) + ((image * p.height + row) * p.width + column) * p.pitch + c, v);
}

// ---------------------------------------------------------------------------------------- launches

template <template <int> class Launch, typename Params>
void for_channels(const Params& p, cudaStream_t stream) {
  switch (p.channels) {
    case 64: return Launch<64>::run(p, stream);
    case 128: return Launch<128>::run(p, stream);
    case 256: return Launch<256>::run(p, stream);
    case 512: return Launch<512>::run(p, stream);
    default: throw std::invalid_argument("rapfast: a feature map's norm takes 64, 128, 256 or 512 channels");
  }
}

template <int C>
struct Stats {
  static void run(const MapStatsParams& p, cudaStream_t stream) {
    const Chunks chunks = chunks_of<C>(p.n_pixels);
    const dim3 grid(chunks.count, unsigned(p.n_images));
    if (p.copy == nullptr) {
      map_stats_kernel<C, false><<<grid, kStatsThreads, 0, stream>>>(p, chunks.pixels);
    } else {
      map_stats_kernel<C, true><<<grid, kStatsThreads, 0, stream>>>(p, chunks.pixels);
    }
  }
};

template <int C>
struct Apply {
  static void run(const MapNormParams& p, cudaStream_t stream) {
    constexpr int rows = kThreads * kWidth / C;
    const int64_t wanted = (p.n_pixels + 4 * rows - 1) / (4 * rows);
    const dim3 blocks(unsigned(wanted < kMaxBlocks ? wanted : kMaxBlocks), unsigned(p.n_images));
    if (p.residual == nullptr) {
      map_norm_kernel<C, Residual::kNone><<<blocks, kThreads, 0, stream>>>(p);
    } else if (p.residual_norm == nullptr) {
      map_norm_kernel<C, Residual::kPlain><<<blocks, kThreads, 0, stream>>>(p);
    } else {
      map_norm_kernel<C, Residual::kNormed><<<blocks, kThreads, 0, stream>>>(p);
    }
  }
};

template <int C>
struct Pool {
  static void run(const MapPoolParams& p, cudaStream_t stream) {
    constexpr int columns = kThreads * kWidth / C;
    const dim3 grid(((p.width + 1) / 2 + columns - 1) / columns, (p.height + 1) / 2, unsigned(p.n_images));
    map_pool_kernel<C><<<grid, kThreads, 0, stream>>>(p);
  }
};

}  // namespace

void map_stats_cuda(const MapStatsParams& p, cudaStream_t stream) {
  for_channels<Stats>(p, stream);
  check_launch("map_stats_kernel");
}

void map_norm_cuda(const MapNormParams& p, cudaStream_t stream) {
  for_channels<Apply>(p, stream);
  check_launch("map_norm_kernel");
}

void map_pool_cuda(const MapPoolParams& p, cudaStream_t stream) {
  for_channels<Pool>(p, stream);
  check_launch("map_pool_kernel");
}

void map_unfold_cuda(const MapUnfoldParams& p, cudaStream_t stream) {
  const unsigned threads = unsigned(p.width) * unsigned(p.channels / kWidth);
  const dim3 grid((threads + kThreads - 1) / kThreads, p.height, unsigned(p.n_images));
  map_unfold_kernel<<<grid, kThreads, 0, stream>>>(p);
  check_launch("map_unfold_kernel");
}

}  // namespace rapfast
