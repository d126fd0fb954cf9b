#include "../color_bwd.h"

#include "../math/camera.h"
#include "../math/sh.h"
#include "gaussian_chunks.h"

namespace rapfast {
namespace {

// Adjoint of one record's harmonics: adds to the coefficients' gradient and returns the direction's.
template <typename T>
Vec3<T> sh_color_vjp(const ColorBwdParams<T>& p, const Vec3<T>& direction, const T* coeffs /* [K, 3] */,
                     const T* v_color /* [3] */, T* v_coeffs /* [K, 3], or null */) {
  const int n_bases = sh_bases(p.sh_degree);
  T basis[sh_bases(kMaxShDegree)], v_basis[sh_bases(kMaxShDegree)] = {};
  sh_basis(p.sh_degree, direction, basis);
  for (int c = 0; c < 3; ++c) {
    T value = T(0);
    for (int k = 0; k < n_bases; ++k) value += basis[k] * coeffs[3 * k + c];
    if (!(value + Constants<T>::kShOffset >= T(0))) continue;  // the clamp at 0 holds it
    for (int k = 0; k < n_bases; ++k) v_basis[k] += v_color[c] * coeffs[3 * k + c];
    if (v_coeffs == nullptr) continue;
    for (int k = 0; k < n_bases; ++k) v_coeffs[3 * k + c] += v_color[c] * basis[k];
  }
  return sh_basis_vjp(p.sh_degree, direction, v_basis);
}

template <typename T>
void color_chunk_bwd(const ColorBwdParams<T>& p, int64_t scene, int64_t chunk, int64_t first,
                     int64_t count, ImageSums& center_sums) {
  const bool with_sh = p.sh_degree >= 0;
  const int64_t row_size = with_sh ? 3 * p.n_bases : p.n_channels;
  const auto clear_colors = [&](int64_t row) {
    if (p.v_colors == nullptr) return;
    T* begin = p.v_colors + row_size * (row * p.n_gaussians + first);
    std::fill(begin, begin + row_size * count, T(0));
  };
  if (!p.per_camera) clear_colors(scene);
  if (p.v_means != nullptr) {
    T* begin = p.v_means + 3 * (scene * p.n_gaussians + first);
    std::fill(begin, begin + 3 * count, T(0));
  }

  for (int64_t camera = 0; camera < p.n_cameras; ++camera) {
    const int64_t image = scene * p.n_cameras + camera;
    const int64_t row = p.per_camera ? image : scene;  // of colors' leading dimension
    if (p.per_camera) clear_colors(row);
    const RecordRange range = records_of(p.image_offsets, p.gaussian_ids, image, first, count);
    if (range.begin == range.end) continue;
    const Vec3<T> center = camera_center(load_pose(p.viewmats + 16 * image));
    for (int64_t m = range.begin; m < range.end; ++m) {
      if (p.records[m].opacity == T(0)) continue;
      const T* v_color = p.v_record_colors + m * p.color_stride;
      const int64_t g = row * p.n_gaussians + p.gaussian_ids[m];
      T* v_out = p.v_colors == nullptr ? nullptr : p.v_colors + row_size * g;
      if (!with_sh) {
        if (v_out == nullptr) continue;
        for (int64_t d = 0; d < p.n_channels; ++d) v_out[d] += v_color[d];
        continue;
      }
      if (v_color[0] == T(0) && v_color[1] == T(0) && v_color[2] == T(0)) continue;
      const int64_t at = scene * p.n_gaussians + p.gaussian_ids[m];
      const T* mean = p.means + 3 * at;
      const Vec3<T> v = sh_color_vjp(
          p, Vec3<T>{mean[0] - center.x, mean[1] - center.y, mean[2] - center.z},
          p.colors + row_size * g, v_color, v_out);
      if (p.v_means != nullptr) {
        p.v_means[3 * at] += v.x;
        p.v_means[3 * at + 1] += v.y;
        p.v_means[3 * at + 2] += v.z;
      }
      if (center_sums.wanted()) {
        double* sums = center_sums.of(scene, chunk, camera);
        sums[0] -= double(v.x);
        sums[1] -= double(v.y);
        sums[2] -= double(v.z);
      }
    }
  }
}

}  // namespace

template <typename T>
void color_bwd_cpu(const ColorBwdParams<T>& p, int threads) {
  const int64_t n_images = p.n_scenes * p.n_cameras;
  if (p.v_depths != nullptr) {
    const int64_t last = p.depth_channel == DepthChannel::kOnly ? 0 : p.n_channels;
    for (int64_t m = 0; m < p.image_offsets[n_images]; ++m) {
      p.v_depths[m] = p.v_record_colors[m * p.color_stride + last];
    }
  }
  if (p.depth_channel == DepthChannel::kOnly) return;

  ImageSums center_sums(p.v_viewmats != nullptr, p.n_scenes, p.n_cameras, p.n_gaussians, 3);
  for_gaussian_chunks(p.n_scenes, p.n_gaussians, threads,
                      [&](int64_t scene, int64_t chunk, int64_t first, int64_t count) {
                        color_chunk_bwd(p, scene, chunk, first, count, center_sums);
                      });
  if (p.v_viewmats == nullptr) return;
  for (int64_t image = 0; image < n_images; ++image) {
    double sums[3];
    center_sums.total(image, sums);
    T* out = p.v_viewmats + 16 * image;
    std::fill(out, out + 16, T(0));
    // A view that sees nothing may be singular.
    if (p.image_offsets[image] == p.image_offsets[image + 1]) continue;
    const View<T> pose = load_pose(p.viewmats + 16 * image);
    ViewGrad<T> v = {};
    camera_center_vjp(pose, camera_center(pose), Vec3<T>{T(sums[0]), T(sums[1]), T(sums[2])}, v);
    const T v_t[3] = {v.t.x, v.t.y, v.t.z};
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) out[4 * i + j] = v.R.m[3 * i + j];
      out[4 * i + 3] = v_t[i];
    }
  }
}

template void color_bwd_cpu<float>(const ColorBwdParams<float>&, int);
template void color_bwd_cpu<double>(const ColorBwdParams<double>&, int);

}  // namespace rapfast
