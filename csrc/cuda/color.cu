// Stage 2 on the GPU: one thread per record.
#include "../color.h"

#include "../math/sh.h"
#include "check.cuh"
#include "records.cuh"
#include "scratch.h"

namespace rapfast {
namespace {

template <int kDegree>
__global__ void __launch_bounds__(kThreads)
    sh_kernel(ColorParams<float> p, int64_t n_images, const DeviceView* __restrict__ views,
              const int32_t* __restrict__ image_ids) {
  const int64_t n = min(p.image_offsets[n_images], p.capacity);
  RAPFAST_GRID_STRIDE(m, n) {
    if (is_dead(p.records[m])) continue;
    const int32_t image = image_ids[m];
    const int64_t scene = image / p.n_cameras;
    const int64_t g = p.gaussian_ids[m];
    const float* mean = p.means + 3 * (scene * p.n_gaussians + g);
    const Vec3<float> center = views[image].center;
    float basis[sh_bases(kDegree)];
    sh_basis(kDegree, Vec3<float>{mean[0] - center.x, mean[1] - center.y, mean[2] - center.z}, basis);

    const int64_t row = (p.per_camera ? int64_t(image) : scene) * p.n_gaussians + g;
    const float* coeffs = p.colors + 3 * p.n_bases * row;
    float rgb[3] = {0.f, 0.f, 0.f};
    if (p.n_bases * 3 % 4 == 0) {
      // Rows are 16-byte aligned: a degree of 3 is 12 loads instead of 48.
      const float4* quads = reinterpret_cast<const float4*>(coeffs);
#pragma unroll
      for (int i = 0; i < sh_bases(kDegree) * 3; i += 4) {
        const float4 quad = quads[i / 4];
        const float part[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (i + j < sh_bases(kDegree) * 3) rgb[(i + j) % 3] += basis[(i + j) / 3] * part[j];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < sh_bases(kDegree) * 3; ++i) rgb[i % 3] += basis[i / 3] * coeffs[i];
    }

    for (int c = 0; c < 3; ++c) rgb[c] = sh_to_color(rgb[c]);
    write_rgb(p, m, image, rgb);
  }
}

__global__ void __launch_bounds__(kThreads)
    given_color_kernel(ColorParams<float> p, int64_t n_images,
                       const int32_t* __restrict__ image_ids) {
  const int64_t n = min(p.image_offsets[n_images], p.capacity);
  const bool with_colors = p.depth_channel != DepthChannel::kOnly;
  RAPFAST_GRID_STRIDE(m, n) {
    if (is_dead(p.records[m])) continue;
    const int32_t image = image_ids[m];
    float* out = p.record_colors + m * p.color_stride;
    // The padding is loaded with the last channels.
    for (int64_t d = output_channels(p); d < p.color_stride; ++d) out[d] = 0.f;
    if (with_colors) {
      const int64_t lead = p.per_camera ? int64_t(image) : image / p.n_cameras;
      const float* color = p.colors + p.n_channels * (lead * p.n_gaussians + p.gaussian_ids[m]);
      bool finite = true;
      for (int64_t d = 0; d < p.n_channels; ++d) {
        out[d] = color[d];
        finite = finite && is_finite(color[d]);
      }
      if (!finite) remove_record(p, m, image, out);
    }
    if (p.depth_channel != DepthChannel::kNone) {
      out[output_channels(p) - 1] = p.records[m].depth;
    }
  }
}

}  // namespace

void color_cuda(const ColorParams<float>& p, const DeviceView* views, const int32_t* image_ids,
                cudaStream_t stream) {
  const int64_t n_images = p.n_scenes * p.n_cameras;
  if (p.capacity == 0 || n_images == 0) return;
  const unsigned grid = grid_for(p.capacity);
  const bool with_sh = p.sh_degree >= 0 && p.depth_channel != DepthChannel::kOnly;
  switch (with_sh ? p.sh_degree : -1) {
    case 0: sh_kernel<0><<<grid, kThreads, 0, stream>>>(p, n_images, views, image_ids); break;
    case 1: sh_kernel<1><<<grid, kThreads, 0, stream>>>(p, n_images, views, image_ids); break;
    case 2: sh_kernel<2><<<grid, kThreads, 0, stream>>>(p, n_images, views, image_ids); break;
    case 3: sh_kernel<3><<<grid, kThreads, 0, stream>>>(p, n_images, views, image_ids); break;
    case 4: sh_kernel<4><<<grid, kThreads, 0, stream>>>(p, n_images, views, image_ids); break;
    default: given_color_kernel<<<grid, kThreads, 0, stream>>>(p, n_images, image_ids);
  }
  check_launch("color kernel");
}

}  // namespace rapfast
