// Backward of stage 1 on the GPU: a lane per Gaussian that some view saw, which meets the views in their order.
// Gradients of views are added over lanes, then warps, then chunks of Gaussians, in an order that nothing changes.
#include "../render_bwd.h"

#include <cstddef>

#include "seen_rows.cuh"

namespace rapfast {
namespace {

constexpr int kViewValues = 16;  // R, t, fx, fy, cx, cy

// The front of a DeviceView.
struct alignas(16) SharedView {
  View<float> view;
  Vec3<float> center;
};
constexpr int kViewQuads = sizeof(SharedView) / 16;
static_assert(sizeof(SharedView) <= offsetof(DeviceView, test), "views are copied in pieces of 16 bytes");

struct ProjectBwdArguments {
  ProjectBwdParams<float> p;
  SeenBy seen;
  RecordGradients from;
  ViewGroup group;
  float* view_sums;  // [I, chunks, 16]
  bool add, add_means;
};

__device__ __forceinline__ bool any_nonzero(const Record<float>& v) {
  return v.x != 0.f || v.y != 0.f || v.conic_a != 0.f || v.conic_b != 0.f || v.conic_c != 0.f || v.opacity != 0.f ||
         v.depth != 0.f || v.compensation != 0.f;
}

__device__ __forceinline__ Record<float> record_gradient(const RecordGradients& from, int64_t m, int64_t image,
                                                         int64_t gaussian) {
  Record<float> v = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  if (from.rows != nullptr) {
    const float4 row = __ldg(reinterpret_cast<const float4*>(from.rows + m * from.stride));
    v.conic_a = row.x;
    v.conic_b = row.y;
    v.conic_c = row.z;
    v.opacity = row.w;
    if (from.depth_column >= 0) v.depth = __ldg(from.rows + m * from.stride + from.depth_column);
  }
  if (from.v_means2d != nullptr) {
    // A dead record's mean is of nobody's graph, but the dense means2d has room for it, where a caller may have put a
    // gradient. Both loads are on their way at once there.
    const bool dense = from.layout.places == nullptr;
    const int64_t at = dense ? image * from.layout.n_gaussians + gaussian : int64_t(from.layout.places[m]);
    const bool alive = dense ? __ldg(from.layout.radii + 2 * m) > 0 : at >= 0;
    const float2 xy = dense || alive ? __ldg(reinterpret_cast<const float2*>(from.v_means2d) + at) : float2{0.f, 0.f};
    v.x = alive ? xy.x : 0.f;
    v.y = alive ? xy.y : 0.f;
  }
  if (from.v_records != nullptr) {
    const Record<float> more = from.v_records[m];
    v.conic_a += more.conic_a;
    v.conic_b += more.conic_b;
    v.conic_c += more.conic_c;
    v.opacity += more.opacity;
    v.depth += more.depth;
    v.compensation += more.compensation;
  }
  return v;
}

__device__ __forceinline__ void put(float* to, float x, bool add) { *to = add ? *to + x : x; }

template <bool kFisheye, bool kViews>
__global__ void __launch_bounds__(kSeenThreads, 4)
    project_bwd_kernel(const __grid_constant__ ProjectBwdArguments a) {
  __shared__ SeenShared s;
  __shared__ SharedView views[kViewGroup];
  __shared__ float view_sums[kViews ? kSeenWarps : 1][kViews ? kViewGroup : 1][kViewValues];
  const ProjectBwdParams<float>& p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SeenChunk chunk(a.seen, a.group);
  const int n_cameras = a.group.n_cameras;
  for (int i = threadIdx.x; i < n_cameras * kViewQuads; i += kSeenThreads) {
    reinterpret_cast<float4*>(views)[i] =
        reinterpret_cast<const float4*>(a.seen.views + chunk.first_image + i / kViewQuads)[i % kViewQuads];
  }
  if (kViews) {
    for (int i = threadIdx.x; i < kSeenWarps * kViewGroup * kViewValues; i += kSeenThreads) {
      view_sums[i / kViewValues / kViewGroup][i / kViewValues % kViewGroup][i % kViewValues] = 0.f;
    }
  }
  const int n_rows = find_rows(a.seen, a.group, chunk, s);
  if (!a.add) {
    if (!a.add_means) zero_unseen(p.v_means, 3, chunk, s);
    zero_unseen(p.v_quats, 4, chunk, s);
    zero_unseen(p.v_scales, 3, chunk, s);
    zero_unseen(p.v_covars, 9, chunk, s);
    zero_unseen(p.v_opacities, 1, chunk, s);
  }
  // The fisheye model takes many registers.
  const CameraModel model = kFisheye ? CameraModel::kFisheye
                            : p.camera_model == CameraModel::kOrtho ? CameraModel::kOrtho : CameraModel::kPinhole;

  for (int first = warp * 32; first < n_rows; first += kSeenThreads) {
    const bool exists = first + lane < n_rows;
    const int row = exists ? s.rows[first + lane] : 0;
    const int64_t g = chunk.first_gaussian + row;
    const Vec3<float> mean = {p.means[3 * g], p.means[3 * g + 1], p.means[3 * g + 2]};
    const float opacity = p.opacities[g];
    Sym3<float> cov;
    if (p.covars != nullptr) {
      cov = upper_triangle(p.covars + 9 * g);
    } else {
      cov = covariance(p.quats + 4 * g, p.scales + 3 * g);
    }
    Vec3<float> v_mean = {0.f, 0.f, 0.f};
    Sym3<float> v_cov = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    float v_opacity = 0.f;
    bool reached = false;  // by a gradient

    // The next view's gradient is on its way while this one's is used.
    const auto fetch = [&](int k) {
      const int64_t m = exists && k < n_cameras ? record_of(s, k, row) : -1;
      if (m < 0) return Record<float>{0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
      return record_gradient(a.from, m, chunk.first_image + k, chunk.first_word * 32 + row);
    };
    Record<float> next = fetch(0);
    for (int k = 0; k < n_cameras; ++k) {
      const Record<float> v_record = next;
      next = fetch(k + 1);
      const bool has = any_nonzero(v_record);
      if (!__any_sync(kFullWarp, has)) continue;
      ViewGrad<float> v_view = {};
      if (has) {
        reached = true;
        const View<float>& view = views[k].view;
        Vec3<float> v_mean_c = {0.f, 0.f, 0.f};
        project_gaussian_vjp(view, model, p.antialiased, p.eps2d, world_to_camera(view, mean), cov, opacity, v_record,
                             v_mean_c, v_cov, v_opacity, v_view);
        world_to_camera_vjp(view, mean, v_mean_c, v_mean, v_view);
      }
      if (kViews) {
        float values[kViewValues];
#pragma unroll
        for (int i = 0; i < 9; ++i) values[i] = v_view.R.m[i];
        values[9] = v_view.t.x;
        values[10] = v_view.t.y;
        values[11] = v_view.t.z;
        values[12] = v_view.fx;
        values[13] = v_view.fy;
        values[14] = v_view.cx;
        values[15] = v_view.cy;
        const float sum = sum32_of16(values, lane);
        if (lane % 2 == 0) view_sums[warp][k][lane / 2] += sum;
      }
    }
    if (!exists) continue;

    if (p.v_means != nullptr) {
      put(p.v_means + 3 * g, v_mean.x, a.add_means);
      put(p.v_means + 3 * g + 1, v_mean.y, a.add_means);
      put(p.v_means + 3 * g + 2, v_mean.z, a.add_means);
    }
    if (p.v_opacities != nullptr) put(p.v_opacities + g, v_opacity, a.add);
    if (p.v_covars != nullptr) {
      float* out = p.v_covars + 9 * g;
      const float upper[9] = {v_cov.xx, v_cov.xy, v_cov.xz, 0.f, v_cov.yy, v_cov.yz, 0.f, 0.f, v_cov.zz};
#pragma unroll
      for (int i = 0; i < 9; ++i) put(out + i, upper[i], a.add);
    }
    if (p.v_quats == nullptr && p.v_scales == nullptr) continue;
    float v_quat[4] = {}, v_scale[3] = {};
    if (reached) covariance_vjp(p.quats + 4 * g, p.scales + 3 * g, v_cov, v_quat, v_scale);
    if (p.v_quats != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) put(p.v_quats + 4 * g + i, v_quat[i], a.add);
    }
    if (p.v_scales != nullptr) {
#pragma unroll
      for (int i = 0; i < 3; ++i) put(p.v_scales + 3 * g + i, v_scale[i], a.add);
    }
  }
  if (!kViews) return;
  __syncthreads();
  const int64_t n_chunks = ballot_chunks(a.seen.n_gaussians);
  for (int i = threadIdx.x; i < n_cameras * kViewValues; i += kSeenThreads) {
    float sum = 0.f;
    for (int w = 0; w < kSeenWarps; ++w) sum += view_sums[w][i / kViewValues][i % kViewValues];
    a.view_sums[((chunk.first_image + i / kViewValues) * n_chunks + chunk.chunk) * kViewValues + i % kViewValues] = sum;
  }
}

// Adds chunks' sums of kValues numbers up, in an order that depends on their number alone. All threads come here.
template <int kValues>
__device__ void add_chunks(const float* sums /* [chunks, kValues] */, int64_t n_chunks, double* total /* shared */) {
  constexpr int kParts = kThreads / kValues;
  __shared__ double parts[kParts * kValues];
  const int part = threadIdx.x / kValues, value = threadIdx.x % kValues;
  if (part < kParts) {
    double sum = 0.0;
    for (int64_t i = part; i < n_chunks; i += kParts) sum += double(sums[i * kValues + value]);
    parts[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kValues) {
    double sum = 0.0;
    for (int i = 0; i < kParts; ++i) sum += parts[i * kValues + threadIdx.x];
    total[threadIdx.x] = sum;
  }
  __syncthreads();
}

// A block makes the gradients of one view.
__global__ void __launch_bounds__(kThreads)
    view_gradients_kernel(const __grid_constant__ SeenBy seen, const __grid_constant__ ViewSums sums,
                          float* __restrict__ v_viewmats, float* __restrict__ v_Ks) {
  __shared__ double of_project[kViewValues], of_center[3];
  const int64_t image = blockIdx.x, n_chunks = ballot_chunks(seen.n_gaussians);
  if (threadIdx.x < kViewValues) of_project[threadIdx.x] = 0.0;
  if (threadIdx.x < 3) of_center[threadIdx.x] = 0.0;
  __syncthreads();
  if (sums.project != nullptr) {
    add_chunks<kViewValues>(sums.project + image * n_chunks * kViewValues, n_chunks, of_project);
  }
  if (sums.center != nullptr) add_chunks<3>(sums.center + image * n_chunks * 3, n_chunks, of_center);
  if (threadIdx.x != 0) return;
  const DeviceView& device = seen.views[image];
  ViewGrad<float> v = {};
  // A view that sees nothing may be singular.
  if (of_center[0] != 0.0 || of_center[1] != 0.0 || of_center[2] != 0.0) {
    camera_center_vjp(device.view, device.center,
                      Vec3<float>{float(of_center[0]), float(of_center[1]), float(of_center[2])}, v);
  }
  if (v_viewmats != nullptr) {
    float* out = v_viewmats + 16 * image;
    const float v_t[3] = {v.t.x, v.t.y, v.t.z};
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) out[4 * i + j] = float(of_project[3 * i + j]) + v.R.m[3 * i + j];
      out[4 * i + 3] = float(of_project[9 + i]) + v_t[i];
      out[12 + i] = 0.f;
    }
    out[15] = 0.f;
  }
  if (v_Ks != nullptr) {
    float* out = v_Ks + 9 * image;
    for (int i = 0; i < 9; ++i) out[i] = 0.f;
    out[0] = float(of_project[12]);
    out[4] = float(of_project[13]);
    out[2] = float(of_project[14]);
    out[5] = float(of_project[15]);
  }
}

}  // namespace

int64_t seen_chunks(int64_t n_gaussians) { return ballot_chunks(n_gaussians); }

void project_bwd_cuda(const ProjectBwdParams<float>& p, const SeenBy& seen, const RecordGradients& from,
                      const ViewSums& sums, bool add_means, cudaStream_t stream) {
  const int64_t blocks = seen.n_scenes * ballot_chunks(seen.n_gaussians);
  if (blocks == 0) return;
  for_view_groups(seen.n_cameras, [&](const ViewGroup& group) {
    const bool add = group.first_camera > 0;
    const ProjectBwdArguments a = {p, seen, from, group, sums.project, add, add || add_means};
    const bool fisheye = p.camera_model == CameraModel::kFisheye;
    const auto kernel =
        sums.project != nullptr ? (fisheye ? project_bwd_kernel<true, true> : project_bwd_kernel<false, true>)
                                : (fisheye ? project_bwd_kernel<true, false> : project_bwd_kernel<false, false>);
    kernel<<<unsigned(blocks), kSeenThreads, 0, stream>>>(a);
    check_launch("project_bwd_kernel");
  });
}

void view_gradients_cuda(const SeenBy& seen, const ViewSums& sums, float* v_viewmats, float* v_Ks,
                         cudaStream_t stream) {
  const int64_t n_images = seen.n_scenes * seen.n_cameras;
  if (n_images == 0) return;
  view_gradients_kernel<<<unsigned(n_images), kThreads, 0, stream>>>(seen, sums, v_viewmats, v_Ks);
  check_launch("view_gradients_kernel");
}

}  // namespace rapfast
