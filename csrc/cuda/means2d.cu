// The means of visible records as a tensor that gradients may pass through.
#include "../render_bwd.h"

#include "check.cuh"

namespace rapfast {
namespace {

constexpr int kChunkSteps = 16;  // records of a chunk per thread
constexpr int kChunk = kChunkSteps * kThreads;

__device__ __forceinline__ void write_mean(const Record<float>& r, float* to) {
  *reinterpret_cast<float2*>(to) = make_float2(r.x, r.y);
}

// blockIdx.y is an image, or one in every gridDim.y.
__global__ void __launch_bounds__(kThreads) dense_kernel(const __grid_constant__ Means2dParams p) {
  for (int64_t image = blockIdx.y; image < p.n_images; image += gridDim.y) {
    const int64_t begin = p.image_offsets[image], end = p.image_offsets[image + 1];
    RAPFAST_GRID_STRIDE(i, end - begin) {
      const int64_t m = begin + i;
      if (p.radii[2 * m] <= 0) continue;
      write_mean(p.records[m], p.means2d + 2 * (image * p.n_gaussians + p.gaussian_ids[m]));
    }
  }
}

// Visible records of each chunk.
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Means2dParams p) {
  __shared__ uint32_t total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  uint32_t count = 0;
  for (int step = 0; step < kChunkSteps; ++step) {
    const int64_t m = int64_t(blockIdx.x) * kChunk + step * kThreads + threadIdx.x;
    count += m < p.n_records && p.radii[2 * m] > 0;
  }
  count = __reduce_add_sync(kFullWarp, count);
  if (threadIdx.x % 32 == 0) atomicAdd(&total, count);
  __syncthreads();
  if (threadIdx.x == 0) p.scratch[blockIdx.x] = total;
}

// Places of a chunk's visible records, and their means there.
__global__ void __launch_bounds__(kThreads) packed_kernel(const __grid_constant__ Means2dParams p) {
  __shared__ uint32_t before, of_warps[kThreads / 32];
  if (threadIdx.x == 0) before = 0;
  __syncthreads();
  uint32_t sum = 0;
  for (uint32_t i = threadIdx.x; i < blockIdx.x; i += kThreads) sum += p.scratch[i];
  sum = __reduce_add_sync(kFullWarp, sum);
  if (threadIdx.x % 32 == 0) atomicAdd(&before, sum);
  __syncthreads();
  uint32_t at = before;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 0; step < kChunkSteps; ++step) {
    const int64_t m = int64_t(blockIdx.x) * kChunk + step * kThreads + threadIdx.x;
    const bool exists = m < p.n_records, visible = exists && p.radii[2 * m] > 0;
    const uint32_t all = __ballot_sync(kFullWarp, visible);
    if (lane == 0) of_warps[warp] = __popc(all);
    __syncthreads();
    uint32_t place = at + __popc(all & ((1u << lane) - 1));
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) place += of_warps[w];
      at += of_warps[w];
    }
    if (exists) p.places[m] = visible ? int32_t(place) : -1;
    if (visible) write_mean(p.records[m], p.means2d + 2 * int64_t(place));
    __syncthreads();  // before the next step's counts
  }
}

}  // namespace

int64_t means2d_chunks(int64_t n_records) { return (n_records + kChunk - 1) / kChunk; }

void means2d_cuda(const Means2dParams& p, cudaStream_t stream) {
  if (p.n_images == 0 || p.n_records == 0) return;
  if (p.places == nullptr) {
    const int64_t per_image = (p.n_records + p.n_images - 1) / p.n_images;
    const dim3 grid(grid_for(per_image), unsigned(min_of<int64_t>(p.n_images, 65535)));
    dense_kernel<<<grid, kThreads, 0, stream>>>(p);
    check_launch("means2d dense_kernel");
    return;
  }
  const unsigned chunks = unsigned(means2d_chunks(p.n_records));
  count_kernel<<<chunks, kThreads, 0, stream>>>(p);
  check_launch("means2d count_kernel");
  packed_kernel<<<chunks, kThreads, 0, stream>>>(p);
  check_launch("means2d packed_kernel");
}

}  // namespace rapfast
