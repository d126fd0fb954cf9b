// Stage 1 on the GPU, in four steps: views prepared; each Gaussian tested against a group of cameras
// with its parameters loaded once, one bit per pair; the bits scanned into places; and the full
// projection of the pairs that passed, one thread each, so that no lane idles on a culled pair.
//
// Places follow (image, Gaussian) order, so records are the same on every run. A pair that passes
// the cheap test and fails the full one keeps its place as a dead record: opacity and radii 0.
#include "../project.h"

#include <cub/device/device_scan.cuh>
#include <thrust/iterator/transform_iterator.h>

#include "check.cuh"
#include "cub_bytes.h"
#include "scratch.h"

namespace rapfast {
namespace {

constexpr int kGroup = 32;  // cameras a Gaussian meets per load: lane k keeps camera k's ballot

__global__ void view_kernel(const float* __restrict__ viewmats, const float* __restrict__ Ks,
                            int64_t n_images, ProjectOptions<float> options, DeviceView* views) {
  RAPFAST_GRID_STRIDE(i, n_images) {
    const View<float> view = load_view(viewmats + 16 * i, Ks + 9 * i, options.width, options.height);
    views[i].test = make_frustum_test(view, options);
    views[i].center = view.valid ? camera_center(view) : Vec3<float>{0.f, 0.f, 0.f};
  }
}

// The outputs that later kernels add to, and all of them where there is nothing to project.
__global__ void clear_kernel(ProjectParams<float> p, int64_t n_images, Counts* counts) {
  RAPFAST_GRID_STRIDE(i, n_images + 1) {
    p.image_offsets[i] = 0;
    if (i < n_images) p.n_invalid[i] = 0;
    if (i == 0) *counts = Counts{0, 0};
  }
}

__device__ void cull_group(const ProjectParams<float>& p, int64_t scene_and_group, int64_t n_groups,
                           const DeviceView* __restrict__ views, uint32_t* __restrict__ ballots) {
  __shared__ FrustumTest<float> tests[kGroup];
  const int64_t scene = scene_and_group / n_groups;
  const int64_t first_camera = scene_and_group % n_groups * kGroup;
  const int n_cameras = int(min(int64_t(kGroup), p.n_cameras - first_camera));
  const int64_t first_image = scene * p.n_cameras + first_camera;
  for (int k = threadIdx.x; k < n_cameras; k += blockDim.x) tests[k] = views[first_image + k].test;
  __syncthreads();

  const int64_t n_words = ballot_words(p.n_gaussians);
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t word = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; word < n_words;
       word += warps) {
    const int64_t g = word * 32 + lane;
    const bool exists = g < p.n_gaussians;
    const int64_t row = scene * p.n_gaussians + (exists ? g : 0);
    const float* mean = p.means + 3 * row;
    const float x = mean[0], y = mean[1], z = mean[2];
    const float opacity = p.opacities[row];
    float zero = zero_if_finite(mean, 3) + zero_if_finite(&opacity, 1);
    float size2;
    bool valid = true;
    if (p.covars != nullptr) {
      const Sym3<float> cov = upper_triangle(p.covars + 9 * row);
      zero += zero_if_finite(cov);
      size2 = size2_of_covariance(cov);
    } else {
      const float4 q = reinterpret_cast<const float4*>(p.quats)[row];
      const float quat[4] = {q.x, q.y, q.z, q.w};
      const float scale[3] = {p.scales[3 * row], p.scales[3 * row + 1], p.scales[3 * row + 2]};
      zero += zero_if_finite(scale, 3);
      valid = valid_quaternion(quat);
      size2 = size2_of_scales(scale);
    }
    valid = valid && zero == 0.f;

    uint32_t mine = 0;
    for (int k = 0; k < n_cameras; ++k) {
      const FrustumTest<float>& test = tests[k];
      const bool usable = valid && test.view.valid;
      const bool keep = exists && usable && may_be_seen(test, x, y, z, size2, opacity);
      const uint32_t kept = __ballot_sync(kFullWarp, keep);
      const uint32_t invalid = __ballot_sync(kFullWarp, exists && !usable);
      if (lane == k) {
        mine = kept;
        if (invalid != 0) add_to(p.n_invalid + first_image + k, __popc(invalid));
      }
    }
    if (lane < n_cameras) ballots[(first_image + lane) * n_words + word] = mine;
  }
}

__global__ void __launch_bounds__(kThreads)
    cull_kernel(ProjectParams<float> p, const DeviceView* __restrict__ views,
                uint32_t* __restrict__ ballots) {
  const int64_t n_groups = (p.n_cameras + kGroup - 1) / kGroup;
  for (int64_t i = blockIdx.y; i < p.n_scenes * n_groups; i += gridDim.y) {
    cull_group(p, i, n_groups, views, ballots);
    __syncthreads();  // before the next group's tests replace these
  }
}

struct PopCount {
  __host__ __device__ uint32_t operator()(uint32_t word) const {
#if defined(__CUDA_ARCH__)
    return __popc(word);
#else
    return uint32_t(__builtin_popcount(word));
#endif
  }
};

cudaError_t scan_ballots(void* temp, size_t& bytes, const uint32_t* ballots, uint32_t* offsets,
                         int64_t n, cudaStream_t stream) {
  return cub::DeviceScan::ExclusiveSum(
      temp, bytes, thrust::make_transform_iterator(ballots, PopCount()), offsets, n, stream);
}

// Each set bit becomes a record's Gaussian and image. A warp takes 32 words and writes one word's
// records at a time, side by side.
__global__ void __launch_bounds__(kThreads)
    expand_kernel(ProjectParams<float> p, int64_t n_images, const uint32_t* __restrict__ ballots,
                  const uint32_t* __restrict__ word_offsets, int32_t* __restrict__ image_ids,
                  Counts* counts) {
  const int64_t n_words = ballot_words(p.n_gaussians), total = n_images * n_words;
  const int lane = threadIdx.x % 32;
  const uint32_t below = (1u << lane) - 1;
  for (int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32 * 32; first < total;
       first += int64_t(gridDim.x) * blockDim.x) {
    const int64_t w = first + lane;
    uint32_t bits = 0, offset = 0;
    int32_t image = 0, word = 0;
    if (w < total) {
      bits = ballots[w];
      offset = word_offsets[w];
      image = int32_t(w / n_words);
      word = int32_t(w - image * n_words);
      if (word == 0) p.image_offsets[image] = offset;
      if (w == total - 1) {
        p.image_offsets[n_images] = int64_t(offset) + __popc(bits);
        counts->n_records = int64_t(offset) + __popc(bits);
      }
    }
    for (uint32_t some = __ballot_sync(kFullWarp, bits != 0); some != 0; some &= some - 1) {
      const int k = __ffs(some) - 1;
      const uint32_t word_bits = __shfl_sync(kFullWarp, bits, k);
      const int64_t m = int64_t(__shfl_sync(kFullWarp, offset, k)) + __popc(word_bits & below);
      const int32_t word_k = __shfl_sync(kFullWarp, word, k);
      const int32_t image_k = __shfl_sync(kFullWarp, image, k);
      if ((word_bits >> lane & 1u) != 0 && m < p.capacity) {
        p.gaussian_ids[m] = word_k * 32 + lane;
        image_ids[m] = image_k;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    project_kernel(ProjectParams<float> p, int64_t n_images, const DeviceView* __restrict__ views,
                   const int32_t* __restrict__ image_ids) {
  const int64_t n = min(p.image_offsets[n_images], p.capacity);
  RAPFAST_GRID_STRIDE(m, n) {
    const int32_t image = image_ids[m];
    const View<float>& view = views[image].test.view;
    const int64_t g = image / p.n_cameras * p.n_gaussians + p.gaussian_ids[m];
    const float* mean = p.means + 3 * g;
    const Vec3<float> mean_c = world_to_camera(view, Vec3<float>{mean[0], mean[1], mean[2]});
    Sym3<float> cov;
    if (p.covars != nullptr) {
      cov = upper_triangle(p.covars + 9 * g);
    } else {
      const float4 q = reinterpret_cast<const float4*>(p.quats)[g];
      const float quat[4] = {q.x, q.y, q.z, q.w};
      cov = covariance(quat, p.scales + 3 * g);
    }
    Record<float> record;
    int32_t radii[2];
    const Visibility seen =
        project_gaussian(view, p.options, mean_c, cov, p.opacities[g], record, radii);
    if (seen != Visibility::kVisible) {
      record = Record<float>{0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
      radii[0] = radii[1] = 0;
    }
    if (seen == Visibility::kInvalid) add_to(p.n_invalid + image, 1);
    float4* out = reinterpret_cast<float4*>(p.records + m);
    out[0] = make_float4(record.x, record.y, record.conic_a, record.conic_b);
    out[1] = make_float4(record.conic_c, record.opacity, record.depth, record.compensation);
    reinterpret_cast<int2*>(p.radii)[m] = make_int2(radii[0], radii[1]);
  }
}

}  // namespace

ProjectScratch project_scratch(Arena& arena, int64_t n_images, int64_t n_gaussians,
                               int64_t record_capacity) {
  const int64_t n_words = n_images * ballot_words(n_gaussians);
  ProjectScratch s{};
  s.views = arena.take<DeviceView>(n_images);
  s.image_ids = arena.take<int32_t>(record_capacity);
  s.ballots = arena.take<uint32_t>(n_words);
  s.word_offsets = arena.take<uint32_t>(n_words);
  struct Scan;
  s.cub_bytes = cub_bytes<Scan>(n_words, "scan of ballots", [&](size_t& bytes) {
    return scan_ballots(nullptr, bytes, nullptr, nullptr, n_words, nullptr);
  });
  s.cub = arena.take<char>(int64_t(s.cub_bytes));
  return s;
}

void views_cuda(const float* viewmats, const float* Ks, int64_t n_images,
                const ProjectOptions<float>& options, DeviceView* views, cudaStream_t stream) {
  if (n_images == 0) return;
  view_kernel<<<grid_for(n_images, 32), 32, 0, stream>>>(viewmats, Ks, n_images, options, views);
  check_launch("view_kernel");
}

void project_cuda(const ProjectParams<float>& p, const ProjectScratch& s, Counts* counts,
                  cudaStream_t stream) {
  const int64_t n_images = p.n_scenes * p.n_cameras;
  const int64_t n_words = ballot_words(p.n_gaussians);
  views_cuda(p.viewmats, p.Ks, n_images, p.options, s.views, stream);
  clear_kernel<<<grid_for(n_images + 1), kThreads, 0, stream>>>(p, n_images, counts);
  check_launch("clear_kernel");
  if (n_images * n_words == 0) return;

  const int64_t groups = p.n_scenes * ((p.n_cameras + kGroup - 1) / kGroup);
  const dim3 grid(grid_for(p.n_gaussians), unsigned(min_of<int64_t>(groups, 65535)));
  cull_kernel<<<grid, kThreads, 0, stream>>>(p, s.views, s.ballots);
  check_launch("cull_kernel");
  size_t bytes = s.cub_bytes;
  check(scan_ballots(s.cub, bytes, s.ballots, s.word_offsets, n_images * n_words, stream),
        "scan of ballots");
  expand_kernel<<<grid_for(n_images * n_words), kThreads, 0, stream>>>(
      p, n_images, s.ballots, s.word_offsets, s.image_ids, counts);
  check_launch("expand_kernel");
  if (p.capacity == 0) return;
  project_kernel<<<grid_for(p.capacity), kThreads, 0, stream>>>(p, n_images, s.views, s.image_ids);
  check_launch("project_kernel");
}

}  // namespace rapfast
