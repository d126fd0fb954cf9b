#include "../project_bwd.h"

#include "../math/frustum.h"
#include "gaussian_chunks.h"

namespace rapfast {
namespace {

// What a chunk gathers for each of its Gaussians over all cameras.
template <typename T>
struct GaussianGrad {
  Vec3<T> mean;
  Sym3<T> cov;
  T opacity;
  bool seen;  // by a record with a gradient; else everything is 0
};

template <typename T>
bool any_nonzero(const Record<T>& v) {
  return v.x != T(0) || v.y != T(0) || v.conic_a != T(0) || v.conic_b != T(0) || v.conic_c != T(0) ||
         v.opacity != T(0) || v.depth != T(0) || v.compensation != T(0);
}

template <typename T>
Record<T> record_gradient(const ProjectBwdParams<T>& p, int64_t image, int64_t m) {
  Record<T> v = p.v_records[m];
  if (p.v_means2d != nullptr) {
    const int64_t row = p.dense_means2d ? image * p.n_gaussians + p.gaussian_ids[m] : m;
    v.x = p.v_means2d[2 * row];
    v.y = p.v_means2d[2 * row + 1];
  }
  return v;
}

template <typename T>
void add_view(const ViewGrad<T>& v, double* sums /* [16] */) {
  for (int i = 0; i < 9; ++i) sums[i] += double(v.R.m[i]);
  const T rest[7] = {v.t.x, v.t.y, v.t.z, v.fx, v.fy, v.cx, v.cy};
  for (int i = 0; i < 7; ++i) sums[9 + i] += double(rest[i]);
}

template <typename T>
void write_gaussian(const ProjectBwdParams<T>& p, int64_t g, const GaussianGrad<T>& v) {
  if (p.v_means != nullptr) {
    T* out = p.v_means + 3 * g;
    out[0] = v.mean.x;
    out[1] = v.mean.y;
    out[2] = v.mean.z;
  }
  if (p.v_opacities != nullptr) p.v_opacities[g] = v.opacity;
  if (p.v_covars != nullptr) {
    T* out = p.v_covars + 9 * g;
    const T upper[9] = {v.cov.xx, v.cov.xy, v.cov.xz, T(0), v.cov.yy, v.cov.yz, T(0), T(0), v.cov.zz};
    std::copy(upper, upper + 9, out);
  }
  if (p.v_quats == nullptr && p.v_scales == nullptr) return;
  T v_quat[4] = {}, v_scale[3] = {};
  // The quaternion of an unseen Gaussian may have no length.
  if (v.seen) covariance_vjp(p.quats + 4 * g, p.scales + 3 * g, v.cov, v_quat, v_scale);
  if (p.v_quats != nullptr) std::copy(v_quat, v_quat + 4, p.v_quats + 4 * g);
  if (p.v_scales != nullptr) std::copy(v_scale, v_scale + 3, p.v_scales + 3 * g);
}

template <typename T>
void project_chunk_bwd(const ProjectBwdParams<T>& p, int64_t scene, int64_t chunk, int64_t first,
                       int64_t count, ImageSums& view_sums) {
  std::vector<GaussianGrad<T>> grads(size_t(count), GaussianGrad<T>{});
  for (int64_t camera = 0; camera < p.n_cameras; ++camera) {
    const int64_t image = scene * p.n_cameras + camera;
    const RecordRange range = records_of(p.image_offsets, p.gaussian_ids, image, first, count);
    if (range.begin == range.end) continue;
    const View<T> view =
        load_view(p.viewmats + 16 * image, p.Ks + 9 * image, p.width, p.height);
    for (int64_t m = range.begin; m < range.end; ++m) {
      const Record<T> v_record = record_gradient(p, image, m);
      if (!any_nonzero(v_record)) continue;
      const int64_t g = scene * p.n_gaussians + p.gaussian_ids[m];
      const Vec3<T> mean = {p.means[3 * g], p.means[3 * g + 1], p.means[3 * g + 2]};
      const Sym3<T> cov = p.covars != nullptr ? upper_triangle(p.covars + 9 * g)
                                              : covariance(p.quats + 4 * g, p.scales + 3 * g);
      GaussianGrad<T>& v = grads[size_t(p.gaussian_ids[m] - first)];
      v.seen = true;
      Vec3<T> v_mean_c = {T(0), T(0), T(0)};
      ViewGrad<T> v_view = {};
      project_gaussian_vjp(view, p.camera_model, p.antialiased, p.eps2d, world_to_camera(view, mean),
                           cov, p.opacities[g], v_record, v_mean_c, v.cov, v.opacity, v_view);
      world_to_camera_vjp(view, mean, v_mean_c, v.mean, v_view);
      if (view_sums.wanted()) add_view(v_view, view_sums.of(scene, chunk, camera));
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    write_gaussian(p, scene * p.n_gaussians + first + i, grads[size_t(i)]);
  }
}

template <typename T>
void write_view(const ProjectBwdParams<T>& p, int64_t image, const double* sums /* [16] */) {
  if (p.v_viewmats != nullptr) {
    T* out = p.v_viewmats + 16 * image;
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) out[4 * i + j] = T(sums[3 * i + j]);
      out[4 * i + 3] = T(sums[9 + i]);
      out[12 + i] = T(0);
    }
    out[15] = T(0);
  }
  if (p.v_Ks != nullptr) {
    T* out = p.v_Ks + 9 * image;
    std::fill(out, out + 9, T(0));
    out[0] = T(sums[12]);
    out[4] = T(sums[13]);
    out[2] = T(sums[14]);
    out[5] = T(sums[15]);
  }
}

}  // namespace

template <typename T>
void project_bwd_cpu(const ProjectBwdParams<T>& p, int threads) {
  const bool views_wanted = p.v_viewmats != nullptr || p.v_Ks != nullptr;
  ImageSums view_sums(views_wanted, p.n_scenes, p.n_cameras, p.n_gaussians, 16);
  for_gaussian_chunks(p.n_scenes, p.n_gaussians, threads,
                      [&](int64_t scene, int64_t chunk, int64_t first, int64_t count) {
                        project_chunk_bwd(p, scene, chunk, first, count, view_sums);
                      });
  if (!views_wanted) return;
  parallel_for(p.n_scenes * p.n_cameras, threads, [&](int64_t image) {
    double sums[16];
    view_sums.total(image, sums);
    write_view(p, image, sums);
  });
}

template void project_bwd_cpu<float>(const ProjectBwdParams<float>&, int);
template void project_bwd_cpu<double>(const ProjectBwdParams<double>&, int);

}  // namespace rapfast
