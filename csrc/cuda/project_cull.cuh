// Stage 1: cameras made ready, and which Gaussians they may see.
#pragma once

#include "project_kernels.cuh"
#include "warp_sums.cuh"

namespace rapfast {
namespace {

// ------------------------------------------------------------------------------------------ prepare

constexpr int kPrepareThreads = 128;

struct PrepareParams {
  const float* viewmats;   // [I, 4, 4]
  const float* Ks;         // [I, 3, 3]
  int64_t n_images, n_gaussians;
  ProjectOptions<float> options;
  DeviceView* views;       // [I]
  int64_t* image_offsets;  // [I + 1] or null, with what follows
  int64_t* n_invalid;      // [I]
  Counts* counts;
  int64_t* n_visible;      // or null
  ClearedMemory cleared[2];
};

__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareParams a) {
  let_next_kernel_come();
  RAPFAST_GRID_STRIDE(i, a.n_images + 1) {
    if (i < a.n_images) {
      DeviceView v{};
      v.view = load_view(a.viewmats + 16 * i, a.Ks + 9 * i, a.options.width, a.options.height);
      v.test = make_frustum_test(v.view, a.options);
      if (v.view.valid) {
        v.center = camera_center(v.view);
      } else {
        v.test.near_plane = INFINITY;
        v.test.far_plane = -INFINITY;
      }
      a.views[i] = v;
      // An unusable view counts all Gaussians as invalid.
      if (a.n_invalid != nullptr) a.n_invalid[i] = v.view.valid ? 0 : a.n_gaussians;
    }
    if (a.image_offsets != nullptr) {
      a.image_offsets[i] = 0;  // stays so where there is nothing to project
      if (i == 0) *a.counts = Counts{0, 0};
      if (i == 0 && a.n_visible != nullptr) *a.n_visible = 0;
    }
  }
  for (const ClearedMemory& memory : a.cleared) {
    RAPFAST_GRID_STRIDE(i, memory.bytes / 16) static_cast<uint4*>(memory.begin)[i] = make_uint4(0, 0, 0, 0);
  }
}

void prepare(const PrepareParams& a, cudaStream_t stream) {
  const int64_t bytes = max_of(a.cleared[0].bytes, a.cleared[1].bytes);
  const int64_t n = max_of(a.n_images + 1, bytes / 16);
  prepare_kernel<<<grid_for(n, kPrepareThreads), kPrepareThreads, 0, stream>>>(a);
  check_launch("prepare_kernel");
}

// --------------------------------------------------------------------------------------------- cull

// A Gaussian that does not exist or is invalid has a mean of NaN, which no view sees.
struct Candidate {
  Vec3<float> mean;
  Extent<float> extent;
};

// Gaussians first, first + 32, ... of this lane, `left` being the number there is from `first` on (at least
// one); all loads are under way before one is waited for. Sets bit i of `invalid` for the i-th.
__device__ __forceinline__ void load_candidates(const ProjectParams<float>& p, int64_t first, int left,
                                                Candidate* candidates, uint32_t* invalid) {
  const float* means = p.means + 3 * first;
  const float* opacities = p.opacities + first;
  float mean[kWarpWords][3], opacity[kWarpWords], sigma[kWarpWords], zero[kWarpWords];
  bool valid[kWarpWords];
#pragma unroll
  for (int i = 0; i < kWarpWords; ++i) {
    const int at = min(32 * i, left - 1);
#pragma unroll
    for (int j = 0; j < 3; ++j) mean[i][j] = __ldg(means + 3 * at + j);
    opacity[i] = __ldg(opacities + at);
  }
  if (p.covars != nullptr) {
    const float* covars = p.covars + 9 * first;
#pragma unroll
    for (int i = 0; i < kWarpWords; ++i) {
      const Sym3<float> cov = upper_triangle(covars + 9 * min(32 * i, left - 1));
      zero[i] = zero_if_finite(cov);
      sigma[i] = sigma_of_covariance(cov);
      valid[i] = true;
    }
  } else {
    const float4* quats = reinterpret_cast<const float4*>(p.quats) + first;
    const float* scales = p.scales + 3 * first;
    float4 q[kWarpWords];
    float scale[kWarpWords][3];
#pragma unroll
    for (int i = 0; i < kWarpWords; ++i) {
      const int at = min(32 * i, left - 1);
      q[i] = __ldg(quats + at);
#pragma unroll
      for (int j = 0; j < 3; ++j) scale[i][j] = __ldg(scales + 3 * at + j);
    }
#pragma unroll
    for (int i = 0; i < kWarpWords; ++i) {
      const float quat[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
      valid[i] = valid_quaternion(quat);
      zero[i] = zero_if_finite(scale[i], 3);
      sigma[i] = sigma_of_scales(scale[i]);
    }
  }
  *invalid = 0;
#pragma unroll
  for (int i = 0; i < kWarpWords; ++i) {
    Candidate& c = candidates[i];
    c.mean = {mean[i][0], mean[i][1], mean[i][2]};
    c.extent = extent_of(c.mean.x, c.mean.y, c.mean.z, sigma[i], opacity[i]);
    const bool exists = 32 * i < left;
    const bool good = valid[i] && multiply_add(0.f, opacity[i], zero[i] + zero_if_finite(mean[i], 3)) == 0.f;
    if (!exists || !good) c.mean.z = NAN;
    if (exists && !good) *invalid |= 1u << i;
  }
}

template <CameraModel kModel>
__device__ void cull_group(const ProjectParams<float>& p, int64_t scene_and_group, int64_t n_groups,
                           const ProjectScratch& s) {
  __shared__ float4 tests[kGroup][kTestQuads];
  __shared__ alignas(8) uint32_t kept[kGroup][kChunkWords];
  const int64_t scene = scene_and_group / n_groups;
  const int64_t first_camera = scene_and_group % n_groups * kGroup;
  const int n_cameras = int(min(int64_t(kGroup), p.n_cameras - first_camera));
  const int64_t first_image = scene * p.n_cameras + first_camera;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t chunk = blockIdx.x;
  const int64_t first = (chunk * kChunkWords + warp * kWarpWords) * 32 + lane;
  const int left = int(min(p.n_gaussians - first, int64_t(32 * kWarpWords)));
  Candidate candidates[kWarpWords];
  uint32_t invalid = 0;
  if (left > 0) {
    load_candidates(p, scene * p.n_gaussians + first, left, candidates, &invalid);
  } else {
#pragma unroll
    for (Candidate& c : candidates) c = Candidate{{0.f, 0.f, NAN}, {0.f, 0.f}};
  }
  wait_for_kernel_before();
  for (int i = threadIdx.x; i < n_cameras * kTestQuads; i += kThreads) {
    const DeviceView& view = s.views[first_image + i / kTestQuads];
    tests[0][i] = reinterpret_cast<const float4*>(&view.test)[i % kTestQuads];
  }
  const uint32_t n_invalid = __reduce_add_sync(kFullWarp, __popc(invalid));
  if (n_invalid != 0 && lane < n_cameras && s.views[first_image + lane].view.valid) {
    add_to(p.n_invalid + first_image + lane, n_invalid);
  }
  __syncthreads();

  for (int k = 0; k < n_cameras; ++k) {
    alignas(16) FrustumTest<float> test;
#pragma unroll
    for (int i = 0; i < kTestQuads; ++i) reinterpret_cast<float4*>(&test)[i] = tests[k][i];
    uint32_t words[kWarpWords];
#pragma unroll
    for (int i = 0; i < kWarpWords; ++i) {
      const Candidate& c = candidates[i];
      words[i] = __ballot_sync(kFullWarp, may_be_seen<kModel>(test, c.mean.x, c.mean.y, c.mean.z, c.extent));
    }
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kWarpWords; ++i) kept[k][warp * kWarpWords + i] = words[i];
    }
  }
  __syncthreads();

  const int64_t n_words = ballot_words(p.n_gaussians);
  for (int first = threadIdx.x - lane; first < n_cameras * kChunkWords; first += kThreads) {
    const int k = (first + lane) / kChunkWords, word = (first + lane) % kChunkWords;
    const bool exists = k < n_cameras;
    const uint32_t bits = exists ? kept[k][word] : 0;
    uint32_t count = __popc(bits);
#pragma unroll
    for (int step = 1; step < kChunkWords; step *= 2) count += __shfl_xor_sync(kFullWarp, count, step);
    if (!exists) continue;
    const int64_t image = first_image + k;
    if (chunk * kChunkWords + word < n_words) s.ballots[image * n_words + chunk * kChunkWords + word] = bits;
    if (word == 0) {
      s.chunk_counts[image * gridDim.x + chunk] = count;
      if (count != 0) {
        atomicAdd(s.span_counts + image * ballot_spans(p.n_gaussians) + chunk / kSpanChunks, count);
        atomicAdd(s.image_counts + image, count);
      }
    }
  }
}

template <CameraModel kModel>
__global__ void __launch_bounds__(kThreads)
    cull_kernel(const __grid_constant__ ProjectParams<float> p, const __grid_constant__ ProjectScratch s) {
  let_next_kernel_come();
  const int64_t n_groups = (p.n_cameras + kGroup - 1) / kGroup;
  for (int64_t i = blockIdx.y; i < p.n_scenes * n_groups; i += gridDim.y) {
    cull_group<kModel>(p, i, n_groups, s);
    __syncthreads();  // before the next group's tests replace these
  }
}

}  // namespace
}  // namespace rapfast
