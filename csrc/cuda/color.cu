// Stage 2 on the GPU, for records that are there already. Most calls have theirs coloured by the projection
// (project.cu); what comes here are given colours of many channels, and the stage on its own.
#include "../color.h"

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
    const int64_t row = color_set(p, image) * p.n_gaussians + g;
    float rgb[3];
    sh_color<kDegree>(Vec3<float>{mean[0] - center.x, mean[1] - center.y, mean[2] - center.z},
                      p.colors + 3 * p.n_bases * row, sh_rows_are_aligned(p), rgb);
    write_rgb(p, m, image, rgb);
  }
}

// 2^log_lanes lanes take one record, four channels each at a time, so that a warp reads and writes rows
// whole.
__global__ void __launch_bounds__(kThreads)
    given_color_kernel(ColorParams<float> p, int64_t n_images, int log_lanes,
                       const int32_t* __restrict__ image_ids) {
  const int64_t n = min(p.image_offsets[n_images], p.capacity);
  const int64_t n_given = p.depth_channel == DepthChannel::kOnly ? 0 : p.n_channels;
  const int lanes = 1 << log_lanes;
  const int lane = threadIdx.x % 32, part = lane & (lanes - 1);
  const uint32_t row_lanes = (lanes == 32 ? kFullWarp : (1u << lanes) - 1) << (lane - part);
  const bool quads_in = n_given % 4 == 0, quads_out = p.color_stride % 4 == 0;

  // Whole warps enter the loop body together: its ballot needs every lane of a row.
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at - lane < n << log_lanes; at += step) {
    const int64_t m = at >> log_lanes;
    const bool mine = m < n && !is_dead(p.records[m]);
    const int32_t image = mine ? image_ids[m] : 0;
    const int64_t lead = color_set(p, image);
    const float* color = n_given == 0 ? nullptr : p.colors;
    if (mine && color != nullptr) color += n_given * (lead * p.n_gaussians + p.gaussian_ids[m]);
    float* out = p.record_colors + m * p.color_stride;
    bool finite = true;
    if (mine) {
      for (int64_t d = 4 * part; d < p.color_stride; d += 4 * lanes) {
        float v[4] = {0.f, 0.f, 0.f, 0.f};  // zeros behind the last channel: they are loaded with it
        if (quads_in && d < n_given) {
          const float4 quad = __ldg(reinterpret_cast<const float4*>(color + d));
          v[0] = quad.x, v[1] = quad.y, v[2] = quad.z, v[3] = quad.w;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!quads_in && d + i < n_given) v[i] = __ldg(color + d + i);
          finite = finite && is_finite(v[i]);
          if (d + i == n_given && p.depth_channel != DepthChannel::kNone) v[i] = p.records[m].depth;
        }
        if (quads_out) {
          *reinterpret_cast<float4*>(out + d) = make_float4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (d + i < p.color_stride) out[d + i] = v[i];
          }
        }
      }
    }
    const uint32_t bad = __ballot_sync(kFullWarp, !finite) & row_lanes;
    __syncwarp();  // the row is written
    if (bad != 0 && part == 0) remove_record(p, m, image, out);
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
    default: {
      int log_lanes = 0;
      while (log_lanes < 5 && (int64_t(4) << log_lanes) < p.color_stride) ++log_lanes;
      given_color_kernel<<<grid_for(p.capacity << log_lanes), kThreads, 0, stream>>>(p, n_images, log_lanes,
                                                                                     image_ids);
    }
  }
  check_launch("color kernel");
}

}  // namespace rapfast
